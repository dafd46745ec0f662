"""What emitted functions compute with: values of a known kind at a builder's position, and operations on them."""

import ast
import operator
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from llvmlite import ir
from numba import from_dtype, types
from numba.core import cgutils
from numba.core.datamodel import default_manager
from numba.core.dispatcher import Dispatcher
from numba.np.arrayobj import populate_array

_I64 = ir.IntType(64)
# Where Numba keeps what in an array's structure.
_ARRAY: Any = default_manager.lookup(types.Array(types.float32, 1, "C"))
_COUNT, _DATA, _SHAPE = map(_ARRAY.get_field_position, ("nitems", "data", "shape"))

_ON_CONSTANTS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.Div: operator.truediv, ast.LShift: operator.lshift, ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.Pow: operator.pow,
}  # fmt: skip
_ON_INTEGERS = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.LShift: "shl", ast.RShift: "ashr",
    ast.BitAnd: "and_", ast.BitOr: "or_",
}  # fmt: skip
_ON_FLOATS = {ast.Add: "fadd", ast.Sub: "fsub", ast.Mult: "fmul", ast.Div: "fdiv"}
_COMPARISONS = {
    ast.Lt: ("<", operator.lt), ast.LtE: ("<=", operator.le), ast.Gt: (">", operator.gt),
    ast.GtE: (">=", operator.ge), ast.Eq: ("==", operator.eq), ast.NotEq: ("!=", operator.ne),
}  # fmt: skip


@dataclass(frozen=True)
class Value:
    """made: an array that the function has just made, and is to let go at its end."""

    kind: Any
    value: Any
    made: bool = False


