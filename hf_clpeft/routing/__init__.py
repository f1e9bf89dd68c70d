"""Routers: they select the experts of each image by its query features."""

from .classes import ClassMeanRouter, ClassRouter
from .gaussian import GaussianRouter
from .keys import KeyRouter
from .klda import KldaRouter
from .low_rank_ridge import LowRankRidgeRouter
from .prototypes import PrototypeRouter
from .registry import ROUTERS, find_router, router_title
from .ridge import LinearRidgeRouter, RidgeRouter
from .routing import Router, Routing


__all__ = [
    "ROUTERS",
    "ClassMeanRouter",
    "ClassRouter",
    "GaussianRouter",
    "KeyRouter",
    "KldaRouter",
    "LinearRidgeRouter",
    "LowRankRidgeRouter",
    "PrototypeRouter",
    "RidgeRouter",
    "Router",
    "Routing",
    "find_router",
    "router_title",
]
