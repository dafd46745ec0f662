"""Pairs, padding forms, output sizes and their error messages: one copy for all op families.

Everything is computed on plain integers, before anything is allocated or compiled.
"""

from collections.abc import Sequence, Set
from math import isfinite
from numbers import Real
from operator import index

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]  # ((top, bottom), (left, right))


def integer(function: str, name: str, value, minimum: int = 1) -> int:
    """`value` as an int of at least `minimum` (NumPy integers are welcome, floats and bools are not)."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = index(value)
    except TypeError:
        raise TypeError(f"{function}: {name} must be an int, got {value!r}") from None
    if number < minimum:
        raise ValueError(f"{function}: {name} must be at least {minimum}, got {number}")
    return number


def number(function: str, name: str, value, positive: bool = False) -> float:
    """`value` as a finite float of at least 0, or more than 0."""
    if isinstance(value, (str, bool)) or not hasattr(value, "__float__"):
        raise TypeError(f"{function}: {name} must be a number, got {value!r}")
    result = float(value)
    if not isfinite(result) or result < 0 or (positive and result == 0):
        kind = "positive and" if positive else "at least 0 and"
        raise ValueError(f"{function}: {name} must be {kind} finite, got {value!r}")
    return result


def probability(function: str, name: str, value) -> float:
    """`value` as a float from 0 to 1 (NumPy's numbers are welcome; arrays, even of one number, and bools are not)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{function}: {name} must be a number, got {value!r}")
    result = float(value)
    if not 0 <= result <= 1:
        raise ValueError(f"{function}: {name} must be from 0 to 1, got {value}")
    return result


def pair(function: str, name: str, value, minimum: int = 1) -> Pair:
    """An int or a pair of ints, as a pair (height, width)."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != 2:
            raise ValueError(f"{function}: {name} must be an int or a pair (height, width), got {value!r}")
        return (integer(function, name, value[0], minimum), integer(function, name, value[1], minimum))
    if isinstance(value, str):
        raise TypeError(f"{function}: {name} must be an int or a pair of ints, got {value!r}")
    number = integer(function, name, value, minimum)
    return (number, number)


def explicit_padding(function: str, value) -> Padding:
    """An int, a pair (h, w) or two pairs ((top, bottom), (left, right)), as two pairs."""
    if isinstance(value, str):
        raise ValueError(f"{function}: padding {value!r} is not known here; use an int, a pair, or two pairs")
    if isinstance(value, Sequence) and len(value) == 2 and any(isinstance(side, Sequence) for side in value):
        if not all(isinstance(side, Sequence) and len(side) == 2 for side in value):
            raise ValueError(f"{function}: padding must be ((top, bottom), (left, right)), got {value!r}")
        return (pair(function, "padding", value[0], 0), pair(function, "padding", value[1], 0))
    height, width = pair(function, "padding", value, 0)
    return ((height, height), (width, width))


def padding_pairs(function: str, value, size: Pair, kernel: Pair, stride: Pair, dilation: Pair) -> Padding:
    """Every padding form as ((top, bottom), (left, right)).

    Besides explicit numbers: "valid" is none; "same" gives ceil(size / stride) outputs with the odd row or column
    after, "same_lower" with it before (the ONNX names).
    """
    if not isinstance(value, str):
        return explicit_padding(function, value)
    if value == "valid":
        return ((0, 0), (0, 0))
    if value not in ("same", "same_lower"):
        raise ValueError(
            f'{function}: padding must be an int, a pair, two pairs, "valid", "same" or "same_lower", got {value!r}'
        )
    sides = []
    for n, k, s, d in zip(size, kernel, stride, dilation, strict=True):
        total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
        small = total // 2
        sides.append((small, total - small) if value == "same" else (total - small, small))
    return (sides[0], sides[1])


def output_size(n: int, kernel: int, stride: int, padding: Pair, dilation: int = 1, ceil_mode: bool = False) -> int:
    """N_out = floor((N + P_lo + P_hi - D (K - 1) - 1) / S) + 1; with ceil_mode the ceiling, as long as the last
    window still starts inside the input or the padding before it (PyTorch's rule)."""
    span = n + padding[0] + padding[1] - dilation * (kernel - 1) - 1
    if span < 0:
        return 0 if not ceil_mode or span + stride <= 0 else 1
    if not ceil_mode:
        return span // stride + 1
    count = -(-span // stride) + 1
    if (count - 1) * stride >= n + padding[0]:
        count -= 1
    return count


def image_shape(function: str, name: str, shape: tuple[int, ...], layout: str) -> tuple[int, int, int, int]:
    """(N, C, H, W) of a batched or unbatched image tensor in either layout; N is 1 where there is no batch axis."""
    if layout not in ("NCHW", "NHWC"):
        raise ValueError(f'{function}: layout must be "NCHW" or "NHWC", got {layout!r}')
    if len(shape) not in (3, 4):
        axes = ", ".join(layout)
        raise ValueError(
            f"{function}: {name} must have 4 dimensions ({axes}), or 3 without the batch, got shape {shape}"
        )
    n, *rest = shape if len(shape) == 4 else (1, *shape)
    c, h, w = rest if layout == "NCHW" else (rest[2], rest[0], rest[1])
    return (n, c, h, w)


def layout_shape(n: int, c: int, h: int, w: int, layout: str) -> tuple[int, int, int, int]:
    """The shape of an (n, c, h, w) tensor as it lies in memory in this layout."""
    return (n, c, h, w) if layout == "NCHW" else (n, h, w, c)


EPILOGUES = (
    None,
    "relu",
    "relu6",
    "leaky_relu",
    "sigmoid",
    "tanh",
)  # what an op can apply to its result in the same pass


def activation(function: str, value):
    """`value` if it is None or the name of an activation that linear, conv2d and batch_norm can apply."""
    if value not in EPILOGUES:
        names = ", ".join(f'"{name}"' for name in EPILOGUES if name)
        raise ValueError(f"{function}: activation must be None or one of {names}, got {value!r}")
    return value


def needs(function: str, value, names: tuple[str, ...]) -> tuple[str, ...]:
    """The gradients that a backward function is to compute, in the order of `names`."""
    if isinstance(value, str) or not isinstance(value, Sequence | Set):
        raise TypeError(f"{function}: needs must be a tuple of names out of {names}, got {value!r}")
    for name in value:
        if name not in names:
            raise ValueError(f"{function}: needs may hold {', '.join(map(repr, names))}, got {name!r}")
    return tuple(name for name in names if name in value)


def check_bias(function: str, bias, channels: int):
    """One value per output channel, or none at all."""
    if bias is not None and bias.shape != (channels,):
        raise ValueError(
            f"{function}: bias must have shape ({channels},), one value per output channel, got {bias.shape}"
        )


def outside_plane(function: str, indices, plane: Pair) -> ValueError:
    """The error for indices that are not all in their (H, W) plane."""
    h, w = plane
    return ValueError(
        f"{function}: indices must lie in 0 to {h * w - 1} (a plane of {h} x {w}), "
        f"got {indices.min()} to {indices.max()}"
    )
