"""Convolution by 1x1 kernels in NCHW: a matrix product for each image that reads x where it lies.

    y[image, o, p] = activation(bias[o] + extra + sum over c of weight[o, c] * x[image, c, p]),   p over all pixels

A panel of NV vectors of pixels is what a register tile's rows of y are made of (`panel_product_to`). The first tile
reads the pixels from x, whose channels are a plane apart, and leaves them in a packed panel behind it; the others read
that, and ask for the pixels that follow meanwhile. A copy beforehand, even within L2, would cost a fifth of the time at
64 outputs: nothing else runs while it waits for memory. With a stride there is one: a chunk takes its pixels out of x
first, whole rows at a time.

As many panels as PACKED_BYTES hold pass by one tile of outputs before the next:

    x, packed: in L2      y: 8 runs of up to 3 KB at a time, not 192 bytes here and there in each of 64 to 256 planes

Writing y is half of the time otherwise, for neither the processor's prefetchers nor memory's open rows follow so many
places. In long runs it takes little beside the products (`make bench-peers ARGS='--batch 8 --only pw1'` prints the sum
of both).

Few pixels left over beyond whole vectors, one of 7x7 or four of 14x14, are dot products along the channels: a panel
of one vector would take more than a third of the time of a full one.
"""

from math import ceil

import numpy as np
from numba import prange

from tilewise.kernels.cpu.epilogue import BOUNDED, activate_row, bounds_of
from tilewise.kernels.cpu.gemm_dots import ROWS, tall_dots
from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.cpu.panel_kernel import panel_product_to
from tilewise.kernels.cpu.phase_planes import copy_plane
from tilewise.kernels.cpu.row_moves import gather_row
from tilewise.kernels.cpu.scratch import keep, scratch
from tilewise.kernels.cpu.simd import CHANNEL_MR as MR
from tilewise.kernels.cpu.simd import CHANNEL_NV as NV
from tilewise.kernels.cpu.simd import VECTOR_BYTES, address, lane_count, lanes

# The most panels a chunk, how many chunks there should be to share out, and what divides their number where there is
# but one image: equal shares for two or four threads.
PANELS = 16
CHUNKS, EVEN = 8, 4


# Where x is strided: panels of which a chunk takes a copy, 192 pixels of 256 channels are 196 KB. With AVX2, whose
# panels are half as wide, 408 pixels: longer runs of rows to copy were a tenth faster on Zen 3.
STRIDED_PANELS = 4 if VECTOR_BYTES == 64 else 17
# Panels that pass by one tile of outputs after another lie in L2.
PACKED_BYTES = 256 << 10
# The weights of a chunk stay in L2 while its pixels pass by.
WEIGHT_BYTES = 1 << 20
# Channels from which dot products pay for pixels left over.
DOTS_FROM = 64


def whole_pixels(pixels, channels, outputs, lane):
    """The pixels that panels take; those left over are dot products."""
    rest = pixels % lane
    # whole tiles of dot products (ROWS divides MR): others would be compiled for outputs that networks do not have
    enough = outputs % MR == 0 and channels >= DOTS_FROM
    # 6 dot products of 16 lanes cost 1.5 cycles a step for 8 outputs, a panel of one vector 4.5
    return pixels - rest if enough and pixels > rest and 8 * rest <= 3 * lane else pixels


def plan(n, groups, channels, size, outputs, stride, itemsize, activation):
    """(geometry, phase) for `convolve`: channels and outputs of one group, size: rows and columns of x."""
    h, w = size
    oh, ow = ceil(h / stride[0]), ceil(w / stride[1])
    lane = lane_count(itemsize)
    whole = whole_pixels(oh * ow, channels, outputs, lane)
    panels = ceil(whole / (NV * lane))
    strided = stride != (1, 1)
    some = STRIDED_PANELS if strided else PANELS
    while some > 1 and n * groups * ceil(panels / some) < CHUNKS:
        some = ceil(some / 2)
    blocks = ceil(panels / some)
    if n * groups == 1 and blocks > 1:  # shares for two or four threads
        blocks = min(panels, ceil(blocks / EVEN) * EVEN)
    chunks, splits = groups * n * blocks, 1
    while outputs // MR >= 4 * splits and (
        chunks * splits < CHUNKS or channels * outputs * itemsize > WEIGHT_BYTES * splits
    ):
        splits *= 2
    geometry = [
        n, groups, channels, oh * ow, outputs, blocks, splits, activation, whole, int(strided), h, w, stride[0],
        stride[1], ow,
    ]  # fmt: skip
    return np.array(geometry, np.int64), np.array([0, 0, ow, 0], np.int64)


@device()
def _multiply(
    vectors, a, b, b_step, panel, depth, outputs, panels, columns, y, y_step, shifts, extra, has_extra, bounds
):  # fmt: skip
    if vectors >= NV:
        panel_product_to(
            MR, NV, a, b, b_step, panel, depth, outputs, panels, columns, y, y_step, shifts, extra, has_extra, bounds
        )
    elif vectors == 2:
        panel_product_to(
            MR, 2, a, b, b_step, panel, depth, outputs, panels, columns, y, y_step, shifts, extra, has_extra, bounds
        )
    else:
        panel_product_to(
            MR, 1, a, b, b_step, panel, depth, outputs, panels, columns, y, y_step, shifts, extra, has_extra, bounds
        )


