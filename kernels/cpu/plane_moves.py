"""Arrays turned around for a pass: channels and pixels, images and channels, or outputs and channels change places."""

from numba import prange

from tilewise.kernels.cpu.jit import kernel
from tilewise.kernels.cpu.row_moves import finish_row
from tilewise.kernels.cpu.scratch import progression
from tilewise.kernels.cpu.simd import address, lanes
from tilewise.kernels.cpu.vector_move import reverse_row, transpose_part, transpose_square_to


@kernel()
def turn_planes(source, n, rows, columns, target):
    """target[i, c, r] = source[i, r, c] for n planes: NCHW to NHWC with (channels, pixels), and back."""
    lane = lanes(source)
    places = progression(rows, lane)
    blocks = (columns + lane - 1) // lane
    high, wide = min(rows, lane), min(columns, lane)
    for chunk in prange(n * blocks):
        i = chunk // blocks
        c = min((chunk - i * blocks) * lane, columns - wide)
        for r in range(0, rows, lane):
            at = min(r, rows - high)
            to = address(target, i * rows * columns + c * rows + at)
            where = address(source, i * rows * columns + at * columns + c)
            if high < lane or wide < lane:
                transpose_part(to, rows, where, columns, high, wide)
            else:
                transpose_square_to(to, address(places, 0), where, columns)


@kernel()
def exchange_images(source, outer, inner, pixels, target):
    """target[j, i, p] = source[i, j, p] for i < outer, j < inner: whole rows of pixels change places."""
    for j in prange(inner):
        for i in range(outer):
            to, row = address(target, (j * outer + i) * pixels), address(source, (i * inner + j) * pixels)
            finish_row(1, to, row, pixels, source.dtype.type(0), 0, row, 0)


@kernel()
def spread_pixels(source, planes, channels, grid, size, stride, bias, target):
    """target[p, i * stride[0], j * stride[1]] = source[p, i, j], all other pixels bias[p % channels], or 0 without."""
    (oh, ow), (h, w) = grid, size
    for p in prange(planes):
        fill = bias[p % channels] if bias.size > 0 else source.dtype.type(0)
        for i in range(oh):
            first, last = i * stride[0], h if i == oh - 1 else (i + 1) * stride[0]
            for k in range((p * h + first) * w, (p * h + last) * w):
                target[k] = fill
            to, row = (p * h + first) * w, (p * oh + i) * ow
            if stride[1] == 2:
                where = address(target, to)
                finish_row(2, where, address(source, row), ow, source.dtype.type(0), 0, where, 0)
            else:
                for j in range(ow):
                    target[to + j * stride[1]] = source[row + j]


# A square of channels and outputs whose taps fit L1 together: transposed at once, or each row would be a page apart.
_EXCHANGE = 16


@kernel()
def exchange_channels(weight, groups, outputs, channels, taps, wanted, result):
    """result[g, c, o, i] = weight[g, o, c, wanted[i]]: the taps of one phase, outputs and channels swapped.

    wanted descends; where it is all of the taps, they are turned around in registers.
    """
    blocks = (channels + _EXCHANGE - 1) // _EXCHANGE
    for chunk in prange(groups * blocks):
        g = chunk // blocks
        c0 = (chunk - g * blocks) * _EXCHANGE
        for o0 in range(0, outputs, _EXCHANGE):
            for c in range(c0, min(channels, c0 + _EXCHANGE)):
                for o in range(o0, min(outputs, o0 + _EXCHANGE)):
                    source = ((g * outputs + o) * channels + c) * taps
                    target = ((g * channels + c) * outputs + o) * wanted.size
                    if wanted.size == taps:
                        reverse_row(address(result, target), address(weight, source), taps)
                        continue
                    for i in range(wanted.size):
                        result[target + i] = weight[source + wanted[i]]
