"""Looking on while a model computes."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from .module import Module, changes


@contextmanager
def observed(modules: Iterable[Module], methods: tuple[str, ...], seen: Callable[..., Any]) -> Iterator[None]:
    """Inside, each call of these methods, once it is over, is told to seen(module, arguments, result).

    arguments: in the order of the method's own, whether they were given by position or by name.
    """
    modules = list(modules)

    def telling(module: Module, method: Callable[..., Any]):
        def call(*arguments, **options):
            result = method(*arguments, **options)
            if options:
                given = inspect.signature(method).bind(*arguments, **options)
                arguments = (*given.args, *given.kwargs.values())
            seen(module, arguments, result)
            return result

        return call

    places = [(module, name, vars(module).get(name)) for module in modules for name in methods]
    try:
        for module, name, _ in places:
            vars(module)[name] = telling(module, getattr(module, name))
        changes.note()
        yield
    finally:
        for module, name, own in places:
            if own is None:
                vars(module).pop(name, None)
            else:  # a method that the user gave this module
                vars(module)[name] = own
        changes.note()
