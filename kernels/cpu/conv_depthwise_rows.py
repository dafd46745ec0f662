"""3x3 depthwise convolution in NCHW row after row, its weights' gradient and, for stride 2, its transpose.

With stride 2: the layers of a mobile network that halve their image. Strips (conv_depthwise_nchw.py), which serve all
other strides and sizes, copy x first, which takes nearly twice as long (`make bench-peers ARGS='--batch 8 --only dw2'`
prints what this takes), and three times as long for the transpose. With stride 1: large planes, which loops down the
columns (conv_depthwise_same.py) fetch anew for each vector of a row, again nearly twice as long. Planes in L1 are
faster down the columns, with a third of the loads. Rows of at most one vector, with stride 2, have a kernel of their
own. The inner loops: depthwise_rows.py.
"""

from math import prod

import numpy as np
from numba import prange

from tilewise.kernels.cpu.caches import memory_from
from tilewise.kernels.cpu.conv_depthwise_nchw import CHUNKS, FEWEST
from tilewise.kernels.cpu.conv_depthwise_same import sum_lanes, write_gradients
from tilewise.kernels.cpu.depthwise_rows import correlate_narrow, correlate_plane, double_plane, sum_products
from tilewise.kernels.cpu.depthwise_strip import clear
from tilewise.kernels.cpu.epilogue import activate_row
from tilewise.kernels.cpu.jit import EXACT_ORDER, kernel
from tilewise.kernels.cpu.scratch import keep, scratch
from tilewise.kernels.cpu.simd import address, lanes, settle_stores

# Bytes of a plane from which on rows are faster with stride 1: what does not fit L1; and where all planes come from
# memory, which is fetched faster in its order.
LARGE_PLANE, LARGE_IN_MEMORY = 32 << 10, 16 << 10


def in_memory(size):
    """Whether an array of so many bytes is read from memory, and better written past the caches."""
    return size >= memory_from()


def by_rows(planes, taps, stride, outputs, x_size, y_size, itemsize):
    """Whether these kernels serve a convolution; taps: as for Depthwise."""
    if [len(axis) for axis in taps] != [1, 1] or outputs != 1 or planes < FEWEST:
        return False
    plane = prod(x_size) * itemsize
    least = LARGE_IN_MEMORY if in_memory(planes * plane) else LARGE_PLANE
    if tuple(stride) != (2, 2) and (tuple(stride) != (1, 1) or plane < least):
        return False
    rows, columns = (axis[0][1] for axis in taps)
    if any(o.size != 3 or (np.diff(o) != 1).any() or o[0] not in (0, -1) for o in (rows, columns)):
        return False
    return stride[1] * (y_size[1] - 1) + int(columns[-1]) <= x_size[1]


@kernel()
def convolve_rows_nchw(x, weight, y, bias, planes, channels, h, w, oh, ow, top, left, stride, numbers, activation):
    """numbers: which weight tap (r, s) has; top, left: the padding."""
    shift = bias if bias.size > 0 else np.zeros(channels, x.dtype)
    chunks = min(planes, CHUNKS)
    for chunk in prange(chunks):
        for plane in range(planes * chunk // chunks, planes * (chunk + 1) // chunks):
            c, out = plane % channels, plane * oh * ow
            source, factors, value = address(x, plane * h * w), address(weight, c * 9), address(shift, c)
            target, places = address(y, out), address(numbers, 0)
            if stride == 1:
                correlate_plane(1, source, h, w, top, left, places, factors, value, target, oh, ow)
            else:
                correlate_plane(2, source, h, w, top, left, places, factors, value, target, oh, ow)
            if activation != 0:
                activate_row(y, out, oh * ow, activation)


@kernel()
def convolve_narrow_nchw(x, weight, y, bias, planes, channels, h, w, oh, ow, top, left, numbers, activation):
    """The same with stride 2, for rows of y of one vector at most; apart, so that a first call compiles one of them."""
    shift = bias if bias.size > 0 else np.zeros(channels, x.dtype)
    chunks = min(planes, CHUNKS)
    for chunk in prange(chunks):
        for plane in range(planes * chunk // chunks, planes * (chunk + 1) // chunks):
            c, out = plane % channels, plane * oh * ow
            source, factors, value = address(x, plane * h * w), address(weight, c * 9), address(shift, c)
            correlate_narrow(source, h, w, top, left, address(numbers, 0), factors, value, address(y, out), oh, ow)
            if activation != 0:
                activate_row(y, out, oh * ow, activation)


def is_doubled(planes, taps, stride, outputs, x_size, y_size):
    """Whether `convolve_doubled_nchw` serves a transpose: that of 3x3 with stride 2 and a padding of 1."""
    wanted = [([1], [0]), ([2, 0], [0, 1])]
    alike = all([(n.tolist(), o.tolist()) for n, o in axis] == wanted for axis in taps)
    sizes = all(n == -(-m // 2) for n, m in zip(x_size, y_size, strict=True))
    return alike and sizes and tuple(stride) == (1, 1) and outputs == 1 and planes >= FEWEST


@kernel()
def convolve_doubled_nchw(x, weight, y, bias, planes, channels, h, w, oh, ow, activation, past):
    """The transpose of convolve_rows_nchw; x is the smaller."""
    shift = bias if bias.size > 0 else np.zeros(channels, x.dtype)
    chunks = min(planes, CHUNKS)
    for chunk in prange(chunks):
        for plane in range(planes * chunk // chunks, planes * (chunk + 1) // chunks):
            c, out = plane % channels, plane * oh * ow
            source, factors, value = address(x, plane * h * w), address(weight, c * 9), address(shift, c)
            if past:
                double_plane(1, source, h, w, factors, value, address(y, out), oh, ow)
            else:
                double_plane(0, source, h, w, factors, value, address(y, out), oh, ow)
            if activation != 0:
                activate_row(y, out, oh * ow, activation)
        if past:
            settle_stores()


@kernel(fastmath=EXACT_ORDER)
def weight_gradient_rows_nchw(
    x, grad, result, bias, n, channels, h, w, oh, ow, top, left, stride, numbers, all_taps, blocks, parts
):
    """result: (channels, 9), bias: (channels), flat. all_taps: 0 for the bias alone."""
    width, size = lanes(x), all_taps + 1
    sums = np.empty(parts * channels * size, x.dtype)
    for chunk in prange(blocks * parts):
        part = chunk % parts
        block = chunk // parts
        first, count = channels * block // blocks, channels * (block + 1) // blocks - channels * block // blocks
        totals = scratch(count * 10 * width, x)
        clear(address(totals, 0), count * 10 * width)
        # Image after image, whose planes lie one behind the other: what is asked for ahead is what comes next.
        for image in range(n * part // parts, n * (part + 1) // parts):
            for c in range(count):
                plane, into = image * channels + first + c, address(totals, c * 10 * width)
                source, grads = address(x, plane * h * w), address(grad, plane * oh * ow)
                places = address(numbers, 0)
                if all_taps == 0:
                    sum_products(1, 0, into, source, h, w, top, left, places, grads, oh, ow)
                elif stride == 1:
                    sum_products(1, 9, into, source, h, w, top, left, places, grads, oh, ow)
                else:
                    sum_products(2, 9, into, source, h, w, top, left, places, grads, oh, ow)
        sum_lanes(address(sums, (part * channels + first) * size), address(totals, 0), count, all_taps, width)
        keep(totals)
    write_gradients(sums, parts, channels, all_taps, result, bias)
