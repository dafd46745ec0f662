"""The arguments of a call inside @njit: checks of their types, and their forms at run time."""

from typing import Any

from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

FLOATS = types.float32, types.float64


class WrongShape(ValueError):
    """A wrong call, found at run time: the numbers are put into the message by Python, when it gets the error.

    Machine code that makes texts of numbers takes seconds to compile.
    """

    def __init__(self, message: str, *numbers):
        super().__init__(message.format(*numbers))


def is_absent(kind) -> bool:
    return kind is None or isinstance(kind, types.NoneType) or getattr(kind, "value", kind) is None


def check_arrays(function: str, dimensions: dict[str, tuple[int, ...]] | None = None, **operands) -> Any:
    """The one dtype of the operands, all of them arrays, or None if their name ends in an underscore.

    dimensions: how many an operand may have, where not any number.
    """
    first, dtype = "", None
    for key, kind in operands.items():
        name, optional = key.rstrip("_"), key.endswith("_")
        if optional and is_absent(kind):
            continue
        if isinstance(kind, types.Optional):
            raise TypingError(f"{function}: {name} must be either an array or None for Numba to know which, got {kind}")
        if not isinstance(kind, types.Array):
            raise TypingError(f"{function}: {name} must be an array, got {kind}")
        if kind.dtype not in FLOATS:
            raise TypingError(f"{function}: inside @njit, {name} must be float32 or float64, got {kind.dtype}")
        if dtype is not None and kind.dtype != dtype:
            raise TypingError(f"{function}: {name} is {kind.dtype} but {first} is {dtype}; the dtypes must match")
        allowed = (dimensions or {}).get(name)
        if allowed and kind.ndim not in allowed:
            text = " or ".join(map(str, allowed))
            raise TypingError(f"{function}: {name} must have {text} dimensions, got {kind.ndim}")
        if dtype is None:
            first, dtype = name, kind.dtype
    return dtype


def literal(function: str, name: str, kind, *choices) -> Any:
    """The value of an option that decides what is compiled: one of `choices`, written in the call as it is."""
    value = kind
    if isinstance(kind, types.Omitted):
        value = kind.value
    elif isinstance(kind, types.NoneType):
        value = None
    elif isinstance(kind, types.Literal):
        value = kind.literal_value
    elif isinstance(kind, types.Type):
        text = ", ".join(map(repr, choices))
        raise TypingError(f"{function}: inside @njit, {name} must be written in the call, as one of {text}; got {kind}")
    if not any(value is choice or (value == choice and type(value) is type(choice)) for choice in choices):
        raise TypingError(f"{function}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_unsupported(function: str, **options):
    """Refuse what is only there for calls from Python: each of the options must be absent."""
    for name, kind in options.items():
        if not is_absent(kind):
            raise TypingError(f"{function}: {name} is not supported inside @njit; leave it out, or call it from Python")


def _is_integer(kind) -> bool:
    if isinstance(kind, types.Omitted):
        kind = kind.value
    if isinstance(kind, types.Type):
        return isinstance(types.unliteral(kind), types.Integer)
    return isinstance(kind, int) and not isinstance(kind, bool)


def _parts(kind: Any) -> tuple:
    """The types of a tuple's elements."""
    return kind.types


def _is_pair(kind) -> bool:
    return isinstance(kind, types.BaseTuple) and len(kind) == 2 and all(map(_is_integer, _parts(kind)))


def check_integer(function: str, **options):
    for name, kind in options.items():
        if not _is_integer(kind):
            raise TypingError(f"{function}: {name} must be an int, got {kind}")


def check_pairs(function: str, **options):
    for name, kind in options.items():
        if not (_is_integer(kind) or _is_pair(kind)):
            raise TypingError(f"{function}: {name} must be an int or a pair (height, width), got {kind}")


PADDING_NAMES = "valid", "same", "same_lower"  # their places, from 1 on, are how settled_padding knows them


def check_padding(function: str, kind, named: bool = False) -> int:
    """0 for a padding in numbers, else which of PADDING_NAMES it is, where those are allowed."""
    if named and isinstance(kind, types.StringLiteral | types.UnicodeType | str):
        return PADDING_NAMES.index(literal(function, "padding", kind, *PADDING_NAMES)) + 1
    two = isinstance(kind, types.BaseTuple) and len(kind) == 2 and all(map(_is_pair, _parts(kind)))
    if not (two or _is_integer(kind) or _is_pair(kind)):
        raise TypingError(
            f"{function}: padding must be an int, a pair (height, width) or ((top, bottom), (left, right)), got {kind}"
        )
    return 0


def check_number(function: str, **options):
    for name, kind in options.items():
        if isinstance(kind, types.Omitted):
            kind = kind.value
        number = isinstance(types.unliteral(kind), types.Number) if isinstance(kind, types.Type) else True
        if not number or isinstance(types.unliteral(kind) if isinstance(kind, types.Type) else kind, types.Complex):
            raise TypingError(f"{function}: {name} must be a number, got {kind}")


def _integers(context, builder, kind, value) -> list:
    """The int64 values of an int, or of all ints in a tuple, however nested."""
    if isinstance(kind, types.BaseTuple):
        parts = zip(_parts(kind), cgutils.unpack_tuple(builder, value), strict=True)
        return [number for part, inner in parts for number in _integers(context, builder, part, inner)]
    return [context.cast(builder, value, kind, types.int64)]


@intrinsic
def as_pair(typing_context, value):
    """(height, width) from an int or a pair."""

    def generate(context, builder, signature, values):
        numbers = _integers(context, builder, signature.args[0], values[0])
        return cgutils.pack_array(builder, numbers * (2 // len(numbers)))

    return types.UniTuple(types.int64, 2)(value), generate


@intrinsic
def pair_or(typing_context, value, otherwise):
    """As `as_pair`, from the second value where the first is None."""
    place = 1 if is_absent(value) else 0

    def generate(context, builder, signature, values):
        numbers = _integers(context, builder, signature.args[place], values[place])
        return cgutils.pack_array(builder, numbers * (2 // len(numbers)))

    return types.UniTuple(types.int64, 2)(value, otherwise), generate


@intrinsic
def as_padding(typing_context, value):
    """((top, bottom), (left, right)) from any of padding's forms; 0 for a name."""
    kind = types.UniTuple(types.UniTuple(types.int64, 2), 2)

    def generate(context, builder, signature, values):
        given = signature.args[0]
        if isinstance(given, types.StringLiteral | types.UnicodeType):
            numbers = [context.get_constant(types.int64, 0)]
        else:
            numbers = _integers(context, builder, given, values[0])
        if len(numbers) < 4:
            numbers = [number for number in numbers for _ in range(4 // len(numbers))]
        pairs = [cgutils.pack_array(builder, numbers[:2]), cgutils.pack_array(builder, numbers[2:])]
        return cgutils.pack_array(builder, pairs)

    return kind(value), generate
