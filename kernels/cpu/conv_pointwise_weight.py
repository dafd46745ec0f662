"""The weight gradient of a 1x1 convolution, and the bias's with it: one matrix product over the pixels of all images.

    grad_weight[o, c] = sum over pixels p of grad[o, p] * x[c, p]        grad_bias[o] = sum over p of grad[o, p]

Both operands are packed once, pixel by pixel, into panels of what a register tile needs side by side: PANEL outputs, NR
channels. In NHWC that is a copy; in NCHW, where pixels are neighbours, squares are turned in registers. With a stride,
only the pixels that count are packed. Images follow one another, so small ones leave no tile half empty:

    grad -> V[panel of outputs, pixel]      x -> U[panel of channels, pixel]      tile (o, c) += V[o] U[c], straight to
                                                                                  grad_weight

A chunk owns a block of outputs and channels; the pixels go by in steps of DEPTH, whose U stays in L1. Where all pixels
would outgrow BYTES, they are packed in parts.

Few weights and many pixels are one block or two, which two threads cannot share. There a chunk owns a share of the
pixels, which it packs and multiplies piece by piece, and sums of all weights, which are added in order in the end.
"""

import numpy as np
from numba import prange

from tilewise.kernels.cpu.conv_pass import COST, image_size
from tilewise.kernels.cpu.depthwise_strip import step
from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.cpu.row_moves import clear_row, finish_row
from tilewise.kernels.cpu.scratch import integers, keep, progression, scratch
from tilewise.kernels.cpu.simd import CHANNEL_MR as MR
from tilewise.kernels.cpu.simd import CHANNEL_NV as NV
from tilewise.kernels.cpu.simd import address, lane_count, lanes, micro_kernel
from tilewise.kernels.cpu.vector_move import add_rows, add_scaled, copy_vector, transpose_square_to

# Pixels whose U for one panel stays in L1: 144 * 48 * 4 = 28 KB.
DEPTH = 144
# Pixels packed at a time: long enough rows of NCHW, short enough pieces of NHWC to share out.
PIECE = 512
# U and V of one part of the pixels: in L2, and so few that the weights, to which every part adds, pass by rarely.
BYTES, SMALL_BYTES, SMALL_WEIGHTS = 2 << 20, 1 << 19, 1 << 17
# Shares of the pixels where there are so few weights, and bytes of U and V for one piece of a share: a quarter of L2.
# Where the fewest pixels take more than twice that, there are no shares.
SHARES, FEW_WEIGHTS, SHARE_BYTES = 8, 1 << 15, 1 << 18
# Pixels a piece of a share has at least. Pieces end with their image, and a product of few pixels is mostly the way of
# its sums; without shares, the pieces of all images are one product.
SHARE_PIXELS = DEPTH
# Outputs and panels of channels a block: small enough to share out the smallest layers.
BLOCK_OUTPUTS, BLOCK_PANELS = 64, 2


