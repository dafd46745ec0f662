"""Networks that are known by name, as functions that build them."""

from .lenet import lenet5

__all__ = ["lenet5"]
