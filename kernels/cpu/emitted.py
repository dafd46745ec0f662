"""Functions that only kernels call, straight from Python's syntax to LLVM's: `@emitted` instead of `@device`.

Numba takes about a millisecond for each addition of a kernel's source and seven for each loop, because it searches for
the meaning of every operation anew among all that it knows. Here an operation is one that the list below knows, so that
a function of fifty lines takes some milliseconds: a kernel's first call waits for little else than LLVM.

What is understood: int64, float32, float64 and bool; contiguous arrays and pointers to their elements; intrinsics and
other emitted functions. Assignments, `for` over range, `while`, `if`, `break`, `continue`, `return`; arithmetic,
comparisons, `and`, `or`, `not`, `a if c else b`, min and max of integers; tuples. Names of the module and what is
computed from them are constants: a branch that they rule out is not emitted. Everything else is a TypeError when the
kernel is compiled. It means what it means to Numba, with three limits:

- an index is never negative, nor is a step of `range` that is not a constant;
- no one divides by zero;
- a variable keeps its type, and an array that is made here (`scratch`) keeps its variable, to the function's end.

Fused and reordered arithmetic is as the kernel's: a function whose bits depend on it stays a `@device`.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import FunctionType
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

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
            result = source.call(typing, arithmetic, values)
            return context.get_dummy_value() if result.kind == types.none else result.value

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
    """How an argument arrives; Numba converts it."""
    kind = types.unliteral(kind)
    return types.int64 if isinstance(kind, types.Integer) else kind


class _Source:
    """A function's syntax, and what it returns for arguments of some kinds."""

    def __init__(self, function: FunctionType):
        self.function = function
        self.name = function.__name__
        self._results: dict[tuple, types.Type] = {}

    @cached_property
    def tree(self) -> ast.FunctionDef:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(self.function))).body
        assert isinstance(tree, ast.FunctionDef)
        return tree

    @cached_property
    def constants(self) -> dict:
        inner = inspect.getclosurevars(self.function)
        return {**vars(__import__("builtins")), **inner.globals, **inner.nonlocals}

    def result(self, typing, kinds: tuple) -> types.Type:
        if kinds not in self._results:
            returns = any(isinstance(node, ast.Return) and node.value is not None for node in ast.walk(self.tree))
            # a trial says what is returned
            self._results[kinds] = types.none
            if returns:
                context = cpu_target.target_context.subtarget(enable_nrt=True)  # pyright: ignore
                self._results[kinds] = self._emit(typing, context, ir.Module(), kinds).returned
        return self._results[kinds]

    def _emit(self, typing, context, module, kinds):
        result = self._results[kinds]
        convention = context.call_conv.get_function_type(result, ())
        parts = [part for kind in kinds for part in Arithmetic.parts_of(context, kind)]
        kind = ir.FunctionType(convention.return_type, [*convention.args, *parts])
        function = ir.Function(module, kind, self._name_in(kinds))
        function.linkage = "linkonce_odr"
        function.attributes.add("nounwind")
        emission = _Emission(self, typing, context, function, kinds)
        emission.emit()
        return emission

    def _name_in(self, kinds) -> str:
        inner = inspect.getclosurevars(self.function).nonlocals.values()
        return ".".join(map(str, (self.function.__module__, self.function.__qualname__, *inner, *kinds)))

    def call(self, typing, arithmetic: Arithmetic, values: list[Value]) -> Value:
        kinds = tuple(value.kind for value in values)
        result = self.result(typing, kinds)
        builder, context = arithmetic.builder, arithmetic.context
        function = builder.module.globals.get(self._name_in(kinds))
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
        made = isinstance(result, types.Array)
        return Value(result, None if result == types.none else builder.load(where), made)


@dataclass(frozen=True)
class _Variable:
    kind: types.Type
    place: Any


