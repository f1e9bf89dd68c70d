"""Routers by the names that methods call them by."""

from ..config.errors import ConfigError
from ..config.model import MethodConfig
from .classes import ClassMeanRouter, ClassRouter
from .gaussian import GaussianRouter
from .keys import KeyRouter
from .prototypes import PrototypeRouter
from .ridge import RidgeRouter
from .routing import Router


ROUTERS: dict[str, type[PrototypeRouter | ClassRouter]] = {
    "prototypes": PrototypeRouter,
    "gaussian": GaussianRouter,
    "class_means": ClassMeanRouter,
    "ridge": RidgeRouter,
}
"""A router of your own is a subclass of [`ClassRouter`] or [`PrototypeRouter`], or of one here, and one more entry."""


def find_router(method: MethodConfig) -> type[Router]:
    """The class of a method's router.

    Args:
        method ([`MethodConfig`]): The method.

    Returns:
        subclass of [`Router`]

    Raises:
        [`ConfigError`]: There is no router of that name, or it cannot do what the method asks of it.

    Example:

    ```py
    >>> from hf_clpeft import s_lora
    >>> from hf_clpeft.routing import find_router

    >>> find_router(s_lora(router="gaussian")).title
    'Gaussian per class, one covariance'

    ```
    """
    if method.experts == "pool":
        return KeyRouter
    if method.router not in ROUTERS:
        raise ConfigError(
            f"There is no router {method.router!r}; choose one of {', '.join(ROUTERS)}, or, if it is your own, put it "
            "into hf_clpeft.routing.ROUTERS first."
        )
    kind = ROUTERS[method.router]
    if not (isinstance(kind, type) and issubclass(kind, PrototypeRouter | ClassRouter)):
        raise ConfigError(
            f"The router {method.router!r} is {kind!r}: it must be a subclass of ClassRouter or PrototypeRouter."
        )
    if method.classifier == "router" and not kind.knows_classes:
        raise ConfigError(
            f"classifier='router' needs a router that knows classes, and {method.router!r} knows tasks alone: choose "
            "'gaussian', 'class_means' or 'ridge', or a ClassRouter of your own."
        )
    if method.classifier == "both" and not kind.gives_likelihoods:
        raise ConfigError(
            f"classifier='both' adds up log-likelihoods, and the scores of {method.router!r} are none: choose "
            "router='gaussian', a subclass of GaussianRouter, or a ClassRouter with gives_likelihoods = True."
        )
    return kind
