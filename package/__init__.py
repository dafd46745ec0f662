"""tilewise: fast CNN kernels for Python, written in Python.

`import tilewise` loads no third-party module, not even NumPy: every public name is resolved on first use.
The kernels live in `tilewise.kernels`, the layers in `tilewise.nn`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from tilewise.kernels import __all__ as _kernel_names

if TYPE_CHECKING:
    from tilewise.kernels import *

__version__ = "0.1.0"

__all__ = [*_kernel_names, "__version__", "kernels", "nn"]


def __getattr__(name: str):
    if name in ("kernels", "nn"):
        return import_module(f"tilewise.{name}")
    if name in _kernel_names:
        value = getattr(import_module("tilewise.kernels"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'tilewise' has no attribute {name!r}")


def __dir__():
    return sorted(set(globals()) | set(__all__))
