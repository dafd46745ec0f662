"""Calls of a kernel's machine code from other compiled code: from the user's own @njit functions.

A call is one to an external symbol that stands for the serial form that Python would run. The caller holds no copy of
the kernel: it is compiled in no time, and computes the same bits.

What calls it may be cached, and loaded by another process. The symbol must be known there before the caller's machine
code is linked, and be of the same sources. Numba pickles what it caches, with a list of constants; a `Link` among them
sees to both when it is unpickled:

    user.nbc: (Link("cpu.activation._forward_kernel", types, stamp), machine code with the symbol)
               | stamp of other sources: OSError, for which Numba compiles the user's function anew
               | else: the kernel is loaded from its own cache (or compiled), and its address is given the name
"""

from functools import cache, lru_cache
from importlib import import_module
from typing import Any

import numpy as np
from llvmlite import binding
from numba import types
from numba.core import cgutils
from numba.core.imputils import impl_ret_borrowed, impl_ret_new_ref
from numba.extending import intrinsic, overload
from numba.np import arrayobj

from tilewise.kernels.disk_cache import source_stamp


class Link:
    """A symbol that a piece of machine code calls: a kernel's serial form for arguments of some types."""

    def __init__(self, kernel: str, arguments: tuple):
        self.kernel, self.arguments = kernel, arguments
        self.name, self.returned = _provide(kernel, arguments)

    def __reduce__(self):
        return _restored, (self.kernel, self.arguments, _stamp())


def _restored(kernel: str, arguments: tuple, stamp: str) -> Link:
    if stamp != _stamp():
        raise OSError("compiled with other kernels")  # what a lost file would raise
    return Link(kernel, arguments)


@lru_cache(maxsize=1)
def _stamp() -> str:
    return source_stamp()


@cache
def _provide(kernel: str, arguments: tuple) -> tuple[str, Any]:
    """(the symbol, which is there from now on; the type that is returned)."""
    module, _, name = kernel.rpartition(".")
    form = getattr(import_module(f"tilewise.kernels.{module}"), name).serial
    form.compile(arguments)
    compiled = form.overloads[arguments]
    symbol = f"tilewise.{kernel}({','.join(map(str, arguments))})"
    binding.add_symbol(symbol, compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name))
    return symbol, compiled.signature.return_type


@intrinsic(prefer_literal=True)
def call_kernel(typing_context, name, arguments):
    """Call the serial form of a kernel, named as a literal, "folder.file.function", with a tuple of arguments."""
    link = Link(name.literal_value, tuple(map(types.unliteral, arguments)))

    def generate(context, builder, signature, values):
        context.environment.consts.append(link)
        passed = [
            context.cast(builder, value, given, wanted)
            for value, given, wanted in zip(
                cgutils.unpack_tuple(builder, values[1]), signature.args[1], link.arguments, strict=True
            )
        ]
        convention = context.call_conv
        kind = convention.get_function_type(link.returned, link.arguments)
        function = cgutils.get_or_insert_function(builder.module, kind, link.name)
        status, result = convention.call_function(builder, function, link.returned, link.arguments, passed)
        with cgutils.if_unlikely(builder, status.is_error):
            convention.return_status_propagate(builder, status)
        return impl_ret_new_ref(context, builder, signature.return_type, result)

    return link.returned(name, arguments), generate


def contiguous(array):
    """The array itself, or a copy in row-major order, as a writeable and aligned one."""
    raise NotImplementedError("for compiled code only")


@overload(contiguous)
def _overload_contiguous(array):
    if array.layout == "C" and array.aligned:
        return lambda array: shaped(array, array.shape)
    return lambda array: shaped(array.copy(), array.shape)


def optional(array, like):
    """As `contiguous`; an empty vector of like's dtype where it is None."""
    raise NotImplementedError("for compiled code only")


@overload(optional)
def _overload_optional(array, like):
    if isinstance(array, types.Array):
        return lambda array, like: contiguous(array)
    return lambda array, like: np.empty(0, like.dtype)


@intrinsic
def shaped(typing_context, array, shape):
    """A contiguous array's memory as an array of another shape with as many elements, writeable for whom it is not.

    Kernels are compiled for aligned, writeable arrays, and write to nothing but their results.
    """
    kind = types.Array(array.dtype, len(shape), "C")

    def generate(context, builder, signature, values):
        source = context.make_array(signature.args[0])(context, builder, values[0])
        result = context.make_array(kind)(context, builder)
        extents = [
            context.cast(builder, value, given, types.intp)
            for value, given in zip(cgutils.unpack_tuple(builder, values[1]), signature.args[1], strict=True)
        ]
        steps = [source.itemsize]
        for extent in reversed(extents[1:]):
            steps.insert(0, builder.mul(extent, steps[0]))
        arrayobj.populate_array(
            result, source.data, cgutils.pack_array(builder, extents), cgutils.pack_array(builder, steps),
            source.itemsize, source.meminfo, source.parent,
        )  # fmt: skip
        return impl_ret_borrowed(context, builder, kind, result._getvalue())

    return kind(array, shape), generate
