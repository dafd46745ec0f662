"""Convolution and its gradient with respect to x as one sum, which the kernels compute: the correlation

    y[n, g M + m, R(i), C(j)] = sum over d < D, t, u of  x[n, g D + d, r(i, t), c(j, u)] * weight[g, m, d, T(t), U(u)]

    along an axis:   R(i) = first + step i            the result's pixel, i < count
                     r(i, t) = origin + stride i + spacing t   x's pixel, 0 outside of it, t < taps
                     T(t) = first_tap + tap_step t    the weight's row or column

Forward, r(i, t) = -P + S i + D t. Backwards, the pixels of x fall into S phases along an axis; in each, only every
S / gcd(S, D)-th tap meets a pixel of grad, and those are a correlation of stride 1. Every list of taps is an arithmetic
progression, so that a kernel finds its operands by counting: no tables, nothing to send to the device but numbers.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import gcd, prod

from tilewise.kernels.device_arrays import DeviceArray

_NARROW_BELOW = (1 << 31) - (1 << 16)
_KEPT = 4096  # signatures whose geometry is kept, so that a call works it out once


@dataclass(frozen=True, slots=True)
class Axis:
    """Rows or columns of a correlation; see the module. size: pixels of x."""

    size: int
    first: int
    step: int
    count: int
    origin: int
    stride: int
    spacing: int
    taps: int
    first_tap: int
    tap_step: int

    @property
    def numbers(self) -> tuple[int, ...]:
        """As kernels take them."""
        return (
            self.size, self.first, self.step, self.count, self.origin, self.stride, self.spacing, self.taps,
            self.first_tap, self.tap_step,
        )  # fmt: skip


def forward_axis(size: int, count: int, taps: int, stride: int, padding: tuple[int, int], dilation: int) -> Axis:
    return Axis(size, 0, 1, count, -padding[0], stride, dilation, taps, 0, 1)


def transposed_axes(size: int, result: int, taps: int, stride: int, before: int, dilation: int) -> list[Axis]:
    """The phases of the transposed convolution from `size` pixels to `result`; `before`: padding."""
    common = gcd(stride, dilation)
    axes = []
    for first in range(min(stride, result)):
        met = [k for k in range(min(taps, stride // common)) if (first + before - dilation * k) % stride == 0]
        count, tap_step = -(-(result - first) // stride), stride // common
        if not met:
            axes.append(Axis(size, first, stride, count, 0, 1, 1, 0, 0, 1))
            continue
        many = (taps - met[0] - 1) // tap_step + 1
        last = met[0] + (many - 1) * tap_step  # descending taps meet ascending pixels
        origin = (first + before - dilation * last) // stride
        axes.append(Axis(size, first, stride, count, origin, 1, dilation // common, many, last, -tap_step))
    return axes


def pixels(shape: tuple[int, ...], layout: str) -> tuple[int, int]:
    height, width = shape[2:] if layout == "NCHW" else shape[1:3]
    return height, width


def image_shape(images: int, channels: int, size, layout: str) -> tuple[int, ...]:
    return (images, channels, *size) if layout == "NCHW" else (images, *size, channels)


def image_steps(shape: tuple[int, ...], layout: str) -> tuple[int, int, int, int]:
    """Elements from an image, a channel, a row, a column to the next."""
    if layout == "NCHW":
        _, c, h, w = shape
        return c * h * w, h * w, w, 1
    _, h, w, c = shape
    return h * w * c, 1, w * c, c


@dataclass(frozen=True, slots=True)
class Correlation:
    """One correlation of the sum in the module's head.

    shape_x, shape_y: of the whole arrays, in the layout. outputs: M. channels: D. group_step, output_step,
    channel_step: elements of the weight to the next group, output, channel; taps follow each other, `width` a row.
    """

    rows: Axis
    columns: Axis
    shape_x: tuple[int, ...]
    shape_y: tuple[int, ...]
    layout: str
    groups: int
    outputs: int
    channels: int
    group_step: int
    output_step: int
    channel_step: int
    width: int

    @property
    def images(self) -> int:
        return self.shape_x[0]

    @property
    def axes(self) -> tuple[int, ...]:
        """Rows and columns, as kernels take them."""
        return *self.rows.numbers, *self.columns.numbers

    @property
    def filters(self) -> tuple[int, ...]:
        """The weight, as kernels take it."""
        return (
            self.groups, self.outputs, self.channels, self.group_step, self.output_step, self.channel_step, self.width
        )  # fmt: skip

    @property
    def taps(self) -> int:
        return self.rows.taps * self.columns.taps

    @property
    def pixels(self) -> int:
        """Of the result, all images together."""
        return self.images * self.rows.count * self.columns.count

    @property
    def size(self) -> int:
        """Results."""
        return self.pixels * self.groups * self.outputs

    @property
    def flops(self) -> int:
        return 2 * self.size * self.channels * self.taps

    @property
    def narrow(self) -> bool:
        """Whether images, rows, columns and taps, and the numbers on the way to them, fit 32 bits."""
        most = (a.size + a.count * a.stride + abs(a.origin) + a.spacing * a.taps for a in (self.rows, self.columns))
        return max(*most, self.channels * self.taps, self.images) < _NARROW_BELOW

    @property
    def channels_last(self) -> bool:
        return self.layout == "NHWC"

    @property
    def steps(self) -> tuple[int, ...]:
        """image_steps of x and of y."""
        return *image_steps(self.shape_x, self.layout), *image_steps(self.shape_y, self.layout)


def output_size(shape_x, shape_weight, *, stride, padding, dilation, groups, layout) -> tuple[int, ...]:
    """conv2d's rows and columns."""
    sizes = zip(pixels(shape_x, layout), padding, dilation, shape_weight[2:], stride, strict=True)
    return tuple((n + sum(pads) - d * (k - 1) - 1) // s + 1 for n, pads, d, k, s in sizes)


@lru_cache(maxsize=_KEPT)
def forward(shape_x, shape_weight, size, *, stride, padding, dilation, groups, layout) -> Correlation:
    """The correlation that conv2d is; size: rows and columns of the result."""
    o, d, *taps = shape_weight
    axes = zip(pixels(shape_x, layout), size, taps, stride, padding, dilation, strict=True)
    rows, columns = (forward_axis(*axis) for axis in axes)
    shape_y = image_shape(shape_x[0], o, size, layout)
    m, area = o // groups, prod(taps)
    return Correlation(
        rows, columns, tuple(shape_x), shape_y, layout, groups, m, d, m * d * area, d * area, area, taps[1]
    )


@lru_cache(maxsize=_KEPT)
def transposed(
    shape_grad, shape_weight, shape_result, *, stride, padding, dilation, groups, layout
) -> tuple[Correlation, ...]:
    """The correlations that conv2d's gradient with respect to x is, one for each phase; together they fill it."""
    o, d, *taps = shape_weight
    sizes = pixels(shape_grad, layout), pixels(shape_result, layout)
    axes = [
        transposed_axes(size, result, k, s, before, step)
        for size, result, k, s, (before, _), step in zip(*sizes, taps, stride, padding, dilation, strict=True)
    ]
    m, area = o // groups, prod(taps)
    return tuple(
        Correlation(
            rows, columns, tuple(shape_grad), tuple(shape_result), layout, groups, d, m, m * d * area, area, d * area,
            taps[1],
        )
        for rows in axes[0]
        for columns in axes[1]
    )  # fmt: skip


def weight_view(weight: DeviceArray, it: Correlation, order: str) -> DeviceArray:
    """A strided view of the weight with the axes in `order`: g(roup), o(utput), c(hannel), t(ap)."""
    taps = weight.shape[2] * weight.shape[3]
    axes = {
        "g": (it.groups, it.group_step), "o": (it.outputs, it.output_step), "c": (it.channels, it.channel_step),
        "t": (taps, 1),
    }  # fmt: skip
    shape, strides = zip(*(axes[a] for a in order), strict=True)
    item = weight.dtype.itemsize
    return DeviceArray(
        weight.place, weight.pointer, shape, weight.dtype, weight.owner, tuple(s * item for s in strides)
    )
