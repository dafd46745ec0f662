"""Looking on while a model computes."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from .module import Module


@contextmanager
def observed(modules: Iterable[Module], methods: tuple[str, ...], seen: Callable[..., Any]) -> Iterator[None]:
    """Inside, each call of these methods, once it is over, is told to seen(module, arguments, result)."""
    modules = list(modules)

    def telling(module: Module, method: Callable[..., Any]):
        def call(*arguments):
            result = method(*arguments)
            seen(module, arguments, result)
            return result

        return call

    try:
        for module in modules:
            for name in methods:
                vars(module)[name] = telling(module, getattr(module, name))
        yield
    finally:
        for module in modules:
            for name in methods:
                vars(module).pop(name, None)