@device()
def _take_lines(x, start, line, lines, geometry, phase, taken):
    """The strided pixels of so many rows, channel by channel."""
    channels, h, w, stride_h, stride_w, ow = (
        geometry[2], geometry[10], geometry[11], geometry[12], geometry[13], geometry[14]
    )  # fmt: skip
    for c in range(channels):
        copy_plane(
            x, start + c * h * w, h, w, line * stride_h, lines, stride_h, stride_w, phase, 0, ow, taken, c * lines * ow
        )


@device(allocates=True)
def _dots(x, source, step, weight, left, count, depth, outputs, y, target, pixels, bias, bias_start, extra, code):
    """`count` pixels by dot products; outputs: a multiple of ROWS."""
    columns, sums = scratch(count * depth, x), scratch(outputs * count, x)
    for j in range(count):
        gather_row(address(columns, j * depth), address(x, source + j), depth, step)
    for o in range(0, outputs, ROWS):
        tall_dots(
            address(weight, left + o * depth), depth, address(columns, 0), depth, depth, address(sums, o * count),
            count, count, 0,
        )  # fmt: skip
    for o in range(outputs):
        shift = bias[bias_start + o] if bias.size > 0 else x.dtype.type(0)
        for j in range(count):
            at = target + o * pixels + j
            y[at] = sums[o * count + j] + shift + (extra[at] if extra.size > 0 else x.dtype.type(0))
        if code != 0:
            activate_row(y, target + o * pixels, count, code)
    keep(columns)
    keep(sums)


@device(allocates=True)
def _panels(
    x, source, step, weight, left, first, last, pixels, depth, outputs, y, target, bias, bias_start, extra, code
):  # fmt: skip
    """The pixels first .. last of one image and `outputs` outputs; x's channels are `step` apart."""
    width = NV * lanes(x)
    together = min(max(1, PACKED_BYTES // (depth * width * x.itemsize)), PANELS)
    panel = scratch(together * depth * width, x)
    shifts = scratch(outputs + MR, x)
    for o in range(outputs + MR):
        shifts[o] = bias[bias_start + o] if o < outputs and bias.size > 0 else x.dtype.type(0)
    has_extra = 1 if extra.size > 0 else 0
    p = first
    while p < last:
        panels = min(together, max(1, (last - p) // width))
        columns = min(width, last - p)
        _multiply(
            (columns + lanes(x) - 1) // lanes(x), address(weight, left), address(x, source + p), step,
            address(panel, 0), depth, outputs, panels, columns, address(y, target + p), pixels, address(shifts, 0),
            address(extra, target + p if has_extra else 0), has_extra, bounds_of(code),
        )  # fmt: skip
        if code > BOUNDED:
            for o in range(outputs):
                activate_row(y, target + o * pixels + p, (panels - 1) * width + columns, code)
        p += panels * width
    keep(panel)
    keep(shifts)


@device(allocates=True)
def _chunk(x, plane, first, last, weight, left, outputs, y, target, bias, bias_start, extra, geometry, phase):
    """Some pixels of one image and group, `plane`, and so many outputs; the last chunk also does what is left over."""
    channels, pixels, whole, ow, code = geometry[2], geometry[3], geometry[8], geometry[14], geometry[7]
    rest = pixels - whole if last == whole else 0
    strided, line = geometry[9], first // ow
    lines = (last + rest - 1) // ow - line + 1
    taken = scratch(strided * channels * lines * ow, x)
    if strided:
        _take_lines(x, plane * channels * geometry[10] * geometry[11], line, lines, geometry, phase, taken)
        a, source, step = taken, -line * ow, lines * ow
    else:
        a, source, step = x, plane * channels * pixels, pixels
    _panels(
        a, source, step, weight, left, first, last, pixels, channels, outputs, y, target, bias, bias_start, extra, code
    )
    if rest > 0:
        _dots(
            a, source + last, step, weight, left, rest, channels, outputs, y, target + last, pixels, bias, bias_start,
            extra, code,
        )  # fmt: skip
    keep(a)


@kernel(one_by_one=True)
def convolve(x, weight, y, bias, extra, geometry, phase):
    """y = activation(weight x + bias + extra) for each image, all arrays flat, for a `plan`.

    weight: (groups * outputs, channels). extra: empty, or laid out as y.
    """
    n, groups, channels, pixels, outputs = geometry[0], geometry[1], geometry[2], geometry[3], geometry[4]
    blocks, splits, whole, width = geometry[5], geometry[6], geometry[8], NV * lanes(x)
    panels = (whole + width - 1) // width
    tiles = (outputs + MR - 1) // MR
    units = n * groups * blocks
    for chunk in prange(units * splits):
        # one share of the weights after the other
        part, block, plane = chunk // units, chunk % blocks, chunk % units // blocks
        o, end = tiles * part // splits * MR, min(outputs, tiles * (part + 1) // splits * MR)
        first, last = panels * block // blocks * width, min(whole, panels * (block + 1) // blocks * width)
        g = plane % groups
        _chunk(
            x, plane, first, last, weight, (g * outputs + o) * channels, end - o, y,
            (plane * outputs + o) * pixels, bias, g * outputs + o, extra, geometry, phase,
        )  # fmt: skip
