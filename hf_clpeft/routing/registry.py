"""Routers by the names that methods call them by."""

from ..config import MethodConfig
from ..errors import ConfigError
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
"""A router of your own is a subclass of [`ClassRouter`] and one more entry."""


def find_router(method: MethodConfig) -> type[Router]:
    """The class of a method's router.

    Args:
        method ([`MethodConfig`]): The method.

    Returns:
        subclass of [`Router`]

    Raises:
        [`ConfigError`]: There is no router of that name.

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
    return ROUTERS[method.router]
