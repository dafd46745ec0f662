"""The weight gradient of a 3x3 convolution of stride 1 by Winograd: F(4x4, 3x3) transposed, 36 products for 144.

The forward pass is y = A^T [ (G w G^T) * (B^T d B) ] A for each 4x4 tile of y (winograd_vector.py; * elementwise). It
is linear in w, and the gradient is the transpose of that map, summed over tiles before it is transformed back:

    grad_weight[o, c] = G^T [ sum over tiles of (A g A^T) * (B^T d B) ] G      g: 4x4 of grad, d: 6x6 of x

Its 36 elementwise sums are 36 matrix products of outputs x tiles by tiles x channels:

    grad, 4 rows -> stage -> V[o, xi, tile]  \
                                               M[xi, o, c] = sum over tiles -> G^T M G -> weights
    x, 6 rows ---> stage -> U[c, xi, tile]   /

In both layouts the vectors run along channels (of grad: outputs). The stage holds a row of tiles for one vector of
channels, with zeros around; in NCHW its squares are turned in registers. A chunk then owns a block of outputs and
channels, whose M stays in L2. Where U and V would outgrow BYTES, the tiles are taken in parts, and all of M is kept.

Error: as forward (conv_winograd.py), a relative 2-norm of 1e-6 to 3e-6; a test holds it below 1e-5. A NaN or an Inf
would spread to all nine taps: the kernel says whether everything it wrote is finite, and the caller falls back on the
implicit product where not.
"""

import numpy as np
from numba import prange

from tilewise.kernels.cpu.conv_winograd import apart
from tilewise.kernels.cpu.emitted import emitted
from tilewise.kernels.cpu.jit import kernel
from tilewise.kernels.cpu.row_moves import clear_row
from tilewise.kernels.cpu.scratch import integers, progression, scratch, zeros
from tilewise.kernels.cpu.simd import CHANNEL_MR as MR
from tilewise.kernels.cpu.simd import CHANNEL_NV as NV
from tilewise.kernels.cpu.simd import address, lane_count, micro_kernel
from tilewise.kernels.cpu.vector_move import add_rows, add_scaled, copy_vector, transpose_square_to
from tilewise.kernels.cpu.winograd_vector import _Algebra, _transform, input_transform

LANES = lane_count(4)  # float32 only, as in conv_winograd.py
NR = NV * LANES
# Outputs a panel of V: whole vectors, and whole tiles.
PANEL = max(MR, LANES)
# A block of M: 36 * 64 * 96 * 4 = 885 KB.
BLOCK_OUTPUTS, BLOCK_PANELS = 64, 2
# Tiles whose U for one panel stays in L1: 128 * 48 * 4 = 25 KB.
DEPTH = 128
# U and V of as many tiles at a time: above 32 MB, malloc maps memory anew in every call; where M is small too, all of
# it stays in L2.
BYTES, SMALL_BYTES, SMALL_WEIGHTS = 24 << 20, 2 << 20, 1 << 13


def _grad_rows(emit, g):
    m = _Algebra(emit)
    even, odd = m.plus(1, g[0], g[2]), m.plus(1, g[1], g[3])
    far_even, far_odd = m.plus(4, g[2], g[0]), m.scaled(2, m.plus(4, g[3], g[1]))
    return [
        g[0],
        m.plus(1, even, odd),
        m.plus(-1, odd, even),
        m.plus(1, far_even, far_odd),
        m.plus(-1, far_odd, far_even),
        g[3],
    ]


def _weight_rows(emit, p):
    m = _Algebra(emit)
    near, near_difference = m.plus(1, p[1], p[2]), m.plus(-1, p[1], p[2])
    far, far_difference = m.plus(1, p[3], p[4]), m.plus(-1, p[4], p[3])
    return [
        m.plus(1 / 4, p[0], m.plus(-1 / 6, near, m.scaled(1 / 24, far))),
        m.plus(1 / 6, near_difference, m.scaled(1 / 12, far_difference)),
        m.plus(1 / 6, m.plus(-1, near, far), p[5]),
    ]


grad_transform = _transform("A g A^T: 4x4 pixels of grad to 6x6.", 4, 6, _grad_rows)
weight_back_transform = _transform("G^T m G: 6x6 to 3x3 taps.", 6, 3, _weight_rows)