def plan(n, channels, size, outputs, grid, stride, channels_last, itemsize):
    """geometry for the kernels: for `gradients_by_share` where its last number, shares, is more than 1.

    A layer of stride 1 is one line of pixels an image. A piece is rows_a_piece rows of grad's pixels, or
    columns_a_piece of the line.
    """
    if tuple(stride) == (1, 1):
        size, grid = (1, size[0] * size[1]), (1, grid[0] * grid[1])
    width = NV * lane_count(itemsize)
    panel = max(MR, lane_count(itemsize))
    pixel = itemsize * (-(-channels // width) * width + -(-outputs // panel) * panel)
    if channels * outputs <= FEW_WEIGHTS:
        some = min(PIECE, max(1, SHARE_BYTES // (pixel * DEPTH)) * DEPTH)
        rows, columns, pieces = _pieces(grid, some)
        fits = rows * columns * pixel <= 2 * SHARE_BYTES
        if fits and rows * columns >= SHARE_PIXELS and n * pieces >= 2 * SHARES:
            return np.array(
                [n, channels, *size, outputs, *grid, *stride, rows, columns, pieces, 1, channels_last, SHARES], np.int64
            )
    rows, columns, pieces = _pieces(grid, PIECE)
    most = (SMALL_BYTES if channels * outputs <= SMALL_WEIGHTS else BYTES) // (pixel * rows * columns)
    parts = -(-n * pieces // max(1, most))
    part = -(-n * pieces // parts)  # pieces a part
    return np.array(
        [n, channels, *size, outputs, *grid, *stride, rows, columns, pieces, part, channels_last, 1], np.int64
    )


def _pieces(grid, pixels):
    """(rows, columns) of a piece of about so many pixels, and how many there are in an image."""
    rows, columns = min(grid[0], max(1, pixels // grid[1])), min(grid[1], pixels)
    if grid[0] > 1:
        columns = grid[1]
    return rows, columns, -(-grid[0] // rows) * -(-grid[1] // columns)


@device()
def _pack_planes(source, start, plane, some, pixels, target, step, places, panels):
    """panels[target + p * step + lane] = source[start + lane * plane + p] for lane < some, 0 beyond; places[p] = p *
    step.
    """
    width = lanes(source)
    if some == width and pixels >= width:
        for p in range(0, pixels, width):
            at = min(p, pixels - width)
            where = address(panels, target + at * step)
            transpose_square_to(where, address(places, 0), address(source, start + at), plane)
        return
    for p in range(pixels):
        clear_row(address(panels, target + p * step), width)
        for lane in range(some):
            panels[target + p * step + lane] = source[start + lane * plane + p]


@device(allocates=True)
def _pack_strided_planes(source, start, plane, some, w, row_step, stride_w, rows, columns, target, step, stage, panels):
    """The same for every stride_w-th pixel of rows that lie row_step apart; a whole row is turned on the way.

    w: pixels from start to the end of its row. stage: scratch for columns + 1 vectors.
    """
    width = lanes(source)
    last = (columns - 1) * stride_w
    w = min(w, last + width)  # what the squares read
    places = integers(w)
    for j in range(w):  # what is not wanted goes into a place never read
        places[j] = (min(j // stride_w, columns) if j % stride_w == 0 else columns) * width
    for i in range(rows):
        line = start + i * row_step
        if some == width and w >= width:
            for j in range(0, last + 1, width):
                at = min(j, w - width)
                transpose_square_to(address(stage, 0), address(places, at), address(source, line + at), plane)
        else:
            for j in range(columns):
                clear_row(address(stage, j * width), width)
                for lane in range(some):
                    stage[j * width + lane] = source[line + lane * plane + j * stride_w]
        for j in range(columns):
            copy_vector(address(panels, target + (i * columns + j) * step), address(stage, j * width))


@device()
def _pack_pixels(source, start, channels, row_step, pixel_step, rows, columns, panel, panel_step, target, panels):
    """NHWC: panels[target + c // panel * panel_step + p * panel + c % panel] = source[... + c]; 0 beyond the last."""
    width = lanes(source)
    for i in range(rows):
        for j in range(columns):
            origin = start + i * row_step + j * pixel_step
            place = target + (i * columns + j) * panel
            for c in range(0, channels - width + 1, width):
                copy_vector(address(panels, place + c // panel * panel_step + c % panel), address(source, origin + c))
            c = channels // width * width
            if c < channels:
                last = place + c // panel * panel_step + c % panel
                clear_row(address(panels, last), width)
                for k in range(channels - c):
                    panels[last + k] = source[origin + c + k]


@device(allocates=True)
def _pack(source, channels, h, w, stride_h, stride_w, piece, group, geometry, panel, panel_step, target, panels):
    """One piece of pixels: one vector of channels in NCHW, all of them in NHWC (group 0)."""
    width = lanes(source)
    oh, ow, block_rows, block_columns, pieces = geometry[5], geometry[6], geometry[9], geometry[10], geometry[11]
    across = (ow + block_columns - 1) // block_columns
    image, number = piece // pieces, piece % pieces
    i0, j0 = number // across * block_rows, number % across * block_columns
    rows, columns = min(block_rows, oh - i0), min(block_columns, ow - j0)
    target += ((image * oh + i0) * ow + j0) * panel
    inside = i0 * stride_h * w + j0 * stride_w
    if geometry[13]:
        start = (image * h * w + inside) * channels
        _pack_pixels(
            source, start, channels, stride_h * w * channels, stride_w * channels, rows, columns, panel, panel_step,
            target, panels,
        )  # fmt: skip
        return
    c = group * width
    start = (image * channels + c) * h * w + inside
    some = min(width, channels - c)
    target += c // panel * panel_step + c % panel
    if stride_h == 1 and stride_w == 1 and oh == 1:
        places = progression(panel, width)
        _pack_planes(source, start, h * w, some, columns, target, panel, places, panels)
    else:
        stage = scratch((columns + 1) * width, source)
        _pack_strided_planes(
            source, start, h * w, some, w - j0 * stride_w, stride_h * w, stride_w, rows, columns, target, panel, stage,
            panels,
        )  # fmt: skip


@device(allocates=True)
def _block(u, v, pixels, u_step, v_step, panel, o0, o1, p0, p1, channels, weights, more):
    """weights[o * channels + c] (+)= the products of a block: outputs o0 .. o1, panels p0 .. p1 of channels.

    They add up in scratch: the weights of an output often lie a power of two apart, where they would compete for a few
    places of L1.
    """
    width = NV * lanes(u)
    pitch = BLOCK_PANELS * width
    sums = scratch(((o1 - o0 + MR - 1) // MR * MR) * pitch, u)
    steps = (pixels + DEPTH - 1) // DEPTH
    length = (pixels + steps - 1) // steps
    for k in range(0, pixels, length):
        depth, add = min(length, pixels - k), 1 if k > 0 else 0
        for p in range(p0, p1):
            right = address(u, p * u_step + k * width)
            columns = channels - p * width
            for o in range(o0, o1, MR):
                left = address(v, o // panel * v_step + k * panel + o % panel)
                c = address(sums, (o - o0) * pitch + (p - p0) * width)
                if columns > 2 * lanes(u):
                    micro_kernel(MR, NV, left, panel, right, width, depth, c, pitch, MR, width, add)
                elif columns > lanes(u):
                    micro_kernel(MR, 2, left, panel, right, width, depth, c, pitch, MR, width, add)
                else:
                    micro_kernel(MR, 1, left, panel, right, width, depth, c, pitch, MR, width, add)
    columns, zero, one = min(channels - p0 * width, pitch), sums.dtype.type(0), sums.dtype.type(1)
    for o in range(o0, o1):
        to, source = step(weights, o * channels + p0 * width), address(sums, (o - o0) * pitch)
        if more:
            add_scaled(to, source, one, columns)
        else:
            finish_row(1, to, source, columns, zero, 0, to, 0)


@device()
def _pixels_before(piece, geometry):
    """How many pixels lie before a piece, counted through all images."""
    oh, ow, rows, columns, pieces = geometry[5], geometry[6], geometry[9], geometry[10], geometry[11]
    across = (ow + columns - 1) // columns
    row, column = piece % pieces // across * rows, piece % pieces % across * columns
    return (piece // pieces * oh + row) * ow + column


@device(allocates=True)
def _share(x, grad, first, last, geometry, weights, wants_weight, sums, wants_bias):
    """The sums over the pieces first .. last, at least one, to `weights`, and grad's to `sums`; what is wanted."""
    channels, h, w, outputs, oh, ow = geometry[1], geometry[2], geometry[3], geometry[4], geometry[5], geometry[6]
    stride_h, stride_w, most = geometry[7], geometry[8], geometry[9] * geometry[10]
    lane = lanes(x)
    width, panel = NV * lane, max(MR, lane)
    u_step, v_step = most * width + lane, most * panel + lane
    panels = (channels + width - 1) // width if wants_weight else 0
    u, v = scratch(panels * u_step, x), scratch((outputs + panel - 1) // panel * v_step, x)
    groups = (1 if geometry[13] else (channels + lane - 1) // lane) if wants_weight else 0
    bands = 1 if geometry[13] else (outputs + lane - 1) // lane
    summed = outputs if wants_bias else 0
    clear_row(sums, (summed + lane - 1) // lane * lane)
    for piece in range(first, last):
        before = _pixels_before(piece, geometry)
        pixels = _pixels_before(piece + 1, geometry) - before
        for i in range(groups):
            _pack(x, channels, h, w, stride_h, stride_w, piece, i, geometry, width, u_step, -before * width, u)
        for i in range(bands):
            _pack(grad, outputs, oh, ow, 1, 1, piece, i, geometry, panel, v_step, -before * panel, v)
        for o in range(0, outputs, BLOCK_OUTPUTS):
            for p in range(0, panels, BLOCK_PANELS):
                _block(
                    u, v, pixels, u_step, v_step, panel, o, min(outputs, o + BLOCK_OUTPUTS), p,
                    min(panels, p + BLOCK_PANELS), channels, weights, 1 if piece > first else 0,
                )  # fmt: skip
        for o in range(0, summed, lane):
            add_rows(step(sums, o), address(v, o // panel * v_step + o % panel), panel, pixels)
    keep(u)
    keep(v)


@kernel()
def gradients_by_share(x, grad, result, bias, geometry):
    """As `pointwise_gradients`, for few weights and many pixels."""
    units, outputs, shares = geometry[0] * geometry[11], geometry[4], geometry[14]
    size, padded = result.size, (outputs + lanes(x) - 1) // lanes(x) * lanes(x)
    weights, sums = scratch(shares * size, x), scratch(shares * padded, x)
    for share in prange(shares):
        _share(
            x, grad, units * share // shares, units * (share + 1) // shares, geometry, address(weights, share * size),
            size > 0, address(sums, share * padded), bias.size > 0,
        )  # fmt: skip
    for share in range(1, shares):
        add_scaled(address(weights, 0), address(weights, share * size), x.dtype.type(1), size)
        add_scaled(address(sums, 0), address(sums, share * padded), x.dtype.type(1), bias.size)
    result[:] = weights[:size]
    bias[:] = sums[: bias.size]
    keep(weights)
    keep(sums)


@kernel()
def pointwise_gradients(x, grad, result, bias, geometry):
    """result: (outputs, channels), flat, or empty. bias: (outputs,), or empty. For a `plan`."""
    n, channels, h, w, outputs = geometry[0], geometry[1], geometry[2], geometry[3], geometry[4]
    oh, ow, stride_h, stride_w = geometry[5], geometry[6], geometry[7], geometry[8]
    pieces, part = geometry[11], geometry[12]
    lane = lanes(x)
    width, panel = NV * lane, max(MR, lane)
    most = min(part * geometry[9] * geometry[10], n * oh * ow)
    u_step, v_step = most * width + lane, most * panel + lane  # a cache line more than a power of two
    panels = (channels + width - 1) // width if result.size > 0 else 0
    u, v = scratch(panels * u_step, x), scratch((outputs + panel - 1) // panel * v_step, x)
    groups = 1 if geometry[13] else (channels + lane - 1) // lane
    groups = groups if result.size > 0 else 0
    bands = 1 if geometry[13] else (outputs + lane - 1) // lane
    across = (panels + BLOCK_PANELS - 1) // BLOCK_PANELS
    sums = scratch((outputs + lane - 1) // lane * lane, x)
    clear_row(address(sums, 0), sums.size)
    for first in range(0, n * pieces, part):
        last = min(n * pieces, first + part)
        before = _pixels_before(first, geometry)
        pixels = _pixels_before(last, geometry) - before
        for chunk in prange((last - first) * (groups + bands)):
            piece, i = first + chunk // (groups + bands), chunk % (groups + bands)
            if i < groups:
                _pack(x, channels, h, w, stride_h, stride_w, piece, i, geometry, width, u_step, -before * width, u)
            else:
                _pack(grad, outputs, oh, ow, 1, 1, piece, i - groups, geometry, panel, v_step, -before * panel, v)
        more = 1 if first > 0 else 0
        for block in prange((outputs + BLOCK_OUTPUTS - 1) // BLOCK_OUTPUTS * across):
            o0, p0 = block // across * BLOCK_OUTPUTS, block % across * BLOCK_PANELS
            _block(
                u, v, pixels, u_step, v_step, panel, o0, min(outputs, o0 + BLOCK_OUTPUTS), p0,
                min(panels, p0 + BLOCK_PANELS), channels, address(result, 0), more,
            )  # fmt: skip
        if bias.size > 0:
            for o in range(0, outputs, lane):
                add_rows(address(sums, o), address(v, o // panel * v_step + o % panel), panel, pixels)
    for o in range(bias.size):
        bias[o] = sums[o]


class PointwiseGradient:
    """The gradients of the weight and the bias of a 1x1 convolution without padding, of one group."""

    def __init__(self, grad, x, weight, stride, layout, dtype):
        self.shape, self.dtype = weight, dtype
        size, grid = image_size(x, layout), image_size(grad, layout)
        nhwc = layout == "NHWC"
        self.plan = plan(x[0], weight[1], size, weight[0], grid, stride, nhwc, dtype.itemsize)
        function = gradients_by_share if self.plan[14] > 1 else pointwise_gradients
        self.kernel = function.sized(2 * x[0] * grid[0] * grid[1] * weight[0] * weight[1] * COST["gemm"])

    def __call__(self, grad, x, wants_weight, wants_bias):
        """(gradient of the weight or None, gradient of the bias or None)."""
        result = np.empty(self.shape if wants_weight else 0, self.dtype)
        bias = np.empty(self.shape[0] if wants_bias else 0, self.dtype)
        self.kernel(x.ravel(), grad.ravel(), result.ravel(), bias, self.plan)
        return result if wants_weight else None, bias if wants_bias else None
