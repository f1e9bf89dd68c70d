"""Routers by the names that methods call them by."""

from ..config.errors import ConfigError
from .classes import ClassMeanRouter, ClassRouter
from .gaussian import GaussianRouter
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


def find_router(name: str) -> type[PrototypeRouter | ClassRouter]:
    """The class of a router.

    Args:
        name (`str`): As methods call it.

    Returns:
        subclass of [`Router`]

    Raises:
        [`ConfigError`]: There is no router of that name, or it is none that learns task by task.

    Example:

    ```py
    >>> from hf_clpeft.routing import find_router

    >>> find_router("gaussian").title
    'Gaussian per class, one covariance'

    ```
    """
    if name not in ROUTERS:
        raise ConfigError(
            f"There is no router {name!r}; choose one of {', '.join(ROUTERS)}, or, if it is your own, put it into "
            "hf_clpeft.routing.ROUTERS first."
        )
    kind = ROUTERS[name]
    if not (isinstance(kind, type) and issubclass(kind, PrototypeRouter | ClassRouter)):
        raise ConfigError(f"The router {name!r} is {kind!r}: it must be a subclass of ClassRouter or PrototypeRouter.")
    return kind


def router_name(router: Router) -> str:
    """What methods call a router; the name of its class where it is not in [`ROUTERS`]."""
    return next((name for name, kind in ROUTERS.items() if kind is type(router)), type(router).__name__)


def router_title(name: str) -> str:
    """How a router works, in a few words; the name itself where there is no such class."""
    return ROUTERS[name].title if name in ROUTERS else name