class Arithmetic:
    """Operations on values; those on constants alone are done at once."""

    def __init__(self, context, builder):
        self.context, self.builder = context, builder
        self.may_fail = False

    # Arguments: an array travels as its address, element count and lengths

    @staticmethod
    def parts_of(context, kind) -> list:
        if not isinstance(kind, types.Array):
            return [context.get_value_type(kind)]
        if kind.layout != "C":
            raise TypeError(f"{kind} is not contiguous")
        return [context.get_value_type(kind.dtype).as_pointer(), _I64, *[_I64] * kind.ndim]

    def parts(self, value: Value) -> list:
        if not isinstance(value.kind, types.Array):
            return [value.value]
        shape = [self._field(value, _SHAPE, i) for i in range(value.kind.ndim)]
        return [self._field(value, _DATA), self._field(value, _COUNT), *shape]

    def _field(self, array: Value, *where):
        return self.builder.extract_value(array.value, where)

    def from_parts(self, kind, parts: list) -> Value:
        """Takes them from the list's front."""
        if not isinstance(kind, types.Array):
            return Value(kind, parts.pop(0))
        data, _, *shape = (parts.pop(0) for _ in range(2 + kind.ndim))
        return self._array(kind, data, shape)

    def _array(self, kind, data, shape) -> Value:
        itemsize = kind.dtype.bitwidth // 8
        strides = [_I64(itemsize)]
        for length in reversed(shape[1:]):
            strides.insert(0, self.builder.mul(strides[0], length))
        array = self.context.make_array(kind)(self.context, self.builder)
        populate_array(
            array, data, cgutils.pack_array(self.builder, shape), cgutils.pack_array(self.builder, strides), itemsize,
            None,
        )  # fmt: skip
        return Value(kind, array._getvalue())

    # Kinds

    def as_value(self, value) -> Value:
        if isinstance(value, Value):
            return value
        if isinstance(value, tuple):
            values = [self.as_value(part) for part in value]
            kind = types.Tuple([part.kind for part in values])
            return Value(kind, self.context.make_tuple(self.builder, kind, [part.value for part in values]))
        if isinstance(value, bool):
            return Value(types.boolean, ir.IntType(1)(int(value)))
        if isinstance(value, Integral):
            return Value(types.int64, _I64(int(value)))
        if isinstance(value, np.float32):  # pyright: ignore
            return Value(types.float32, ir.FloatType()(float(value)))
        if isinstance(value, float):
            return Value(types.float64, ir.DoubleType()(value))
        raise TypeError(f"{value!r} has no value in a kernel")

    def unpacked(self, value):
        if not isinstance(value, Value):
            return list(value)
        return [Value(kind, self.builder.extract_value(value.value, i)) for i, kind in enumerate(value.kind.types)]

    def common(self, first, second):
        if first == second:
            return first
        kinds = {first, second}
        if all(isinstance(kind, (types.Integer, types.Boolean)) for kind in kinds):
            return types.int64
        if all(isinstance(kind, (types.Integer, types.Boolean, types.Float)) for kind in kinds):
            return types.float64
        raise TypeError(f"{first} and {second} have nothing in common")

    def cast(self, value: Value, kind) -> Value:
        if value.kind == kind or isinstance(kind, types.Literal):
            return value
        builder, target = self.builder, self.context.get_value_type(kind)
        was, now = value.kind, value.value
        is_whole = isinstance(was, (types.Integer, types.Boolean))
        if isinstance(kind, types.Boolean) and is_whole:
            now = builder.icmp_signed("!=", now, now.type(0))
        elif isinstance(kind, types.Integer) and is_whole:
            if target.width < now.type.width:
                now = builder.trunc(now, target)
            elif target.width > now.type.width:
                signed = isinstance(was, types.Integer) and was.signed  # pyright: ignore
                now = builder.sext(now, target) if signed else builder.zext(now, target)
        elif isinstance(kind, types.Float) and isinstance(was, types.Boolean):
            now = builder.uitofp(now, target)
        elif isinstance(kind, types.Float) and is_whole:
            now = builder.sitofp(now, target)
        elif isinstance(kind, types.Float) and isinstance(was, types.Float):
            now = builder.fpext(now, target) if kind == types.float64 else builder.fptrunc(now, target)
        elif isinstance(kind, types.Integer) and isinstance(was, types.Float):
            now = builder.fptosi(now, target)
        elif now is None or now.type != target:
            raise TypeError(f"{was} is no {kind}")
        return Value(kind, now)

    def whole(self, value):
        """An integer as int64: bounds, indices, and what is compared with them."""
        value = self.as_value(value)
        if not isinstance(value.kind, (types.Integer, types.Boolean)):
            raise TypeError(f"{value.kind} is no integer")
        return self.cast(value, types.int64).value

    def kept(self, value: Value, kind) -> Value:
        """For a variable of this kind: nothing is rounded or cut off on the way."""
        if value.kind != kind and not (isinstance(value.kind, types.Boolean) and kind == types.int64):
            raise TypeError(f"{value.kind} is no {kind}, which the variable was before")
        return self.cast(value, kind)

    def given(self, value: Value, kind) -> Value:
        """As an argument: no float is cut off or rounded."""
        to_integer = isinstance(kind, types.Integer)
        if isinstance(value.kind, types.Float) and (to_integer or (value.kind, kind) == (types.float64, types.float32)):
            raise TypeError(f"{value.kind} is no {kind}")
        return self.cast(value, kind)

    def truth(self, value: Value):
        return self.cast(value, types.boolean).value

    # Arithmetic

    def binary(self, operation, left, right):
        if not (isinstance(left, Value) or isinstance(right, Value)):
            return _ON_CONSTANTS[operation](left, right)
        constant = right if isinstance(right, int) else None
        left, right = self.as_value(left), self.as_value(right)
        kind = self.common(left.kind, right.kind)
        if operation is ast.Div and not isinstance(kind, types.Float):
            kind = types.float64
        if isinstance(kind, types.Integer) or (kind == types.boolean and operation not in (ast.BitAnd, ast.BitOr)):
            kind = types.int64
        a, b = self.cast(left, kind).value, self.cast(right, kind).value
        if isinstance(kind, types.Float):
            if operation not in _ON_FLOATS:
                raise TypeError(f"{operation.__name__} of floats is not understood")
            return Value(kind, getattr(self.builder, _ON_FLOATS[operation])(a, b))
        if operation in (ast.FloorDiv, ast.Mod):
            return Value(kind, self._divided(operation, a, b, constant))
        if operation not in _ON_INTEGERS:
            raise TypeError(f"{operation.__name__} of integers is not understood")
        return Value(kind, getattr(self.builder, _ON_INTEGERS[operation])(a, b))

    def _divided(self, operation, a, b, constant):
        """Rounded down, as in Python."""
        builder, zero = self.builder, _I64(0)
        if constant is not None and constant > 0 and constant & (constant - 1) == 0:
            if operation is ast.Mod:
                return builder.and_(a, _I64(constant - 1))
            return builder.ashr(a, _I64(constant.bit_length() - 1))
        rest = builder.srem(a, b)
        differ = builder.icmp_signed("<", builder.xor(rest, b), zero)
        below = builder.and_(builder.icmp_signed("!=", rest, zero), differ)
        if operation is ast.Mod:
            return builder.add(rest, builder.select(below, b, zero))
        return builder.sub(builder.sdiv(a, b), builder.zext(below, _I64))

    def unary(self, operation, value):
        if not isinstance(value, Value):
            return {ast.USub: operator.neg, ast.Not: operator.not_, ast.UAdd: operator.pos}[operation](value)
        if operation is ast.Not:
            return Value(types.boolean, self.builder.not_(self.truth(value)))
        if operation is ast.USub and isinstance(value.kind, types.Float):
            return Value(value.kind, self.builder.fneg(value.value))
        if operation is ast.USub:
            return self.binary(ast.Sub, 0, value)
        raise TypeError(f"{operation.__name__} is not understood")

    def compare(self, operation, left, right):
        sign, on_constants = _COMPARISONS[operation]
        if not (isinstance(left, Value) or isinstance(right, Value)):
            return on_constants(left, right)
        left, right = self.as_value(left), self.as_value(right)
        kind = self.common(left.kind, right.kind)
        kind = kind if isinstance(kind, types.Float) else types.int64
        a, b = self.cast(left, kind).value, self.cast(right, kind).value
        if not isinstance(kind, types.Float):
            return Value(types.boolean, self.builder.icmp_signed(sign, a, b))
        ordered = self.builder.fcmp_unordered if sign == "!=" else self.builder.fcmp_ordered
        return Value(types.boolean, ordered(sign, a, b))

    # Arrays and pointers

    def attribute(self, value, name):
        if isinstance(value, types.Type) and name == "type":
            return value
        if not isinstance(value, Value):
            return getattr(value, name)
        if isinstance(value.kind, types.Array) and name == "dtype":
            return value.kind.dtype
        if isinstance(value.kind, types.Array) and name == "itemsize":
            return value.kind.dtype.bitwidth // 8
        if isinstance(value.kind, types.Array) and name == "size":
            return Value(types.int64, self._field(value, _COUNT))
        if isinstance(value.kind, types.Array) and name == "shape":
            return tuple(Value(types.int64, self._field(value, _SHAPE, i)) for i in range(value.kind.ndim))
        raise TypeError(f"{name} of {value.kind} is not understood")

    def _place(self, array: Value, indices: tuple):
        if any(isinstance(index, int) and index < 0 for index in indices):
            raise TypeError("negative indices are not understood")
        numbers = [self.whole(index) for index in indices]
        if isinstance(array.kind, types.CPointer) and len(numbers) == 1:
            return self.builder.gep(array.value, numbers)
        if not isinstance(array.kind, types.Array) or array.kind.ndim != len(numbers):
            raise TypeError(f"{len(numbers)} indices of {array.kind} are not understood")
        flat = numbers[0]
        for i, number in enumerate(numbers[1:], 1):
            flat = self.builder.add(self.builder.mul(flat, self._field(array, _SHAPE, i)), number)
        return self.builder.gep(self._field(array, _DATA), [flat])

    def load(self, array, indices):
        if isinstance(indices, slice):
            return self._slice(array, indices)
        if isinstance(array, (tuple, list)):
            return array[indices[0]]
        if isinstance(array.kind, types.BaseTuple):
            return self.unpacked(array)[indices[0]]
        self._refuse_bools(array)
        return Value(array.kind.dtype, self.builder.load(self._place(array, indices)))

    def _refuse_bools(self, array: Value):
        if isinstance(array.kind.dtype, types.Boolean):
            raise TypeError("arrays of bool are not understood")

    def store(self, array, indices, value):
        self._refuse_bools(array)
        if isinstance(array.kind, types.Array) and not array.kind.mutable:
            raise TypeError("the array is read-only")
        self.builder.store(self.cast(self.as_value(value), array.kind.dtype).value, self._place(array, indices))

    def _slice(self, array: Value, part: slice) -> Value:
        if part.step is not None or array.kind.ndim != 1:
            raise TypeError("only start and end of a vector's part are understood")
        start = _I64(0) if part.start is None else self.whole(part.start)
        end = self._field(array, _COUNT) if part.stop is None else self.whole(part.stop)
        data = self.builder.gep(self._field(array, _DATA), [start])
        return self._array(array.kind, data, [self.builder.sub(end, start)])

    # Calls

    def call(self, typing, called, arguments: list):
        if called in (min, max):
            return self._extreme("<" if called is min else ">", arguments)
        if called in (int, float, bool) or (isinstance(called, type) and issubclass(called, np.generic)):
            kind = from_dtype(np.dtype(called))
            if not isinstance(arguments[0], Value):
                return called(arguments[0])
            return self.cast(arguments[0], kind)
        if isinstance(called, types.Type):
            return self.cast(self.as_value(arguments[0]), called)
        if isinstance(called, Dispatcher):
            return self._device_function(typing, called, [self.as_value(argument) for argument in arguments])
        if not hasattr(called, "_defn"):
            raise TypeError(f"a call of {called!r} is not understood")
        return self._intrinsic(typing, called, arguments)

    def _extreme(self, sign, arguments):
        """min or max, of integers."""
        if not any(isinstance(argument, Value) for argument in arguments):
            return min(arguments) if sign == "<" else max(arguments)
        result, *others = map(self.whole, arguments)
        for other in others:
            result = self.builder.select(self.builder.icmp_signed(sign, other, result), other, result)
        return Value(types.int64, result)

    def _device_function(self, typing, called, values):
        kind = typing.resolve_value_type(called)
        signature = kind.get_call_type(typing, tuple(value.kind for value in values), {})
        values = [self.given(value, kind).value for value, kind in zip(values, signature.args, strict=True)]
        self.may_fail = True
        result = self.context.get_function(kind, signature)(self.builder, values)
        kind = signature.return_type
        return Value(kind, None if kind == types.none else result)

    def _intrinsic(self, typing, called, arguments):
        constants = [isinstance(argument, (int, np.integer)) for argument in arguments]
        values = [self.as_value(argument) for argument in arguments]
        kinds = [
            types.literal(int(argument)) if constant and called._prefer_literal else value.kind
            for argument, value, constant in zip(arguments, values, constants, strict=True)
        ]
        signature, generate = called._defn(typing, *kinds)
        values = [self.given(value, kind).value for value, kind in zip(values, signature.args, strict=True)]
        result = generate(self.context, self.builder, signature, values)
        kind = signature.return_type
        if isinstance(kind, types.Array):
            self.may_fail = True
            return Value(kind, result, made=True)
        if kind in (types.none, types.void):
            return Value(types.none, None)
        if isinstance(kind, types.Integer) and isinstance(result, ir.Constant):
            return int(result.constant)
        return Value(kind, result)
