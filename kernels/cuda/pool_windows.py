"""Windows and bins of pooling, for the kernels and for who starts them.

All kernels see (images, H, W, units) with the channels in units of 16 bytes or of an element: NHWC as it lies, NCHW as
N * C images of one channel. A stride of 0 stands for an adaptive pool's bins: bin o of an axis of n pixels goes from
floor(o n / count) to ceil((o + 1) n / count) - 1.
"""

from dataclasses import dataclass

import numpy as np

from tilewise.kernels.cuda.channel_plan import unit_width
from tilewise.kernels.cuda.launch import ceil_div
from tilewise.kernels.cuda.launch import device as device_function

THREADS = 256


@device_function
def split(i, n):
    """(i // n, i % n) of numbers that are not negative; where both fit 32 bits, that is what is divided."""
    quotient = np.int64(np.uint64(i) // np.uint64(n))
    return quotient, i - quotient * n


@device_function
def window(o, n, count, kernel, stride, low, dilation):
    """(first, end): the taps of window o inside the image are first, first + dilation, ... before end."""
    if stride == 0:
        first, _ = split(o * n, count)
        end, _ = split((o + 1) * n + count - 1, count)
        return first, end
    first = o * stride - low
    end = min(first + (kernel - 1) * dilation + 1, n)
    if first < 0:
        taps, _ = split(dilation - 1 - first, dilation)
        first += taps * dilation
    return first, end


@device_function
def extent(o, n, count, kernel, stride, low, high, include_pad):
    """What a window's average counts along an axis: its taps in the padded image, or those in the image."""
    if include_pad and stride > 0:
        return min(o * stride - low + kernel, n + high) - (o * stride - low)
    first, end = window(o, n, count, kernel, stride, low, 1)
    return end - first


@device_function
def covering(p, n, count, stride, low, reach):
    """(first, last): the windows that may have a tap at pixel p. reach: from a window's first tap to its last."""
    if stride == 0:
        first, _ = split(p * count, n)
        last, _ = split((p + 1) * count + n - 1, n)
        return first, min(last - 1, count - 1)
    last, _ = split(p + low, stride)
    first, _ = split(max(p + low - reach + stride - 1, 0), stride)
    return first, min(last, count - 1)


@device_function
def covering_next(first, last, p, n, count, stride, low, reach):
    """`covering` of pixel p from that of the pixel before it, without a division."""
    if stride == 0:
        return covering(p, n, count, stride, low, reach)
    if last + 1 < count and (last + 1) * stride <= p + low:
        last += 1
    if first * stride + reach < p + low:
        first += 1
    return first, last


@device_function
def put(registers, k, value, count):
    """registers[k] = value, for a k that need not be a constant: an index that is none would move them to memory."""
    for i in range(count):
        registers[i] = value if i == k else registers[i]


@dataclass(frozen=True, slots=True)
class Pool:
    """Windows over the images of a tensor. width: elements of a unit; units: units of a pixel's channels."""

    images: int
    size: tuple[int, int]
    out: tuple[int, int]
    units: int
    width: int
    kernel: tuple[int, int] = (0, 0)
    stride: tuple[int, int] = (0, 0)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)

    @property
    def windows(self) -> int:
        """Units of the pooled tensor."""
        return self.images * self.out[0] * self.out[1] * self.units

    @property
    def pixels(self) -> int:
        """Units of the tensor that is pooled."""
        return self.images * self.size[0] * self.size[1] * self.units

    @property
    def shape(self) -> tuple[int, ...]:
        """H, W, OH, OW, units: how the kernels take it."""
        return (*self.size, *self.out, self.units)

    @property
    def low(self) -> tuple[int, int]:
        return self.padding[0][0], self.padding[1][0]

    @property
    def high(self) -> tuple[int, int]:
        return self.padding[0][1], self.padding[1][1]

    @property
    def reach(self) -> tuple[int, int]:
        return self.dilation[0] * (self.kernel[0] - 1), self.dilation[1] * (self.kernel[1] - 1)

    def divisor(self, include_pad: bool) -> int:
        """What every window's sum is divided by; 0 where windows differ."""
        result = 1
        axes = (self.size, self.out, self.kernel, self.stride, self.padding)
        for n, count, kernel, stride, (low, high) in zip(*axes, strict=True):
            beyond = (count - 1) * stride - low + kernel > n + high
            if n % count if stride == 0 else beyond or (not include_pad and (low or high)):
                return 0
            result *= kernel if stride else n // count
        return result

    def is_square(self, side: int, stride: int) -> bool:
        """Whether the windows are side x side, `stride` apart, not dilated."""
        return self.kernel == (side, side) and self.stride == (stride, stride) and self.dilation == (1, 1)


def pool_of(shape: tuple[int, ...], out: tuple[int, int], layout: str, dtype, **windows) -> Pool:
    """shape, dtype: of the tensor that is pooled."""
    if layout == "NCHW":
        n, c, h, w = shape
        return Pool(n * c, (h, w), out, 1, 1, **windows)
    n, h, w, c = shape
    width = unit_width(c, dtype)
    return Pool(n, (h, w), out, c // width, width, **windows)


def out_shape(shape: tuple[int, ...], out: tuple[int, int], layout: str) -> tuple[int, ...]:
    return (*shape[:2], *out) if layout == "NCHW" else (shape[0], *out, shape[3])


def blocks_of(count: int) -> int:
    return ceil_div(count, THREADS)
