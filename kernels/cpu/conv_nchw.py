"""Convolution in NCHW as an implicit matrix product on phase planes: no im2col matrix, no gather per tap.

For one image and group, with k running over (channel, tap row, tap column):

    y[o, pixel] = sum over k of weight[o, k] * x[channel, pixel's row and column shifted by the tap], 0 outside x

A block of output rows copies the rows of x that it needs into planes, with the padding as zeros, and one plane for
each phase of the stride. In a plane all taps of neighbouring pixels are neighbours, whatever stride, dilation or
padding were:

    plane (stride 1, 3x3, width 5)      output pixel p = i * 6 + j, flattened over the padded width
    0 0 0 0 0 0                         tap (r, s) of pixel p lies at p + r * 6 + s
    0 a b c d e                         the zero behind e is the one before f
    0 f g h i j                         pixels with j >= 5 are waste: computed, never written

So a vector of pixels is one unaligned load at an offset that depends on k alone, and the product reads x from the
planes through a table of offsets (`offset_product`). Each element of x is copied about once, where columns would be
copied KH * KW times; the waste is at most (KW - 1) / width of the arithmetic.

A tap is given by its offset in x, not by kernel size and dilation: the gradient with respect to x is the same sum with
other offsets, one for each phase of its stride (see conv.py), written to every stride-th pixel. What follows from the
shapes is worked out once, by conv_nchw_plan.py. Each chunk owns a block of rows of one image (or of a few small ones)
and a range of outputs.
"""

from numba import prange

from tilewise.kernels.cpu.emitted import emitted
from tilewise.kernels.cpu.epilogue import BOUNDED, activate_row, bounds_of
from tilewise.kernels.cpu.jit import kernel
from tilewise.kernels.cpu.offset_kernel import offset_product
from tilewise.kernels.cpu.phase_planes import copy_planes
from tilewise.kernels.cpu.row_moves import clear_row, finish_row
from tilewise.kernels.cpu.scratch import integer_table, integers, scratch
from tilewise.kernels.cpu.simd import CHANNEL_MR as MR
from tilewise.kernels.cpu.simd import CHANNEL_NV as NV
from tilewise.kernels.cpu.simd import address, lanes


@emitted
def _find_runs(p0, end, ow, pitch, rows, image_step, row_step, column_step, runs):
    """Lanes of the panel p0 .. end that are pixels, not waste: runs[r] = (lane, count, offset in y)."""
    n = 0
    line = p0 // pitch
    column = p0 - line * pitch
    lane = 0
    while p0 + lane < end:
        count = min(ow - column, end - p0 - lane)
        if count > 0:
            image = line // rows
            runs[n, 0], runs[n, 1] = lane, count
            runs[n, 2] = image * image_step + (line - image * rows) * row_step + column * column_step
            n += 1
        lane += pitch - column
        column = 0
        line += 1
    return n


@emitted
def _finish_tile(sums, tile, width, outputs, runs, n_runs, y, target, plane, column_step, bias, first, extra, code):
    """Bias, extra summand and activation, on the way from a register tile's sums to y."""
    has_extra = 1 if extra.size > 0 else 0
    for o in range(outputs):
        shift = bias[first + o] if bias.size > 0 else sums.dtype.type(0)
        for r in range(n_runs):
            source, count = tile + o * width + runs[r, 0], runs[r, 1]
            where = target + o * plane + runs[r, 2]
            more = where if has_extra else 0
            if column_step == 1:
                finish_row(
                    1, address(y, where), address(sums, source), count, shift, bounds_of(code),
                    address(extra, more), has_extra,
                )  # fmt: skip
                if code > BOUNDED:
                    activate_row(y, where, count, code)
            elif column_step == 2:
                finish_row(
                    2, address(y, where), address(sums, source), count, shift, bounds_of(code),
                    address(extra, more), has_extra,
                )  # fmt: skip
            else:  # a gradient, or transposed, so without an activation
                for j in range(count):
                    value = sums[source + j] + shift
                    if has_extra:
                        value += extra[where + j * column_step]
                    y[where + j * column_step] = value


@emitted
def _place_vectors(runs, n_runs, vectors, lane_width, places):
    """The runs vector by vector, for `offset_product`; False where a vector has more than two."""
    at = 0
    for j in range(vectors):
        begin, end = j * lane_width, (j + 1) * lane_width
        while at < n_runs and runs[at, 0] + runs[at, 1] <= begin:
            at += 1
        if at + 2 < n_runs and runs[at + 2, 0] < end:
            return False
        for part in range(2):
            field, run = 6 * j + 3 * part, at + part
            if run < n_runs and runs[run, 0] < end:
                places[field] = max(0, runs[run, 0] - begin)
                places[field + 1] = min(lane_width, runs[run, 0] + runs[run, 1] - begin)
                places[field + 2] = runs[run, 2] + begin - runs[run, 0]
            else:
                places[field] = places[field + 1] = 0
                places[field + 2] = places[6 * j + 2] if part else runs[0, 2]
    return True


@emitted
def _product(
    vectors, weight, left, whole, source, p, offsets, table, depth, sums, tile, size, accumulate, outputs, finishing, y,
    target, plane, places, bias, first, bounds, panels, beside,
):  # fmt: skip
    """By the narrowest of three tiles that is wide enough."""
    a, b, c, steps = address(weight, left), address(source, p), address(sums, tile), address(offsets, table)
    to, where = address(y, target), address(places, 0)
    has_bias = 1 if bias.size > 0 else 0
    shift = address(bias, first if has_bias else 0)
    if vectors >= NV:
        offset_product(
            MR, NV, a, whole, b, steps, depth, c, size, accumulate, outputs, finishing, to, plane, where, shift,
            has_bias, bounds, panels, beside,
        )  # fmt: skip
    elif vectors == 2:
        offset_product(
            MR, 2, a, whole, b, steps, depth, c, size, accumulate, outputs, finishing, to, plane, where, shift,
            has_bias, bounds, panels, beside,
        )  # fmt: skip
    else:
        offset_product(
            MR, 1, a, whole, b, steps, depth, c, size, accumulate, outputs, finishing, to, plane, where, shift,
            has_bias, bounds, panels, beside,
        )  # fmt: skip


