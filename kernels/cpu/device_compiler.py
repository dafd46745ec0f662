"""How kernels, and the functions that only kernels call, are compiled: a shorter way than Numba's own.

Numba compiles every function that a kernel calls as if Python called it too: with a wrapper that unpacks Python's
arguments, one for C callbacks, and machine code of all three, which nothing runs, because the kernel's machine code
holds the function once more: much of a kernel's first call. Here the pipeline ends with the LLVM code, the form in
which Numba links one function into another, as it was lowered: the kernel's library optimises everything at once. Numba
optimises each library, with all that is linked into it, once for every function on the way to the kernel, and cleans
each function of a module by itself before; no kernel gained by it.

Compiling makes millions of objects, few of which are garbage: Python's collector pauses meanwhile.

A kernel from the cache is not compiled from these functions any more, so it never had more of them than it has here.
"""

import ctypes
import gc
from contextlib import contextmanager
from functools import lru_cache, partial

from llvmlite import ir
from numba import _dynfunc  # pyright: ignore[reportAttributeAccessIssue]
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import PassManager, register_pass
from numba.core.registry import cpu_target
from numba.core.typed_passes import NativeLowering, NativeParforLowering


class _KernelLibrary(JITCodeLibrary):
    """Machine code, optimised as a whole only."""

    def _optimize_functions(self, ll_module):
        ll_module.data_layout = self._codegen._data_layout


class _LinkedLibrary(_KernelLibrary):
    """LLVM code to be linked into other libraries; no machine code."""

    _wide = False

    def add_ir_module(self, ir_module):
        # Loops that ask for wide vectors get them from this library or never: an inlined function loses the attribute.
        attributes = [attribute for function in ir_module.functions for attribute in function.attributes]
        self._wide = self._wide or any("prefer-vector-width" in attribute for attribute in attributes)
        super().add_ir_module(ir_module)

    def _optimize_final_module(self):
        if self._wide:
            super()._optimize_final_module()

    def _finalize_final_module(self):
        self._finalize_dynamic_globals()
        self._finalized = True


_REFUSAL = ctypes.create_string_buffer(b"a device function has no machine code of its own: only kernels can call it")


@lru_cache(maxsize=1)
def _refusal() -> tuple[JITCodeLibrary, int]:
    """Machine code that raises a TypeError, and where it lies; what a ctypes callback raises would only be printed."""
    module, pointer, size = ir.Module("tilewise_refusal"), ir.IntType(8).as_pointer(), ir.IntType(64)
    entry = ir.Function(module, ir.FunctionType(pointer, [pointer] * 3), "tilewise_refusal")
    builder = ir.IRBuilder(entry.append_basic_block())
    addresses = ctypes.cast(ctypes.pythonapi.PyErr_SetString, ctypes.c_void_p).value, id(TypeError)
    raising = ir.FunctionType(ir.VoidType(), [pointer] * 2).as_pointer()
    values = [size(address).inttoptr(pointer) for address in (*addresses, ctypes.addressof(_REFUSAL))]
    builder.call(builder.bitcast(values[0], raising), values[1:])
    builder.ret(pointer(None))
    codegen = cpu_target.target_context.codegen()  # pyright: ignore[reportAttributeAccessIssue]
    library = JITCodeLibrary(codegen, module.name)
    library.add_ir_module(module)
    library.finalize()
    return library, library.get_pointer_to_function(entry.name)


@register_pass(mutates_CFG=True, analysis_only=False)
class _LinkedLowering(NativeLowering):
    """Lowering without the wrappers, and without machine code."""

    _name = "tilewise_linked_lowering"

    def run_pass(self, state):
        state.library = _LinkedLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        flags = state.flags
        flags.no_cpython_wrapper = flags.no_cfunc_wrapper = flags.no_compile = True
        super().run_pass(state)
        lowered = state["cr"]
        # Numba knows a compiled function by its entry from Python.
        _, address = _refusal()
        entry = _dynfunc.make_function(
            lowered.fndesc.lookup_module(), state.func_id.func_name, "", address, lowered.env, (state.library,)
        )
        state.targetctx.insert_user_function(entry, lowered.fndesc, [state.library])
        state["cr"] = lowered._replace(cfunc=entry)
        return True


def _with(lowering: type, instead_of: type, state) -> PassManager:
    """Numba's pipeline for compiled functions, but for one pass."""
    manager = DefaultPassBuilder.define_nopython_pipeline(state)
    manager.passes = [(lowering if kind is instead_of else kind, what) for kind, what in manager.passes]
    manager.finalize()
    return manager


class DeviceCompiler(CompilerBase):
    """For functions that kernels call."""

    def define_pipelines(self):
        return [_with(_LinkedLowering, NativeLowering, self.state)]


def _new_library(state) -> _KernelLibrary:
    library = _KernelLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
    library.enable_object_caching()
    return library


@register_pass(mutates_CFG=True, analysis_only=False)
class _SerialLowering(NativeLowering):
    """Lowering of a kernel without parallel loops."""

    _name = "tilewise_serial_lowering"

    def run_pass(self, state):
        state.library = _new_library(state)
        return super().run_pass(state)


@register_pass(mutates_CFG=True, analysis_only=False)
class _ParallelLowering(NativeParforLowering):
    """Lowering of a kernel with parallel loops: their bodies and wrappers have no machine code but the kernel's."""

    _name = "tilewise_parallel_lowering"

    def run_pass(self, state):
        codegen = state.targetctx.codegen()
        state.library = _new_library(state)
        codegen._library_class, codegen.set_env = _LinkedLibrary, partial(_set_env, codegen)
        try:
            return super().run_pass(state)
        finally:
            del codegen._library_class, codegen.set_env


def _set_env(codegen, name: str, env):
    if codegen._engine.is_symbol_defined(name):
        type(codegen).set_env(codegen, name, env)


@contextmanager
def _no_collections():
    if not gc.isenabled():  # the caller's wish, or another kernel is being compiled
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class SerialCompiler(CompilerBase):
    """For kernels' serial forms."""

    def compile_extra(self, func):
        with _no_collections():
            return super().compile_extra(func)

    def define_pipelines(self):
        return [_with(_SerialLowering, NativeLowering, self.state)]


class ParallelCompiler(SerialCompiler):
    """For kernels' parallel forms."""

    def define_pipelines(self):
        return [_with(_ParallelLowering, NativeParforLowering, self.state)]
