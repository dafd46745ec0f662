"""Windows and bins of pooling, for the kernels; pool_plan.py has them for who starts those.

All kernels see (images, H, W, units) with the channels in units of 16 bytes or of an element: NHWC as it lies, NCHW as
N * C images of one channel. A stride of 0 stands for an adaptive pool's bins: bin o of an axis of n pixels goes from
floor(o n / count) to ceil((o + 1) n / count) - 1.
"""

import numpy as np

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


def blocks_of(count: int) -> int:
    return ceil_div(count, THREADS)
