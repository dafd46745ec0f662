"""From the syntax of one emitted function to LLVM's code: its statements and expressions (emitted.py)."""

import ast
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from tilewise.kernels.cpu.emitted_values import Arithmetic, Value


@dataclass(frozen=True)
class _Variable:
    kind: types.Type
    place: Any


class Emission:
    """One function being emitted: statement after statement at the builder's position."""

    def __init__(self, source, typing, context, function, kinds):
        self.source, self.typing, self.function = source, typing, function
        self.builder: Any = ir.IRBuilder(function.append_basic_block("entry"))
        context.call_conv.init_call_helper(self.builder)
        self.a = Arithmetic(context, self.builder)
        self.names: dict[str, Any] = {}  # variables, and constants
        self.loops: list[tuple] = []  # (where `continue` goes, where `break` goes)
        self.owned: list[_Variable] = []
        self.handed_on = self.returns_truth = False
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
            if self.returned != types.none:
                raise TypeError(f"{self.source.name} returns something, but not at its end")
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
            except (TypeError, AttributeError, KeyError) as error:
                if str(error).startswith("cannot emit"):
                    raise
                raise TypeError(f"cannot emit {self.source.name}, line {statement.lineno}: {error}") from error

    def unknown(self, node):
        raise TypeError(f"{type(node).__name__} is not understood")

    def emit_Expr(self, node):
        if isinstance(node.value, ast.Constant):
            return
        value = self.value(node.value)
        if isinstance(value, Value) and value.made:
            raise TypeError("an array that is made here needs a name")

    def emit_Pass(self, node):
        pass

    def emit_Assign(self, node):
        target = node.targets[0]
        if len(node.targets) > 1:
            value = self.value(node.value)
            if isinstance(value, Value) and value.made:
                raise TypeError("an array that is made here needs one name")
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
        elif value.made or known in self.owned:
            raise TypeError(f"{name} is another array already")
        if value.made and own and self.loops:
            raise TypeError(f"{name} is an array made in a loop, which would be let go once only")
        self.builder.store(self.a.kept(value, known.kind).value, known.place)

    def emit_If(self, node):
        condition = self.condition(node.test)
        if not isinstance(condition, Value):
            self.block(node.body if condition else node.orelse)
            return
        builder = self.builder
        then, otherwise = builder.append_basic_block("then"), builder.append_basic_block("else")
        after = builder.append_basic_block("after") if node.orelse else otherwise
        builder.cbranch(self.a.truth(condition), then, otherwise)
        branches = [(then, node.body), *([(otherwise, node.orelse)] if node.orelse else [])]
        reached = not node.orelse
        for block, body in branches:
            builder.position_at_end(block)
            self.block(body)
            if not builder.block.is_terminated:
                builder.branch(after)
                reached = True
        builder.position_at_end(after)
        if not reached:
            builder.unreachable()

    def emit_While(self, node):
        self.loop(lambda: self.a.truth(self.a.as_value(self.condition(node.test))), node, lambda: None)

    def emit_For(self, node):
        if not (isinstance(node.iter, ast.Call) and self.value(node.iter.func) is range):
            raise TypeError("a loop over anything but range is not understood")
        bounds = [self.value(part) for part in node.iter.args]
        step = bounds[2] if len(bounds) > 2 else 1
        start, end = (0, bounds[0]) if len(bounds) == 1 else bounds[:2]
        end = self.a.whole(end)
        builder, counter = self.builder, cgutils.alloca_once(self.builder, ir.IntType(64))
        builder.store(self.a.whole(start), counter)
        sign = ">" if isinstance(step, Integral) and step < 0 else "<"
        step = self.a.whole(step)

        def goes_on():
            now = builder.load(counter)
            return builder.icmp_signed(sign, now, end)

        def advance():
            builder.store(builder.add(builder.load(counter), step, flags=["nsw"]), counter)

        self.loop(goes_on, node, advance, lambda: self.set(node.target.id, Value(types.int64, builder.load(counter))))

    def loop(self, goes_on, node, advance, begin=lambda: None):
        if node.orelse:
            raise TypeError("else of a loop is not understood")
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
        if node.value is None and self.returned != types.none:
            raise TypeError("what returns something does so everywhere")
        if node.value is not None:
            value = self.a.as_value(self.value(node.value))
            truth = value.kind == types.boolean
            if self.returned != types.none and truth != self.returns_truth:
                raise TypeError("a bool is returned, and an integer elsewhere")
            self.returns_truth = truth
            if truth:  # Numba passes it on otherwise than it keeps it
                value = self.a.cast(value, types.int64)
            if isinstance(value.kind, (types.Array, types.BaseTuple)):
                self.hand_on(node.value, value)
            if self.returned == types.none:
                self.returned = value.kind
            if self.source.result(self.typing, self.kinds) != types.none:
                self.builder.store(self.a.kept(value, self.returned).value, self.where)
        self.builder.branch(self.end)

    def hand_on(self, node, value: Value):
        """An array goes to the caller if it was made here, and no other may."""
        if isinstance(value.kind, types.BaseTuple):
            if any(isinstance(part.kind, types.Array) for part in self.a.unpacked(value)):
                raise TypeError("arrays in a tuple are not returned")
            return
        known = self.names.get(node.id) if isinstance(node, ast.Name) else None
        if self.handed_on or not (value.made or known in self.owned):
            raise TypeError("one array is returned, that was made here, in one place")
        self.handed_on = True
        self.owned = [array for array in self.owned if array is not known]

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
        return self.compared(self.value(node.left), list(zip(node.ops, node.comparators, strict=True)))

    def compared(self, left, rest):
        """left, and the operators and operands that follow it."""
        (operation, node), *rest = rest
        right = self.value(node)
        result = self.a.compare(type(operation), left, right)
        if not rest:
            return result
        if not isinstance(result, Value):
            return self.compared(right, rest) if result else False
        return self.choose(result, lambda: self.compared(right, rest), lambda: False)

    def condition(self, node):
        """An expression of which only the truth matters."""
        if isinstance(node, ast.BoolOp):
            return self.junction(node, lambda operand: self.truth(self.condition(operand)))
        return self.value(node)

    def value_BoolOp(self, node):
        return self.junction(node, self.boolean)

    def truth(self, value):
        return Value(types.boolean, self.a.truth(value)) if isinstance(value, Value) else bool(value)

    def boolean(self, node):
        value = self.value(node)
        if not isinstance(value, bool) and self.a.as_value(value).kind != types.boolean:
            raise TypeError("`and` and `or` of what is no bool is not understood, but as a condition")
        return value

    def junction(self, node, operand):
        first, *others = node.values
        rest = others[0] if len(others) == 1 else ast.BoolOp(node.op, others)
        stop, condition = isinstance(node.op, ast.Or), operand(first)
        if not isinstance(condition, Value):
            return condition if condition == stop else operand(rest)
        branches = (lambda: operand(rest)), (lambda: stop)
        return self.choose(condition, *(reversed(branches) if stop else branches))

    def value_IfExp(self, node):
        condition = self.condition(node.test)
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
            value = self.value(expression) if isinstance(expression, ast.AST) else expression()
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
        if node.keywords:
            raise TypeError("arguments by name are not understood")
        called = self.value(node.func)
        arguments = [self.value(part) for part in node.args]
        if any(isinstance(argument, Value) and argument.made for argument in arguments):
            raise TypeError("an array that is made here needs a name")
        source = getattr(called, "emitted", None)
        if source is not None:
            return source.call(self.typing, self.a, [self.a.as_value(value) for value in arguments])
        return self.a.call(self.typing, called, arguments)
