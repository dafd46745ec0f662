"""How kernels, and the functions that only kernels call, are compiled: a shorter way than Numba's own.

Numba compiles every function that a kernel calls as if Python called it too: with a wrapper that unpacks Python's
arguments, one for C callbacks, and machine code of all three, which nothing runs, because the kernel's machine code
holds the function once more: much of a kernel's first call. Here the pipeline ends with the LLVM code, the form in
which Numba links one function into another, as it was lowered: the kernel's library optimises everything at once. Numba
optimises each library, with all that is linked into it, once for every function on the way to the kernel, and cleans
each function of a module by itself before; no kernel gained by it.

Before that, much of the time went into work in Python whose results nothing used (device_passes.py) or that was done
over and over (device_typing.py).

Compiling makes millions of objects, few of which are garbage: Python's collector pauses meanwhile.

A kernel from the cache is not compiled from these functions any more, so it never had more of them than it has here.
"""

import ctypes
import gc
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

from llvmlite import binding as llvm
from llvmlite import ir
from numba import _dynfunc  # pyright: ignore[reportAttributeAccessIssue]
from numba.core.cgutils import normalize_ir_text
from numba.core.codegen import CPUCodeLibrary, JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder, Flags
from numba.core.compiler_lock import global_compiler_lock
from numba.core.compiler_machinery import PassManager, register_pass
from numba.core.errors import ForceLiteralArg
from numba.core.registry import CPUDispatcher, cpu_target
from numba.core.sigutils import normalize_signature
from numba.core.targetconfig import ConfigStack
from numba.core.typed_passes import NativeLowering, NativeParforLowering

from tilewise.kernels.cpu.device_passes import LEAN_PASSES
from tilewise.kernels.cpu.device_typing import brief_refreshes, remembered_calls


def _needed(library: CPUCodeLibrary) -> list[CPUCodeLibrary]:
    """All libraries that one needs, directly or not, each once, a caller's before those that it calls.

    Linking leaves out what nothing linked before refers to. Numba's own come last: any of ours may call them.
    """
    seen: set[CPUCodeLibrary] = set()
    callees_first: list[CPUCodeLibrary] = []

    def visit(caller: CPUCodeLibrary):
        for called in caller._linking_libraries:
            if called not in seen:
                seen.add(called)
                if isinstance(called, _LinkedLibrary) and not called._wide:
                    visit(called)
                callees_first.append(called)

    visit(library)
    callees_first.reverse()
    return sorted(callees_first, key=lambda needed: not isinstance(needed, _LinkedLibrary))


def _part(library: CPUCodeLibrary):
    """Its module, for one that links whatever else it needs."""
    return library.own_code() if isinstance(library, _LinkedLibrary) else library._get_module_for_linking()


class _KernelLibrary(JITCodeLibrary):
    """Machine code, optimised as a whole only."""

    def add_ir_module(self, ir_module):
        self._raise_if_finalized()
        module = llvm.parse_assembly(normalize_ir_text(str(ir_module)))
        module.name = ir_module.name
        self.add_llvm_module(module)

    def _optimize_functions(self, ll_module):
        ll_module.data_layout = self._codegen._data_layout

    def _link_needed(self):
        for library in _needed(self):
            self._reload_init.update(library._reload_init)
            self._final_module.link_in(_part(library), preserve=True)
        self._final_module.verify()

    def _verify_declare_only_symbols(self):
        missing = [f.name for f in self._final_module.functions if f.is_declaration and f.name.startswith("_ZN")]
        if missing:  # would be called all the same, at address 0
            raise RuntimeError(f"functions that were not linked into {self.name}: {missing}")

    def finalize(self):
        self._codegen._check_llvm_bugs()
        self._raise_if_finalized()
        self._link_needed()
        self._optimize_final_module()
        self._finalize_final_module()


