"""Functions that only kernels call, straight from Python's syntax to LLVM's: `@emitted` instead of `@device`.

Numba searches for the meaning of every operation anew among all that it knows, and most of a kernel's first call was
that. Here an operation is one that the list below knows, and a first call waits for LLVM above all. (`make latency`
prints what it takes.)

What is understood: int64, float32, float64 and bool; contiguous arrays and pointers to their elements; intrinsics and
other emitted functions. Assignments, `for` over range, `while`, `if`, `break`, `continue`, `return`; arithmetic,
comparisons, `and`, `or`, `not`, `a if c else b`, min and max of integers; tuples. Names of the module and what is
computed from them are constants: a branch that they rule out is not emitted. Everything else is a TypeError when the
kernel is compiled. It means what it means to Numba, with these limits:

- an index is never negative, nor is a step of `range` that is not a constant; a slice lies within its array;
- no one divides by zero; integers are signed, those of arrays as well;
- a variable keeps its type, and an array that is made here (`scratch`) its variable: it is let go at the function's
  end, or returned, in one place.

Fused and reordered arithmetic is as the kernel's: a function whose bits depend on it stays a `@device`, unless every
kernel that calls it asks for the same (batch norm's, AS_WRITTEN). The source must be at hand when a kernel is compiled,
as it was when it was imported.
"""

import ast
import builtins
import copy
import dis
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from functools import cached_property
from types import CodeType, FunctionType
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from tilewise.kernels.cpu.emitted_syntax import Emission
from tilewise.kernels.cpu.emitted_values import Arithmetic, Value


