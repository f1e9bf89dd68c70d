"""How a model meets people: its card."""

from .card import make_card


__all__ = ["make_card"]
