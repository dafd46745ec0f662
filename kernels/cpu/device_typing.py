"""What Numba's contexts are asked again and again while a kernel is compiled.

A kernel and its functions hold thousands of sums and products of the same few types, and type inference asks for each
of them several times. Numba tries all that is known under an operator every time, functions of strings and sets among
them. Here the answers for built-in functions and intrinsics are kept. And at every intrinsic Numba goes through all its
registries for what is new; here, through those that have grown.

Both replace a method of Numba's for as long as a kernel is compiled, under Numba's lock, for which whatever else is
compiled waits; what that would find is the same.
"""

from contextlib import contextmanager
from functools import partial
from typing import Any

from numba.core import types
from numba.core.typing.templates import _IntrinsicTemplate


def _depends_on_types_alone(function: types.Function, signature) -> bool:
    """Not so where Numba compiles something for the call, in the way that the caller is compiled."""
    if all(issubclass(template, _IntrinsicTemplate) for template in function.templates):
        return True
    return function.get_impl_key(signature) is function.typing_key


# (function, types of its arguments): signature. A function that somebody overloads is another function from then on.
_known: dict[tuple, Any] = {}


def _is_hashable(key) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True


@contextmanager
def remembered_calls(context):
    """While it lasts, built-in functions remember how they typed calls for this typing context."""
    if "get_call_type" in vars(types.Function):  # a kernel is being compiled already
        yield
        return

    def remembering(function, asking, args, kws):
        key = function, tuple(args)
        if asking is not context or kws or type(function) is not types.Function or not _is_hashable(key):
            return super(types.Function, function).get_call_type(asking, args, kws)
        if key not in _known:
            signature = super(types.Function, function).get_call_type(asking, args, kws)
            if not _depends_on_types_alone(function, signature):
                return signature
            _known[key] = signature
        return _known[key]

    types.Function.get_call_type = remembering  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        del types.Function.get_call_type


def _size(registry, loader) -> int:
    return sum(len(getattr(registry, items)) for items in loader.registry_items)


def _install_what_is_new(contexts: tuple, sizes: dict) -> None:
    for context in contexts:
        for registry, loader in list(context._registries.items()):
            size = _size(registry, loader)
            if sizes.get((context, registry)) != size:
                context.install_registry(registry)
                sizes[context, registry] = size


@contextmanager
def brief_refreshes(context, subtarget):
    """While it lasts, a refresh of the target context, or of copies of it, looks at registries that have grown only.

    The context has been refreshed in full. subtarget: its copy for the kernel.
    """
    if "refresh" in vars(context):
        yield
        return
    brief = partial(_install_what_is_new, (context, context.typing_context), {})
    context.refresh = subtarget.refresh = brief
    try:
        yield
    finally:
        del context.refresh, subtarget.refresh