def emitted(function: FunctionType) -> Callable[..., Any]:
    """The intrinsic that calls the function's LLVM code, emitted once for each kernel and kind of arguments."""
    source = _Source(function)

    def define(typing, *kinds):
        kinds = tuple(map(_kept, kinds))
        result = source.result(typing, kinds)

        def generate(context, builder, signature, arguments):
            arithmetic = Arithmetic(context, builder)
            values = [Value(kind, value) for kind, value in zip(kinds, arguments, strict=True)]
            value = source.call(typing, arithmetic, values)
            return context.get_dummy_value() if result == types.none else arithmetic.cast(value, result).value

        return result(*kinds), generate

    given = inspect.signature(function)
    first = inspect.Parameter("typing", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    define.__name__, define.__signature__ = (
        function.__name__,
        given.replace(parameters=[first, *given.parameters.values()]),
    )
    handle: Any = intrinsic(define)
    handle.emitted = source
    return handle


def _kept(kind: types.Type) -> types.Type:
    """How an argument arrives."""
    kind = types.unliteral(kind)
    return types.int64 if isinstance(kind, types.Integer) else kind


class _Source:
    """A function's syntax, and what it returns for arguments of some kinds."""

    def __init__(self, function: FunctionType):
        self.function = function
        self.name = function.__name__
        self._results: dict[tuple, types.Type] = {}
        self._truths: set[tuple] = set()  # kinds for which the int64 that is returned is a bool

    @cached_property
    def text(self) -> str:
        return textwrap.dedent(inspect.getsource(self.function))

    @cached_property
    def tree(self) -> ast.FunctionDef:
        (tree,) = ast.parse(self.text).body
        assert isinstance(tree, ast.FunctionDef)
        if not _is_source_of(tree, self.function):
            raise RuntimeError(f"the source of {self.name} has changed since it was imported: restart Python")
        return tree

    @cached_property
    def constants(self) -> dict:
        inner = inspect.getclosurevars(self.function)
        return {**vars(builtins), **inner.globals, **inner.nonlocals}

    @cached_property
    def digest(self) -> str:
        """Of what the code depends on beside its arguments: one name, one code, also in the kernels' cache."""
        inner = inspect.getclosurevars(self.function)
        enclosed = {name: _told(value) for name, value in inner.nonlocals.items()}
        if any("<locals>" in told for told in enclosed.values()):
            raise TypeError(f"{self.name} encloses functions that others enclose under the same name: {enclosed}")
        used = {name: _told(value) for name, value in inner.globals.items()} | enclosed
        parts = [self.text, *(f"{name} {used[name]}" for name in sorted(used))]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def result(self, typing, kinds: tuple) -> types.Type:
        if kinds not in self._results:
            self._results[kinds] = types.none
            try:
                if any(isinstance(node, ast.Return) and node.value is not None for node in ast.walk(self.tree)):
                    self._results[kinds] = self._tried(typing, kinds)
            except BaseException:
                del self._results[kinds]
                raise
        return self._results[kinds]

    def _tried(self, typing, kinds: tuple) -> types.Type:
        """What is returned, found out by emitting it where nobody looks."""
        context: Any = cpu_target.target_context
        library = context.codegen().create_library(f"trial of {self.name}")
        with context.push_code_library(library):
            emission = self._emit(typing, context.subtarget(enable_nrt=True), ir.Module(), kinds)
        if emission.returns_truth:
            self._truths.add(kinds)
        return emission.returned

    def _emit(self, typing, context, module, kinds):
        result = self._results[kinds]
        convention = context.call_conv.get_function_type(result, ())
        parts = [part for kind in kinds for part in Arithmetic.parts_of(context, kind)]
        kind = ir.FunctionType(convention.return_type, [*convention.args, *parts])
        function = ir.Function(module, kind, self._name_in(context, kinds))
        function.linkage = "linkonce_odr"
        function.attributes.add("nounwind")
        emission = Emission(self, typing, context, function, kinds)
        emission.emit()
        return emission

    def _name_in(self, context, kinds) -> str:
        flags = "".join(sorted(getattr(context.fastmath, "flags", ())))
        return ".".join(map(str, (self.function.__module__, self.function.__qualname__, self.digest, flags, *kinds)))

    def call(self, typing, arithmetic: Arithmetic, values: list[Value]) -> Value:
        kinds = tuple(_kept(value.kind) for value in values)
        values = [arithmetic.cast(value, kind) for value, kind in zip(values, kinds, strict=True)]
        result = self.result(typing, kinds)
        builder, context = arithmetic.builder, arithmetic.context
        function: Any = builder.module.globals.get(self._name_in(context, kinds))
        if function is None:
            emission = self._emit(typing, context, builder.module, kinds)
            function = emission.function
            function.may_fail = emission.may_fail
        # Numba's convention: where the result goes, where an error's description goes, the arguments
        place = function.function_type.args[0]
        where = place(None) if result == types.none else cgutils.alloca_once(builder, place.pointee)
        parts = [part for value in values for part in arithmetic.parts(value)]
        status = builder.call(function, [where, builder.function.args[1], *parts])
        if function.may_fail:
            with cgutils.if_unlikely(builder, builder.icmp_signed("!=", status, status.type(0))):
                builder.ret(status)
        arithmetic.may_fail |= function.may_fail
        if kinds in self._truths:
            return arithmetic.cast(Value(result, builder.load(where)), types.boolean)
        made = isinstance(result, types.Array)
        return Value(result, None if result == types.none else builder.load(where), made)


def _is_source_of(tree: ast.FunctionDef, function: FunctionType) -> bool:
    """The file is read when a kernel is compiled; it may be another by then, with other names, constants or operators.

    Not all of the byte code is compared: calls of imported names are compiled otherwise where their import is seen.
    """
    plain = copy.copy(tree)
    plain.decorator_list = []
    free = function.__code__.co_freevars
    around = ast.parse(f"def around({', '.join(free)}): pass").body[0]
    around.body = [plain]  # pyright: ignore[reportAttributeAccessIssue]
    module = ast.fix_missing_locations(ast.Module([around], []))
    (outer,) = (part for part in compile(module, "", "exec").co_consts if isinstance(part, CodeType))
    (code,) = (part for part in outer.co_consts if isinstance(part, CodeType))
    return _operations(code) == _operations(function.__code__)


def _operations(code: CodeType) -> tuple:
    operators = [step.argrepr for step in dis.get_instructions(code) if step.opname in ("BINARY_OP", "COMPARE_OP")]
    return code.co_names, code.co_consts, code.co_varnames, operators


def _told(constant) -> str:
    """A constant, so that others are told otherwise."""
    if hasattr(constant, "emitted"):
        return constant.emitted.digest
    if isinstance(constant, tuple):
        return str([_told(part) for part in constant])
    if isinstance(constant, (bool, int, float, str, np.generic)):
        return f"{type(constant).__name__} {constant!r}"
    name = getattr(constant, "__qualname__", None) or getattr(constant, "__name__", None)
    return f"{getattr(constant, '__module__', '')} {name or constant!r}"