class _Emission:
    """One function being emitted: statement after statement at the builder's position."""

    def __init__(self, source: _Source, typing, context, function, kinds):
        self.source, self.typing, self.function = source, typing, function
        self.builder: Any = ir.IRBuilder(function.append_basic_block("entry"))
        context.call_conv.init_call_helper(self.builder)
        self.a = Arithmetic(context, self.builder)
        self.names: dict[str, Any] = {}  # variables, and constants
        self.loops: list[tuple] = []  # (where `continue` goes, where `break` goes)
        self.owned: list[_Variable] = []
        self.returned = types.none
        self.kinds = kinds
        stores = [n.id for n in ast.walk(source.tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        given = {parameter.arg for parameter in source.tree.args.args}
        self.assigned_once = {name for name in stores if stores.count(name) == 1} - given

    @property
    def may_fail(self) -> bool:
        return self.a.may_fail

    def emit(self):
        tree, parts = self.source.tree, list(self.function.args[2:])
        self.end = self.function.append_basic_block("end")
        self.where = self.function.args[0]
        parameters = [parameter.arg for parameter in tree.args.args]
        if len(parameters) != len(self.kinds):
            raise TypeError(f"{self.source.name} takes {len(parameters)} arguments, not {len(self.kinds)}")
        for name, kind in zip(parameters, self.kinds, strict=True):
            self.set(name, self.a.from_parts(kind, parts))
        self.block(tree.body)
        if not self.builder.block.is_terminated:
            self.builder.branch(self.end)
        self.builder.position_at_end(self.end)
        for array in self.owned:
            self.a.context.nrt.decref(self.builder, array.kind, self.builder.load(array.place))
        self.builder.ret(self.function.function_type.return_type(0))

    # Statements

    def block(self, statements):
        for statement in statements:
            if self.builder.block.is_terminated:
                return
            try:
                getattr(self, f"emit_{type(statement).__name__}", self.unknown)(statement)
            except TypeError as error:
                if error.args[0].startswith("cannot emit"):
                    raise
                raise TypeError(f"cannot emit {self.source.name}, line {statement.lineno}: {error}") from error

    def unknown(self, node):
        raise TypeError(f"{type(node).__name__} is not understood")

    def emit_Expr(self, node):
        if not isinstance(node.value, ast.Constant):
            self.value(node.value)

    def emit_Pass(self, node):
        pass

    def emit_Assign(self, node):
        target = node.targets[0]
        if len(node.targets) > 1:
            value = self.value(node.value)
            for target in node.targets:
                self.assign(target, value)
            return
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            # all values before the first assignment
            values = [self.value(part) for part in node.value.elts]
        elif isinstance(target, ast.Tuple):
            values = self.a.unpacked(self.value(node.value))
        else:
            self.assign(target, self.value(node.value))
            return
        for part, value in zip(target.elts, values, strict=True):
            self.assign(part, value)

    def emit_AugAssign(self, node):
        old = ast.copy_location(type(node.target)(**{**vars(node.target), "ctx": ast.Load()}), node)
        self.assign(node.target, self.a.binary(type(node.op), self.value(old), self.value(node.value)))

    def assign(self, target, value):
        if isinstance(target, ast.Subscript):
            self.a.store(self.value(target.value), self.indices(target.slice), value)
        elif target.id not in self.assigned_once:
            value = self.a.as_value(value)
            whole = isinstance(value.kind, types.Integer)
            self.set(target.id, self.a.cast(value, types.int64) if whole else value, own=True)
        elif isinstance(value, Value):
            self.set(target.id, value, own=True)
        else:
            self.names[target.id] = value

    def set(self, name, value: Value, own=False):
        known = self.names.get(name)
        if known is None:
            known = _Variable(value.kind, cgutils.alloca_once(self.builder, value.value.type, zfill=value.made))
            self.names[name] = known
            if value.made and own:
                self.owned.append(known)
        elif value.made:
            raise TypeError(f"{name} is another array already")
        if value.made and own and self.loops:
            raise TypeError(f"{name} is an array made in a loop, which would be let go once only")
        self.builder.store(self.a.kept(value, known.kind).value, known.place)

    def emit_If(self, node):
        condition = self.value(node.test)
        if not isinstance(condition, Value):
            self.block(node.body if condition else node.orelse)
            return
        builder = self.builder
        then, otherwise = builder.append_basic_block("then"), builder.append_basic_block("else")
        after = builder.append_basic_block("after") if node.orelse else otherwise
        builder.cbranch(self.a.truth(condition), then, otherwise)
        branches = [(then, node.body), *([(otherwise, node.orelse)] if node.orelse else [])]
        for block, body in branches:
            builder.position_at_end(block)
            self.block(body)
            if not builder.block.is_terminated:
                builder.branch(after)
        builder.position_at_end(after)

    def emit_While(self, node):
        self.loop(lambda: self.a.truth(self.a.as_value(self.value(node.test))), node, lambda: None)

    def emit_For(self, node):
        if not (isinstance(node.iter, ast.Call) and self.value(node.iter.func) is range):
            raise TypeError("a loop over anything but range is not understood")
        bounds = [self.value(part) for part in node.iter.args]
        step = bounds[2] if len(bounds) > 2 else 1
        start, end = (0, bounds[0]) if len(bounds) == 1 else bounds[:2]
        end = self.a.whole(end)
        builder, counter = self.builder, cgutils.alloca_once(self.builder, ir.IntType(64))
        builder.store(self.a.whole(start), counter)
        sign = ">" if isinstance(step, int) and step < 0 else "<"
        step = self.a.whole(step)

        def goes_on():
            now = builder.load(counter)
            return builder.icmp_signed(sign, now, end)

        def advance():
            builder.store(builder.add(builder.load(counter), step, flags=["nsw"]), counter)

        self.loop(goes_on, node, advance, lambda: self.set(node.target.id, Value(types.int64, builder.load(counter))))

    def loop(self, goes_on, node, advance, begin=lambda: None):
        builder = self.builder
        top, body, further, after = map(builder.append_basic_block, ("loop", "body", "next", "after"))
        builder.branch(top)
        builder.position_at_end(top)
        builder.cbranch(goes_on(), body, after)
        builder.position_at_end(body)
        begin()
        self.loops.append((further, after))
        self.block(node.body)
        self.loops.pop()
        if not builder.block.is_terminated:
            builder.branch(further)
        builder.position_at_end(further)
        advance()
        builder.branch(top)
        builder.position_at_end(after)

    def emit_Continue(self, node):
        self.builder.branch(self.loops[-1][0])

    def emit_Break(self, node):
        self.builder.branch(self.loops[-1][1])

    def emit_Return(self, node):
        if node.value is not None:
            value = self.a.as_value(self.value(node.value))
            if value.kind == types.boolean:  # which Numba passes on otherwise than it keeps it
                value = self.a.cast(value, types.int64)
            if isinstance(node.value, ast.Name):
                self.owned = [array for array in self.owned if array is not self.names.get(node.value.id)]
            if self.returned == types.none:
                self.returned = value.kind
            if self.source.result(self.typing, self.kinds) != types.none:
                self.builder.store(self.a.kept(value, self.returned).value, self.where)
        self.builder.branch(self.end)

    # Expressions: a Value, or what is known already

    def value(self, node):
        return getattr(self, f"value_{type(node).__name__}", self.unknown)(node)

    def value_Constant(self, node):
        return node.value

    def value_Name(self, node):
        if node.id in self.names:
            known = self.names[node.id]
            return Value(known.kind, self.builder.load(known.place)) if isinstance(known, _Variable) else known
        if node.id not in self.source.constants:
            raise TypeError(f"{node.id} is not known here")
        return self.source.constants[node.id]

    def value_Tuple(self, node):
        return tuple(self.value(part) for part in node.elts)

    def value_Attribute(self, node):
        return self.a.attribute(self.value(node.value), node.attr)

    def indices(self, node):
        if isinstance(node, ast.Slice):
            return slice(*(None if part is None else self.value(part) for part in (node.lower, node.upper, node.step)))
        return tuple(map(self.value, node.elts)) if isinstance(node, ast.Tuple) else (self.value(node),)

    def value_Subscript(self, node):
        return self.a.load(self.value(node.value), self.indices(node.slice))

    def value_BinOp(self, node):
        return self.a.binary(type(node.op), self.value(node.left), self.value(node.right))

    def value_UnaryOp(self, node):
        return self.a.unary(type(node.op), self.value(node.operand))

    def value_Compare(self, node):
        values = [self.value(part) for part in (node.left, *node.comparators)]
        result = True
        for operation, left, right in zip(node.ops, values, values[1:], strict=False):
            result = self.a.both(result, self.a.compare(type(operation), left, right))
        return result

    def value_BoolOp(self, node):
        stop = isinstance(node.op, ast.Or)
        first, rest = node.values[0], node.values[1:]
        if rest[1:]:
            rest = [ast.BoolOp(node.op, rest)]
        condition = self.value(first)
        if not isinstance(condition, Value):
            return condition if bool(condition) == stop else self.value(rest[0])
        condition = Value(types.boolean, self.a.truth(condition))
        (other,) = rest
        return self.choose(condition, (lambda: True), other) if stop else self.choose(condition, other, lambda: False)

    def value_IfExp(self, node):
        condition = self.value(node.test)
        if not isinstance(condition, Value):
            return self.value(node.body if condition else node.orelse)
        return self.choose(condition, node.body, node.orelse)

    def choose(self, condition, first, second):
        """One of two expressions, of which only that one is computed."""
        builder, results = self.builder, []
        blocks = [builder.append_basic_block("one"), builder.append_basic_block("other")]
        builder.cbranch(self.a.truth(condition), *blocks)
        after = builder.append_basic_block("chosen")
        for block, expression in zip(blocks, (first, second), strict=True):
            builder.position_at_end(block)
            value = expression() if callable(expression) else self.value(expression)
            results.append([self.a.as_value(value), builder.block])
            if results[-1][0].made:
                raise TypeError("an array that is made here needs a name")
        kind = self.a.common(*(value.kind for value, _ in results))
        incoming = []
        for value, block in results:
            builder.position_at_end(block)
            incoming.append((self.a.cast(value, kind).value, builder.block))
            builder.branch(after)
        builder.position_at_end(after)
        result = builder.phi(incoming[0][0].type)
        for value, block in incoming:
            result.add_incoming(value, block)
        return Value(kind, result)

    def value_Call(self, node):
        called = self.value(node.func)
        arguments = [self.value(part) for part in node.args]
        if any(isinstance(argument, Value) and argument.made for argument in arguments):
            raise TypeError("an array that is made here needs a name")
        source = getattr(called, "emitted", None)
        if source is not None:
            return source.call(self.typing, self.a, [self.a.as_value(value) for value in arguments])
        return self.a.call(self.typing, called, arguments)