class _LinkedLibrary(_KernelLibrary):
    """LLVM code to be linked into other libraries; no machine code.

    A kernel's library links it and all that it needs, each once. Numba links level after level, so that the innermost
    functions are copied into every library on the way to the kernel.
    """

    _wide = False
    _whole = None

    def add_ir_module(self, ir_module):
        # Loops that ask for wide vectors get them from this library or never: an inlined function loses the attribute.
        attributes = [attribute for function in ir_module.functions for attribute in function.attributes]
        self._wide = self._wide or any("prefer-vector-width" in attribute for attribute in attributes)
        super().add_ir_module(ir_module)

    def finalize(self):
        self._raise_if_finalized()
        if self._wide:
            self._link_needed()
            self._optimize_final_module()
        self._finalize_dynamic_globals()
        self._finalized = True

    def own_code(self):
        return super()._get_module_for_linking()

    def _get_module_for_linking(self):
        """For Numba's own libraries, which link what they call and no further."""
        if self._wide:
            return self.own_code()
        if self._whole is None:
            self._whole = self.own_code().clone()
            for library in _needed(self):
                self._whole.link_in(_part(library), preserve=True)
        return self._whole


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
    """Numba's pipeline for compiled functions, with lean passes and a lowering of ours."""
    manager = DefaultPassBuilder.define_nopython_pipeline(state)
    ours = LEAN_PASSES | {instead_of: lowering}
    manager.passes = [(ours.get(kind, kind), what) for kind, what in manager.passes]
    manager.finalize()
    return manager


class _FixedFlags(Flags):
    """Flags that nobody changes: at every overloaded call Numba looks for them among those of what it has compiled."""

    def __init__(self, copy_from: Flags):
        super().__init__(copy_from)
        self._fixed = super().values()
        self._hash = super().__hash__()

    def values(self):
        return self._fixed

    def copy(self):
        return Flags(self)

    def __hash__(self):
        return self._hash

    __eq__ = Flags.__eq__


class _ShortCompiler(CompilerBase):
    """One pipeline, and flags that are compared quickly."""

    def _compile_core(self):
        state = self.state
        with ConfigStack().enter(_FixedFlags(state.flags)):
            (manager,) = self.define_pipelines()
            state.metadata["pipeline_times"] = {manager.pipeline_name: manager.exec_times}
            manager.run(state)
            state.pipeline = None
            return state.cr


class DeviceCompiler(_ShortCompiler):
    """For functions that kernels call."""

    def define_pipelines(self):
        return [_with(_LinkedLowering, NativeLowering, self.state)]


class _DeviceDispatcher(CPUDispatcher):
    """Compiles within a kernel's compilation. Numba would time each: two listeners more to every call of LLVM."""

    _compiler: Any

    def compile(self, sig):
        with global_compiler_lock, self._compiling_counter:
            args, return_type = normalize_signature(sig)
            known = self.overloads.get(tuple(args))
            if known is not None:
                return known.entry_point
            try:
                result = self._compiler.compile(args, return_type)
            except ForceLiteralArg as error:
                raise error.bind_fold_arguments(lambda *of: self._compiler.fold_argument_types(*of)[1]) from None
            self.add_overload(result)
            return result.entry_point


def for_kernels(dispatcher: CPUDispatcher) -> CPUDispatcher:
    """A device function's dispatcher, without what only calls from Python need."""
    dispatcher.__class__ = _DeviceDispatcher
    return dispatcher


def _new_library(state) -> _KernelLibrary:
    state.flags.no_cfunc_wrapper = True
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
        if not gc.get_freeze_count():  # the new objects are old now, and not all looked at when the next one is made
            gc.freeze()
            gc.unfreeze()
        gc.enable()


class SerialCompiler(_ShortCompiler):
    """For kernels' serial forms."""

    def compile_extra(self, func):
        state, context = self.state, cpu_target.target_context
        with _no_collections(), remembered_calls(state.typingctx), brief_refreshes(context, state.targetctx):
            return super().compile_extra(func)

    def define_pipelines(self):
        return [_with(_SerialLowering, NativeLowering, self.state)]


class ParallelCompiler(SerialCompiler):
    """For kernels' parallel forms."""

    def define_pipelines(self):
        return [_with(_ParallelLowering, NativeParforLowering, self.state)]
