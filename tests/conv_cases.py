"""The convolution problems that the tests share, around the edges of the kernels' tiles."""

from typing import NamedTuple

import numpy as np
from tolerances import assert_close

import tilewise

LAYOUTS = ("NCHW", "NHWC")
FLOATS = (np.float32, np.float64)


class Case(NamedTuple):
    """A convolution: images n x c x h x w, o filters of kernel = (height, width)."""

    n: int
    c: int
    h: int
    w: int
    o: int
    kernel: tuple[int, int] = (3, 3)
    stride: int | tuple[int, int] = 1
    padding: object = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1

    @property
    def options(self) -> dict:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    @property
    def taps(self) -> int:
        """Products in one output element."""
        return self.c // self.groups * self.kernel[0] * self.kernel[1]

    def arrays(self, rng, dtype, layout="NCHW"):
        """x, weight and bias of the standard normal distribution."""
        x = rng.standard_normal((self.n, self.c, self.h, self.w)).astype(dtype)
        weight = rng.standard_normal((self.o, self.c // self.groups, *self.kernel)).astype(dtype)
        return laid(x, layout), weight, rng.standard_normal(self.o).astype(dtype)

    def pads(self):
        """((top, bottom), (left, right)), worked out independently of shapes.py."""
        if self.padding == "valid":
            return ((0, 0), (0, 0))
        if isinstance(self.padding, str):
            sides = []
            for n, k, s, d in zip((self.h, self.w), self.kernel, both(self.stride), both(self.dilation), strict=True):
                wanted = (n + s - 1) // s
                total = next(p for p in range(n + s + d * k) if (n + p - d * (k - 1) - 1) // s + 1 == wanted)
                halves = (total // 2, total - total // 2)
                sides.append(halves if self.padding == "same" else halves[::-1])
            return tuple(sides)
        first, second = both(self.padding)
        return (both(first), both(second))


def both(value):
    return tuple(value) if isinstance(value, tuple) else (value, value)


def laid(image, layout):
    """An NCHW (or CHW) array in this layout, contiguous."""
    return np.ascontiguousarray(image if layout == "NCHW" else np.moveaxis(image, -3, -1))


def nchw(image, layout):
    return image if layout == "NCHW" else np.moveaxis(image, -1, -3)


def wide(array):
    return None if array is None else np.asarray(array).astype(np.float64)


def reference(function, *arrays, **options):
    """The reference's result in float64."""
    with tilewise.using(backend="reference"):
        return function(*map(wide, arrays), **options)


def check(actual, expected, reduction: int, what: object, dtype=None, growth: float = 1.0):
    """As assert_close; the size of a sum of `reduction` products of standard normal numbers is its square root."""
    assert actual.dtype == (actual.dtype if dtype is None else dtype), f"{what}: {actual.dtype}"
    assert actual.flags.c_contiguous, f"{what}: the result is not contiguous"
    size = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
    try:
        assert_close(actual, expected, reduction=reduction, scale=growth * max(float(size), reduction**0.5))
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


_PIXELS = [
    (1, 1),
    (3, 5),
    (4, 4),
    (1, 17),
    (31, 1),
    (4, 8),
    (3, 11),
    (47, 1),
    (6, 8),
    (7, 7),
    (15, 1),
    (1, 33),
    (5, 13),
]
_OUTPUTS = [1, 5, 6, 7, 8, 9, 13, 14, 15, 16, 17, 27, 28, 29]  # around the micro-kernels' rows
_WIDTHS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33]  # around the vectors
_DEPTHS = [1, 2, 3, 16, 33, 255, 256, 257, 384]  # around the blocks of the sum

POINTWISE = [
    Case(1 + i % 2, _DEPTHS[i % 9], *_PIXELS[i % 13], o, (1, 1)) for i, o in enumerate(_OUTPUTS + _OUTPUTS[::-1])
] + [
    Case(2, 5, 7, 7, 6, (1, 1), 2),
    Case(1, 5, 8, 9, 6, (1, 1), 1, ((1, 0), (2, 3))),
    Case(2, 6, 5, 5, 9, (1, 1), 1, 0, 1, 3),
]
SQUARE = [
    Case(1 + i % 2, (1, 2, 3, 5, 8, 28, 29, 43)[i % 8], *_PIXELS[-i % 13], o, (3, 3), 1, 1)
    for i, o in enumerate(_OUTPUTS + _OUTPUTS[::-1])
]
WIDTHS = [Case(1, 2, 3, w, 5, (3, 3), 1, 1) for w in _WIDTHS]
STRIDED = [Case(1, 2, 4, w, 7, (3, 3), 2, 1) for w in _WIDTHS] + [Case(1, 3, 5, w, 4, (2, 2), 3, 1) for w in _WIDTHS]
OPTIONS = [
    Case(2, 3, 15, 17, 8, (7, 7), 2, 3),
    Case(2, 1, 12, 12, 6, (5, 5), 1, 2),
    Case(2, 1, 12, 13, 6, (5, 5)),
    Case(2, 6, 9, 9, 16, (5, 5)),
    Case(1, 4, 6, 20, 5, (1, 5), 1, (0, 2)),
    Case(1, 4, 20, 6, 5, (7, 1), 1, (3, 0)),
    Case(2, 3, 9, 10, 4, (2, 3), (1, 2), (1, 0)),
    Case(2, 3, 9, 10, 4, (4, 4), 2, 1),
    Case(2, 3, 9, 10, 4, (3, 3), 3),
    Case(2, 3, 9, 10, 4, (3, 3), 1, 2, 2),
    Case(2, 3, 9, 10, 4, (3, 2), (2, 1), 1, (1, 2)),
    Case(2, 3, 9, 10, 4, (3, 3), 2, 2, 2),
    Case(1, 2, 5, 6, 3, (3, 3), 1, ((3, 0), (0, 4))),
    Case(1, 2, 3, 4, 3, (2, 2), 1, ((4, 5), (6, 1))),  # windows that see padding only
    Case(1, 2, 5, 6, 3, (3, 3), 2, ((0, 1), (2, 0))),
    Case(1, 3, 7, 8, 4, (3, 4), 1, "same"),
    Case(1, 3, 7, 8, 4, (4, 3), 1, "same_lower"),
    Case(1, 3, 7, 8, 4, (3, 3), 2, "same"),
    Case(1, 3, 8, 7, 4, (5, 2), (3, 2), "same_lower"),
    Case(1, 3, 7, 8, 4, (1, 1), 3, "same"),
    Case(1, 3, 7, 8, 4, (3, 3), 1, "same", 2),
    Case(1, 3, 7, 8, 4, (3, 3), 2, "valid"),
    Case(2, 3, 5, 6, 4, (5, 6)),  # one output pixel
    Case(3, 2, 1, 1, 4, (3, 3), 1, 1),
    Case(5, 3, 6, 6, 7, (3, 3), 1, 1),
    Case(0, 3, 6, 6, 7, (3, 3), 1, 1),
    Case(0, 3, 6, 6, 7, (1, 1)),
    Case(2, 4, 7, 7, 6, (3, 3), 1, 1, 1, 2),
    Case(2, 6, 7, 5, 14, (3, 3), 2, 1, 1, 2),
    Case(1, 9, 6, 6, 21, (2, 2), 1, 0, 1, 3),
    Case(1, 32, 9, 9, 32, (3, 3), 1, 1, 1, 4),
]
DEPTHWISE = [
    Case(1 + i % 2, c, 6, w, c * (1 + (i % 5 == 4)), (3, 3), 1, 1, 1, c)
    for i, (c, w) in enumerate(zip([1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 5, 6, 4, 10], _WIDTHS, strict=True))
] + [
    Case(2, 8, 14, 15, 8, (3, 3), 2, 1, 1, 8),
    Case(1, 8, 13, 33, 8, (3, 3), 2, "same", 1, 8),
    Case(1, 17, 9, 16, 17, (5, 5), 1, 2, 1, 17),
    Case(1, 5, 12, 17, 5, (5, 5), 2, 2, 1, 5),
    Case(1, 5, 9, 12, 5, (3, 3), 1, 2, 2, 5),
    Case(2, 3, 7, 9, 9, (2, 3), (1, 3), ((0, 2), (1, 0)), 1, 3),
    Case(1, 4, 9, 10, 4, (7, 7), 1, 3, 1, 4),
    Case(1, 4, 3, 4, 4, (2, 2), 1, ((4, 5), (6, 1)), 1, 4),
    Case(1, 16, 8, 8, 32, (1, 1), 1, 0, 1, 16),
    Case(0, 4, 8, 8, 4, (3, 3), 1, 1, 1, 4),
    Case(1, 4, 5, 20, 4, (1, 3), 1, (0, 1), 1, 4),
]
# F(4x4, 3x3) works on tiles of 4 x 4 output pixels
WINOGRAD = [
    Case(1 + i % 2, c, *size, o, (3, 3), 1, padding)
    for i, (c, size, o, padding) in enumerate([
        (1, (3, 3), 1, 0), (1, (1, 1), 1, 1), (7, (2, 3), 8, 1), (16, (4, 4), 16, 1), (16, (5, 5), 15, 1),
        (17, (6, 6), 17, 0), (33, (8, 9), 33, 1), (8, (13, 13), 14, 1), (64, (14, 14), 64, 1), (12, (7, 7), 30, 0),
        (4, (10, 11), 5, ((0, 2), (3, 1))), (3, (9, 16), 9, "same"), (130, (4, 7), 66, 1), (9, (3, 33), 10, 1),
        (64, (56, 6), 8, 1), (256, (7, 7), 40, 1),
    ])
]  # fmt: skip
# more pixels, outputs or taps than a block holds
BLOCKS = [
    Case(1, 5, 15, 17, 9, (1, 1)),
    Case(2, 3, 16, 16, 6, (3, 3), 1, 1),
    Case(1, 4, 257, 1, 7, (1, 1)),
    Case(2, 3, 33, 34, 5, (3, 3), 2, 1),
    Case(1, 2, 40, 41, 3, (3, 3), 1, 1),
    Case(9, 4, 8, 9, 6, (3, 3)),
    Case(3, 2, 20, 21, 3, (17, 18)),
    Case(1, 3, 9, 9, 130, (3, 3), 1, 1),
    Case(1, 70, 5, 5, 260, (1, 1)),
    Case(1, 12, 23, 23, 16, (5, 5), 1, 2, 1, 2),
]
EDGES = {
    "1x1": POINTWISE,
    "3x3": SQUARE,
    "widths": WIDTHS,
    "strided": STRIDED,
    "options": OPTIONS,
    "depthwise": DEPTHWISE,
    "winograd": WINOGRAD,
    "blocks": BLOCKS,
}
# few enough for element-by-element numerical gradients
SMALL = [
    Case(2, 2, 4, 5, 3, (3, 3), 1, 1),
    Case(1, 2, 5, 4, 2, (2, 3), (2, 1), ((1, 0), (0, 2)), (1, 1)),
    Case(1, 4, 5, 5, 4, (3, 3), 2, 1, 1, 2),
    Case(1, 3, 4, 5, 6, (3, 3), 1, 1, 1, 3),
    Case(2, 3, 3, 4, 2, (1, 1)),
    Case(1, 2, 6, 6, 2, (3, 2), 1, 2, 2),
]
# split over threads: layers of networks, and odd sizes, whose tails are summed by other instructions
BUSY = [
    Case(4, 32, 28, 28, 32, (3, 3), 1, 1),
    Case(1, 64, 28, 28, 64, (3, 3), 1, 1),
    Case(2, 64, 28, 28, 96, (1, 1)),
    Case(2, 3, 64, 64, 32, (7, 7), 2, 3),
    Case(64, 1, 28, 28, 6, (5, 5), 1, 2),
    Case(8, 96, 28, 28, 96, (3, 3), 1, 1, 1, 96),
    Case(7, 13, 27, 29, 13, (3, 3), 2, 1, 1, 13),
    Case(2, 48, 30, 30, 32, (3, 3), 2, 1, 1, 2),
    Case(3, 17, 31, 33, 19, (3, 3), 1, 1),
    Case(5, 3, 7, 11, 5, (2, 3), 1, 1),
]