def plan(n, channels, size, outputs, grid, lows, channels_last):
    """(geometry,) for `weight_gradient`. size: of x. grid: of grad. lows: the offsets of the first taps, 0 or below."""
    rows, columns = (-(-g // 4) for g in grid)
    panels, bands = -(-channels // NR), -(-outputs // PANEL)
    most = (SMALL_BYTES if channels * outputs <= SMALL_WEIGHTS else BYTES) // (
        36 * 4 * columns * (panels * NR + bands * PANEL)
    )
    parts = -(-n * rows // max(1, most))
    units = -(-n * rows // parts)  # rows of tiles a part
    return (
        np.array(
            [n, channels, *size, outputs, *grid, -lows[0], -lows[1], rows, columns, units, channels_last], np.int64
        ),
    )


def estimate(n, channels, outputs, grid):
    """Nanoseconds on one thread of an AVX-512 machine with 230 GFLOP/s: M back, the products, the transforms."""
    tiles = n * -(-grid[0] // 4) * -(-grid[1] // 4)
    channels, outputs = -(-channels // LANES) * LANES, -(-outputs // PANEL) * PANEL
    return channels * outputs * (5.5 + 72 * tiles / 180) + 8 * tiles * (channels + outputs)


@emitted
def _places(rows, columns, left, pitch):
    """Where pixel (i, j) of some rows of an image lies in the stage."""
    places = integers(rows * columns)
    for i in range(rows):
        for j in range(columns):
            places[i * columns + j] = (i * pitch + j + left) * LANES
    return places


@emitted
def _x_places(geometry):
    return _places(6, geometry[3], geometry[8], 4 * geometry[10] + 2)


@emitted
def _grad_places(geometry):
    return _places(4, geometry[6], 0, 4 * geometry[10])


@emitted
def _fill_stage(source, image, rows, size_h, size_w, first_row, channels, c, channels_last, places, pitch, stage):
    """stage[(i * pitch + j + left) * LANES + lane] = channel c + lane of the pixels of `rows` rows from first_row on,
    those inside the image; the rest of the stage is 0 already, and rows outside are cleared here.
    """
    skipped, end = max(0, -first_row), max(0, min(rows, size_h - first_row))
    if skipped > 0:
        clear_row(address(stage, 0), skipped * pitch * LANES)
    if end < rows:
        clear_row(address(stage, end * pitch * LANES), (rows - end) * pitch * LANES)
    pixels = (end - skipped) * size_w
    some = min(LANES, channels - c)
    target = skipped * pitch * LANES
    if channels_last:
        start = (image * size_h + first_row + skipped) * size_w * channels + c
        for q in range(pixels):
            if some == LANES:
                copy_vector(address(stage, target + places[q]), address(source, start + q * channels))
            else:
                for lane in range(some):
                    stage[target + places[q] + lane] = source[start + q * channels + lane]
        return
    plane = size_h * size_w
    start = (image * channels + c) * plane + (first_row + skipped) * size_w
    if some == LANES and pixels >= LANES:
        for q in range(0, pixels, LANES):
            at = min(q, pixels - LANES)
            transpose_square_to(address(stage, target), address(places, at), address(source, start + at), plane)
        return
    for lane in range(some):
        for q in range(pixels):
            stage[target + places[q] + lane] = source[start + lane * plane + q]


@emitted
def _transform_x(x, unit, c, geometry, places, target, step, values):
    """One row of tiles of one vector of channels: values[target + xi * step + tile * NR]."""
    channels, h, w, top = geometry[1], geometry[2], geometry[3], geometry[7]
    rows, columns = geometry[9], geometry[10]
    pitch = 4 * columns + 2
    stage = scratch(6 * pitch * LANES, x)
    clear_row(address(stage, 0), 6 * pitch * LANES)
    image = unit // rows
    first = (unit - image * rows) * 4 - top
    _fill_stage(x, image, 6, h, w, first, channels, c, geometry[12], places, pitch, stage)
    for tile in range(columns):
        source = address(stage, tile * 4 * LANES)
        input_transform(address(values, target + tile * NR), step, source, pitch * LANES, LANES)


@emitted
def _transform_grad(grad, unit, o, geometry, places, target, step, values):
    """The same for grad: values[target + xi * step + tile * PANEL]."""
    outputs, oh, ow, rows, columns = geometry[4], geometry[5], geometry[6], geometry[9], geometry[10]
    pitch = 4 * columns
    stage = scratch(4 * pitch * LANES, grad)
    clear_row(address(stage, 0), 4 * pitch * LANES)
    image = unit // rows
    first = (unit - image * rows) * 4
    _fill_stage(grad, image, 4, oh, ow, first, outputs, o, geometry[12], places, pitch, stage)
    for tile in range(columns):
        source = address(stage, tile * 4 * LANES)
        grad_transform(address(values, target + tile * PANEL), step, source, pitch * LANES, LANES)


@emitted
def _multiply(u, v, tiles, u_step, v_step, o0, o1, p0, p1, channels, sums, start, step, pitch, more):
    """sums[start + xi * step + (o - o0) * pitch + c] (+)= the products of a block: panels p0 .. p1 of channels."""
    for xi in range(36):
        for k in range(0, tiles, DEPTH):
            depth = min(DEPTH, tiles - k)
            add = 1 if k > 0 else more
            for p in range(p0, p1):
                right = address(u, (p * 36 + xi) * u_step + k * NR)
                vectors = (channels - p * NR + LANES - 1) // LANES
                for o in range(o0, o1, MR):
                    left = address(v, (o // PANEL * 36 + xi) * v_step + k * PANEL + o % PANEL)
                    c = address(sums, start + xi * step + (o - o0) * pitch + (p - p0) * NR)
                    if vectors >= NV:
                        micro_kernel(MR, NV, left, PANEL, right, NR, depth, c, pitch, MR, NR, add)
                    elif vectors == 2:
                        micro_kernel(MR, 2, left, PANEL, right, NR, depth, c, pitch, MR, NR, add)
                    else:
                        micro_kernel(MR, 1, left, PANEL, right, NR, depth, c, pitch, MR, NR, add)


@emitted
def _interleave(taps, weights, places):
    """weights[9 * lane + t] = taps[t * LANES + lane]; up to 7 numbers more are written."""
    t = 0
    while t < 9:
        if t + LANES <= 9 or LANES > 9:
            transpose_square_to(address(weights, t), address(places, 0), address(taps, t * LANES), LANES)
            t += LANES
        else:
            for lane in range(LANES):
                weights[9 * lane + t] = taps[t * LANES + lane]
            t += 1


@emitted
def _write_weights(sums, start, step, pitch, o0, o1, c0, c1, channels, result):
    """Transform a block of M back; returns whether all of its weights are finite."""
    taps, weights = scratch(max(9, LANES) * LANES, sums), scratch(10 * LANES, sums)
    clear_row(address(taps, 0), max(9, LANES) * LANES)
    residue = scratch(9 * LANES, sums)
    clear_row(address(residue, 0), 9 * LANES)
    places = progression(9, LANES)
    zero = sums.dtype.type(0)
    for o in range(o0, o1):
        for c in range(c0, c1, LANES):
            source = address(sums, start + (o - o0) * pitch + c - c0)
            weight_back_transform(address(taps, 0), LANES, source, 6 * step, step)
            _interleave(taps, weights, places)
            target, some = (o * channels + c) * 9, min(LANES, c1 - c)
            # a NaN or an Inf times 0 is NaN, and a NaN stays one in a sum
            add_scaled(address(residue, 0), address(weights, 0), zero, 9 * some)
            if some == LANES:
                for i in range(9):
                    copy_vector(address(result, target + i * LANES), address(weights, i * LANES))
            else:
                for i in range(9 * some):
                    result[target + i] = weights[i]
    finite = True
    for i in range(9 * LANES):
        finite &= residue[i] == zero
    return finite


@emitted
def _steps(geometry):
    """The distances in U and V of two elementwise products."""
    tiles = geometry[11] * geometry[10]
    return apart(tiles * NR), apart(tiles * PANEL)


@emitted
def _sizes(geometry, result):
    """Elements of U, V, the sums kept between parts, and the bias' totals; rows of tiles; vectors of channels and
    outputs to transform in each; blocks of M.
    """
    n, channels, outputs, rows, part = geometry[0], geometry[1], geometry[4], geometry[9], geometry[11]
    u_step, v_step = _steps(geometry)  # pyright: ignore
    panels, bands = (channels + NR - 1) // NR, (outputs + LANES - 1) // LANES
    u, v = panels * 36 * u_step, (outputs + PANEL - 1) // PANEL * 36 * v_step
    groups = (channels + LANES - 1) // LANES if result.size > 0 else 0
    across = (panels + BLOCK_PANELS - 1) // BLOCK_PANELS
    blocks = (outputs + BLOCK_OUTPUTS - 1) // BLOCK_OUTPUTS * across if result.size > 0 else 0
    kept = blocks * 36 * apart(BLOCK_OUTPUTS * BLOCK_PANELS * NR) if part < n * rows else 0
    return u, v, kept, bands * LANES, n * rows, groups + bands, blocks


@emitted
def _transform_vector(x, grad, u, v, x_places, grad_places, geometry, first, each, chunk):
    """A vector of channels, or of outputs, of a row of tiles of a part that begins with row `first`."""
    columns = geometry[10]
    u_step, v_step = _steps(geometry)  # pyright: ignore
    unit = chunk // each
    i = chunk - unit * each
    groups = each - (geometry[4] + LANES - 1) // LANES
    if i < groups:
        c = i * LANES
        target = c // NR * 36 * u_step + unit * columns * NR + c % NR
        _transform_x(x, first + unit, c, geometry, x_places, target, u_step, u)
    else:
        o = (i - groups) * LANES
        target = o // PANEL * 36 * v_step + unit * columns * PANEL + o % PANEL
        _transform_grad(grad, first + unit, o, geometry, grad_places, target, v_step, v)


@emitted
def _block(u, v, geometry, first, units, block, sums, result, wrong):
    """One block of M from a part of the tiles: its products, and with the last part its weights. Where the tiles come
    in parts, `sums` holds all blocks; wrong[block] = 1 where a weight is not finite.
    """
    channels, outputs, lines = geometry[1], geometry[4], geometry[0] * geometry[9]
    u_step, v_step = _steps(geometry)  # pyright: ignore
    pitch = BLOCK_PANELS * NR
    step = apart(BLOCK_OUTPUTS * pitch)
    panels = (channels + NR - 1) // NR
    across = (panels + BLOCK_PANELS - 1) // BLOCK_PANELS
    o0, p0 = block // across * BLOCK_OUTPUTS, block % across * BLOCK_PANELS
    o1, p1 = min(outputs, o0 + BLOCK_OUTPUTS), min(panels, p0 + BLOCK_PANELS)
    in_parts = geometry[11] < lines
    own = scratch(0 if in_parts else 36 * step, u)
    products = sums if in_parts else own
    start = block * 36 * step if in_parts else 0
    tiles, more = units * geometry[10], 1 if first > 0 else 0
    _multiply(u, v, tiles, u_step, v_step, o0, o1, p0, p1, channels, products, start, step, pitch, more)
    if first + units == lines and not _write_weights(
        products, start, step, pitch, o0, o1, p0 * NR, min(channels, p1 * NR), channels, result
    ):
        wrong[block] = 1


@emitted
def _add_bias(v, geometry, units, totals, bias):
    """totals += the sums of grad over a part's tiles."""
    if bias.size == 0:
        return
    _, v_step = _steps(geometry)  # pyright: ignore
    for o in range(0, geometry[4], LANES):
        # V[7] = V[1, 1] is the plain sum of a tile
        tiles = address(v, (o // PANEL * 36 + 7) * v_step + o % PANEL)
        add_rows(address(totals, o), tiles, PANEL, units * geometry[10])


@emitted
def _finish(totals, bias, wrong, blocks):
    """Writes the bias; returns whether all blocks' weights are finite."""
    for o in range(bias.size):
        bias[o] = totals[o]
    bad = 0
    for block in range(blocks):
        bad += wrong[block]
    return bad == 0


@kernel()
def weight_gradient(x, grad, result, bias, geometry):
    """result: (outputs, channels, 3, 3), flat, or empty; bias: the sums of grad over its pixels, (outputs,), or empty;
    for a `plan`. Returns whether all of the result is finite.
    """
    u_size, v_size, kept, padded, lines, each, blocks = _sizes(geometry, result)  # pyright: ignore
    u, v, sums, totals = scratch(u_size, x), scratch(v_size, x), scratch(kept, x), zeros(padded, x)
    x_places, grad_places = _x_places(geometry), _grad_places(geometry)
    wrong = progression(0, blocks)
    for first in range(0, lines, geometry[11]):
        units = min(geometry[11], lines - first)
        for chunk in prange(units * each):
            _transform_vector(x, grad, u, v, x_places, grad_places, geometry, first, each, chunk)
        for block in prange(blocks):
            _block(u, v, geometry, first, units, block, sums, result, wrong)
        _add_bias(v, geometry, units, totals, bias)
    return _finish(totals, bias, wrong, blocks)