@emitted
def _block(
    x, base, image_step, images, row0, rows, weight, start, outputs, geometry, offsets, phases,
    in_place, y, target, bias, bias_start, extra,
):  # fmt: skip
    channels, ow, n_taps, n_phases, extra_rows = geometry[2], geometry[7], geometry[10], geometry[11], geometry[12]
    pitch, block, plane = geometry[13], geometry[17], geometry[18]
    y_plane, row_step, column_step, code = geometry[20], geometry[21], geometry[22], geometry[23]
    y_image = geometry[1] * geometry[5] * y_plane
    line, lines, per_line = geometry[24], geometry[25], geometry[28]
    whole, width = channels * n_taps, NV * lanes(x)
    pixels = (images * rows - 1) * pitch + ow
    n_panels = rows * per_line if per_line else (pixels + width - 1) // width
    tiles, tile_size = (outputs + MR - 1) // MR, MR * width
    size = min(block, channels) * n_phases * plane if not in_place else 0
    spare = width + geometry[27]
    planes = scratch(size + width + spare, x)
    clear_row(address(planes, size), spare)
    sums = scratch(tile_size * (n_panels * tiles if block < channels else 1), x)
    runs, places = integer_table(width + 1, 3), integers(6 * NV)
    n_runs = 0
    in_registers = False
    for c0 in range(0, channels, block):
        some = min(block, channels - c0)
        depth = some * n_taps
        channel = base + c0 * geometry[3] * geometry[4]
        if in_place:
            source, first, table = x, channel + row0 * pitch, block * n_taps
        else:
            source, first, table = planes, 0, 0
            copy_planes(x, channel, image_step, images, some, row0, rows + extra_rows, geometry, phases, planes)
        left = start + c0 * n_taps
        last = c0 + some == channels
        following = 0
        while following < n_panels:
            panel, following = following, following + 1
            p, end = panel * width, pixels
            if per_line:
                p = panel // per_line * pitch + panel % per_line * width
                end = panel // per_line * pitch + line
            vectors = (end - p + lanes(x) - 1) // lanes(x)
            if last:
                n_runs = _find_runs(
                    p, min(end, p + width), line, line + pitch - ow, lines, y_image, row_step, column_step, runs
                )
                placed = _place_vectors(runs, n_runs, min(vectors, NV), lanes(x), places)
                in_registers = placed and column_step == 1 and code <= BOUNDED and extra.size == 0
            tile = panel * tiles * tile_size if block < channels else 0
            panels = max(1, (end - p) // width) if in_registers and per_line else 1
            following = panel + panels
            # what is finished outside the registers is finished tile by tile, still in L1
            together = outputs if in_registers or not last else MR
            for o in range(0, outputs, together):
                one = tile + o // MR * tile_size if block < channels else 0
                count = min(together, outputs - o)
                _product(
                    vectors, weight, left + o * whole, whole, source, first + p, offsets, table, depth, sums, one,
                    tile_size, c0, count, 1 if in_registers else 0, y, target, y_plane, places, bias, bias_start, code,
                    panels, tiles * tile_size if block < channels else 0,
                )  # fmt: skip
                if last and not in_registers:
                    _finish_tile(
                        sums, one, min(vectors, NV) * lanes(x), count, runs, n_runs, y, target + o * y_plane, y_plane,
                        column_step, bias, bias_start + o, extra, code,
                    )  # fmt: skip


@kernel(one_by_one=True)
def convolve(x, weight, y, bias, extra, geometry, offsets, phases):
    """y = activation(convolution(x, weight) + bias + extra), all arrays flat, for a `plan`.

    weight: (groups * outputs, channels, taps). Pixel (i, j) of output o of image b is y[(b * groups * outputs + o) *
    plane + start + i * row step + j * column step]. extra: empty, or laid out as y; it may be y itself.
    """
    n, groups, channels, h, w = geometry[0], geometry[1], geometry[2], geometry[3], geometry[4]
    outputs, oh, n_taps = geometry[5], geometry[6], geometry[10]
    block_rows, images, splits = geometry[14], geometry[15], geometry[16]
    y_start, y_plane = geometry[19], geometry[20]
    whole = channels * n_taps
    tiles = (outputs + MR - 1) // MR
    row_blocks = (oh + block_rows - 1) // block_rows
    image_blocks = (n + images - 1) // images
    split_outputs = (tiles + splits - 1) // splits * MR
    for chunk in prange(image_blocks * groups * row_blocks * splits):
        first = chunk % splits * split_outputs
        row0 = chunk // splits % row_blocks * block_rows
        g = chunk // (splits * row_blocks) % groups
        image = chunk // (splits * row_blocks * groups) * images
        some = min(split_outputs, outputs - first)
        if some > 0:
            # the last block of all would read a panel's width beyond x
            in_place = geometry[26] == 1 and (image + 1 < n or g + 1 < groups or row0 + block_rows < oh)
            _block(
                x, (image * groups + g) * channels * h * w, groups * channels * h * w, min(images, n - image),
                row0, min(block_rows, oh - row0), weight, (g * outputs + first) * whole, some,
                geometry, offsets, phases, in_place,
                y, y_start + ((image * groups + g) * outputs + first) * y_plane + row0 * geometry[21], bias,
                g * outputs + first, extra,
            )  # fmt: skip
