"""Registry of routers."""

from ..config.errors import ConfigError
from .classes import ClassMeanRouter, ClassRouter
from .gaussian import GaussianRouter
from .klda import KldaRouter
from .low_rank_ridge import LowRankRidgeRouter
from .prototypes import PrototypeRouter
from .ridge import LinearRidgeRouter, RidgeRouter
from .routing import Router


ROUTERS: dict[str, type[PrototypeRouter | ClassRouter]] = {
    "prototypes": PrototypeRouter,
    "gaussian": GaussianRouter,
    "class_means": ClassMeanRouter,
    "ridge": RidgeRouter,
    "linear_ridge": LinearRidgeRouter,
    "low_rank_ridge": LowRankRidgeRouter,
    "klda": KldaRouter,
}
"""Routers by name. Add a subclass of [`ClassRouter`] or [`PrototypeRouter`] to register it."""


def find_router(name: str) -> type[PrototypeRouter | ClassRouter]:
    """Class of the router with a given name.

    Raises:
        [`ConfigError`]: There is no router of that name, or its class is not a [`ClassRouter`] or [`PrototypeRouter`].

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
    """Name of a router in [`ROUTERS`]; the name of its class if it is not registered."""
    return next((name for name, kind in ROUTERS.items() if kind is type(router)), type(router).__name__)


def router_title(name: str) -> str:
    """Short description of a router by its name; the name itself if it is not registered."""
    return ROUTERS[name].title if name in ROUTERS else name
