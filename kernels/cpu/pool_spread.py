"""Gradient of averages: of windows, and of adaptive bins.

A row of grad_x is a sum of rows of grad, spread over the columns. Neighbouring rows of grad_x that lie in the same
windows are equal: such a group of rows, a band, is computed once and stored as often as it has rows.

    4 windows of 5 rows, 3 apart, over 14 rows: 7 bands

    rows      0-2   3-4   5   6-7   8   9-10   11-13
    windows    0    0 1   1   1 2   2    2 3      3

First the weighted sum of a band's rows of grad goes to a part, for several planes, then each part is spread: every
column gathers from the windows that it lies in, as told by a table, so nothing is scattered. In NCHW a vector of
columns lies in few windows, which one vector of the part holds: the gather is a permutation of a register (AVX).

Everything that follows from the shapes alone is in `plan`, made once per signature (`plan_of`).
"""

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.cpu.pool_fold import SUM, fold_rows, move, sum_contiguous
from tilewise.kernels.cpu.pool_planes import PERMUTES, permuted
from tilewise.kernels.cpu.scratch import keep, scratch
from tilewise.kernels.cpu.simd import _I32, _I64, _Emitter, _literal, address, lane_count
from tilewise.kernels.cpu.vector_pass import emitted

# Elements of grad_x in the planes that are worked on at once, and of their parts: 16 KB of float32 each, to stay in L1.
PART = 4096
CHUNK = 32768  # elements of grad_x in a chunk
# The fields of a plan. SIZE: elements of a row of grad; PITCH: the distance of parts; GROUP: planes worked on at once;
# WAY, TAPS, VECTORS: of spreading; MARGIN: zeros before a part; WHOLE: pixels of an NHWC row that are written in whole
# vectors; OWN_PLANES, OWN_BANDS: of a chunk.
(
    PLANES, BANDS, H, W, C, OH, SIZE, PITCH, GROUP, WAY, TAPS, MARGIN, WHOLE, VECTORS, OWN_PLANES, OWN_BANDS
) = range(16)  # fmt: skip
# How a part is spread: pixel by pixel in NHWC; for windows one column apart as the sum of a moving window; else by
# table. FILL: nothing is, as a plane is one window.
PIXELS, SLIDE, PERMUTE, GATHER, FILL = range(5)
_REGISTERS = PERMUTE if PERMUTES else GATHER


@intrinsic(prefer_literal=True)
def weighted_rows(typingctx, known, out, out_pitch, source, source_pitch, planes, step, heights, taps, widths, count):
    """In each of `planes` planes, a pitch apart: out[i] = widths[i] * (sum over t < taps of heights[t] *
    source[t * step + i]) for i < count.

    Whole vectors are written, zeros behind the last element; nothing but the elements is read. widths must be readable
    in whole vectors. known: a literal; the number of taps where it is known, else 0.
    """
    unrolled = _literal(known)
    signature = types.void(
        known, out, types.intp, source, types.intp, types.intp, types.intp, heights, types.intp, widths, types.intp
    )

    def codegen(context, builder, signature, args):
        _, out, out_pitch, source, source_pitch, planes, step, heights, taps, widths, count = args
        emit = _Emitter(builder, signature.args[1].dtype)
        total = cgutils.alloca_once(builder, emit.vector)

        def weight(t):
            return emit.splat(builder.load(builder.gep(heights, [t])))

        weights = [weight(_I64(t)) for t in range(unrolled)]
        whole = builder.and_(count, _I64(-emit.lanes))
        mask = emit.mask(_I64(0), builder.sub(count, whole))

        def vector(pointer, i, load):
            builder.store(emit.zero, total)

            def add(t, factor):
                value = load(pointer, builder.add(builder.mul(t, step), i))
                builder.store(emit.multiply_add(factor, value, builder.load(total)), total)

            for t in range(unrolled):
                add(_I64(t), weights[t])
            if not unrolled:
                with cgutils.for_range(builder, taps) as tap:
                    add(tap.index, weight(tap.index))
            return builder.fmul(builder.load(total), emit.load(widths, i))

        with cgutils.for_range(builder, planes) as plane:
            start = builder.gep(source, [builder.mul(plane.index, source_pitch)])
            target = builder.gep(out, [builder.mul(plane.index, out_pitch)])
            with cgutils.for_range_slice(builder, _I64(0), whole, _I64(emit.lanes), inc=True) as (i, _):
                emit.store(vector(start, i, emit.load), target, i)
            with builder.if_then(builder.icmp_signed("<", whole, count)):
                rest = vector(start, whole, lambda pointer, offset: emit.masked_load(pointer, offset, mask))
                emit.store(rest, target, whole)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def spread_columns(
    typingctx, way, known, out, out_pitch, planes, rows, width, room, part, part_pitch, table, index, taps, vectors
):
    """In each of `planes` planes, for each of `vectors` vectors of columns, in `rows` rows of `width`: out[first + i] =
    the sum over taps of part[base + index[i]], where an index below zero stands for 0.

    way: PERMUTE, where every index is less than the lanes, or GATHER. known: the number of taps where it is known, else
    0; the indices then stay in registers for all planes. table: first and base of each vector; index: its `taps`
    vectors of indices, integers as wide as the elements.

    room: elements of a plane from `out` on that are the caller's to write, row after row. A row shorter than a vector
    is written as a whole one, into the rows behind it, while that stays within the room, and else under a mask: on Zen
    3, AVX2's masked store takes 12 cycles; on Zen 4, AVX-512's holds up the loads that follow.
    """
    how, unrolled = _literal(way), _literal(known)
    signature = types.void(way, known, out, *[types.intp] * 5, part, types.intp, table, index, types.intp, types.intp)

    def codegen(context, builder, signature, args):
        _, _, out, out_pitch, planes, rows, width, room, part, part_pitch, table, index, taps, vectors = args
        emit = _Emitter(builder, signature.args[2].dtype)
        places = _Emitter(builder, signature.args[11].dtype)
        total = cgutils.alloca_once(builder, emit.vector)

        def entry(v, k):
            return builder.load(builder.gep(table, [builder.add(builder.mul(v, _I64(2)), _I64(k))]))

        def indices(v, t):
            where = places.load(index, builder.mul(builder.add(builder.mul(v, taps), t), _I64(emit.lanes)))
            return where, builder.icmp_signed(">=", where, places.zero)

        def take(pointer, where, present):
            if how == PERMUTE:
                value = permuted(emit, emit.load(pointer, _I64(0)), where)
            else:
                value = _gathered(emit, pointer, where, present)
            return builder.select(present, value, emit.zero)

        def add_up(source, v, chosen):
            if unrolled:
                value = take(source, *chosen[0])
                for where, present in chosen[1:]:
                    value = emit.add(value, take(source, where, present))
                return value
            builder.store(emit.zero, total)
            with cgutils.for_range(builder, taps) as tap:
                value = take(source, *indices(v, tap.index))
                builder.store(emit.add(builder.load(total), value), total)
            return builder.load(total)

        def spread(stores):
            """stores: (first row, end, how to store a vector of those) each."""
            with cgutils.for_range(builder, vectors) as loop:
                first, base = entry(loop.index, 0), entry(loop.index, 1)
                chosen = [indices(loop.index, _I64(t)) for t in range(unrolled)]
                with cgutils.for_range(builder, planes) as plane:
                    source = builder.gep(part, [builder.add(builder.mul(plane.index, part_pitch), base)])
                    target = builder.gep(out, [builder.add(builder.mul(plane.index, out_pitch), first)])
                    value = add_up(source, loop.index, chosen)
                    for begin, end, store in stores:
                        with cgutils.for_range_slice(builder, begin, end, _I64(1), inc=True) as (row, _):
                            store(value, target, builder.mul(row, width))

        with builder.if_else(builder.icmp_signed(">=", width, _I64(emit.lanes))) as (wide, narrow):
            with wide:
                spread([(_I64(0), rows, emit.store)])
            with narrow:
                mask, whole = emit.mask(_I64(0), width), _rows_of_whole_vectors(emit, rows, width, room)
                under_mask = whole, rows, lambda *place: emit.masked_store(*place, mask)
                spread([(_I64(0), whole, emit.store), under_mask])
        return context.get_dummy_value()

    return signature, codegen


def _rows_of_whole_vectors(emit, rows, width, room):
    """How many of the rows have a vector's room from their beginning on."""
    builder = emit.builder
    spare = builder.sub(room, _I64(emit.lanes))
    fitting = builder.add(builder.sdiv(spare, width), _I64(1))
    fitting = builder.select(builder.icmp_signed("<", spare, _I64(0)), _I64(0), fitting)
    return builder.select(builder.icmp_signed("<", fitting, rows), fitting, rows)


@intrinsic
def fill_planes(typingctx, out, values, planes, size, height, width):
    """out[p * size + i] = values[p] * height * width for p < planes, i < size. The last vector of a plane ends with
    it."""

    def emission(emit, args):
        out, values, planes, size, *weights = args
        builder = emit.builder
        last = builder.sub(size, _I64(emit.lanes))

        def fill(p, _):
            value, target = builder.load(builder.gep(values, [p])), builder.gep(out, [builder.mul(p, size)])
            for weight in weights:
                value = builder.fmul(value, weight)
            with builder.if_else(builder.icmp_signed(">=", last, _I64(0))) as (wide, narrow):
                with wide:
                    everywhere = emit.splat(value)
                    emit.loop(_I64(0), size, emit.lanes, [], lambda i, _: emit.store(everywhere, target, i) or [])
                    emit.store(everywhere, target, last)
                with narrow:
                    emit.loop(_I64(0), size, 1, [], lambda i, _: emit.put(value, target, i) or [])
            return []

        emit.loop(_I64(0), planes, 1, [], fill)

    return emitted(types.void(out, values, types.intp, types.intp, out.dtype, out.dtype), emission)


def _gathered(emit, pointer, where, present):
    builder, wide = emit.builder, ir.VectorType(_I64, emit.lanes)
    offsets = builder.sext(where, wide) if emit.itemsize < 8 else where
    offsets = builder.mul(offsets, ir.Constant(wide, [emit.itemsize] * emit.lanes))
    addresses = builder.add(emit.splat(builder.ptrtoint(pointer, _I64), scalar=_I64), offsets)
    pointers = builder.inttoptr(addresses, ir.VectorType(pointer.type, emit.lanes))
    name = f"llvm.masked.gather.v{emit.lanes}f{emit.itemsize * 8}.v{emit.lanes}p0"
    kind = ir.FunctionType(emit.vector, [pointers.type, _I32, present.type, emit.vector])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [pointers, _I32(emit.itemsize), present, emit.zero])


@device()
def _add_pixels(out, part, c, width, whole, near, taps):
    """A row whose pixel w is the sum of taps[w] pixels of the part from near[w] on; c elements to a pixel.

    The first `whole` pixels are written in whole vectors, which the following pixels overwrite.
    """
    for w in range(width):
        target, source = move(out, w * c), move(part, near[w] * c)
        if taps[w] == 0:
            for i in range(c):
                target[i] = 0
        elif w < whole and taps[w] == 1:
            fold_rows(SUM, 1, 1, 0, target, c, source, 0, 1, c, 1, c, 0)
        elif w < whole and taps[w] == 2:
            fold_rows(SUM, 1, 2, 0, target, c, source, 0, 1, c, 2, c, 0)
        else:
            sum_contiguous(target, source, c, taps[w], c)


@device()
def _weighted(out, out_pitch, source, source_pitch, planes, step, heights, taps, widths, count):
    if taps == 1:
        weighted_rows(1, out, out_pitch, source, source_pitch, planes, step, heights, 1, widths, count)
    elif taps == 2:
        weighted_rows(2, out, out_pitch, source, source_pitch, planes, step, heights, 2, widths, count)
    else:
        weighted_rows(0, out, out_pitch, source, source_pitch, planes, step, heights, taps, widths, count)


@device()
def _spread(out, planes, rows, left, part, plan, table, index):
    """The parts of one band, spread over the columns of its rows in each of some planes.

    left: rows from there on that the same chunk writes, afterwards."""
    h_n, w_n, c, pitch, way, taps, whole, vectors = (
        plan[H], plan[W], plan[C], plan[PITCH], plan[WAY], plan[TAPS], plan[WHOLE], plan[VECTORS]
    )  # fmt: skip
    width = w_n * c
    size, room = h_n * width, left * width
    if way == PERMUTE:
        if taps == 1:
            spread_columns(_REGISTERS, 1, out, size, planes, rows, width, room, part, pitch, table, index, 1, vectors)
        elif taps == 2:
            spread_columns(_REGISTERS, 2, out, size, planes, rows, width, room, part, pitch, table, index, 2, vectors)
        else:
            spread_columns(
                _REGISTERS, 0, out, size, planes, rows, width, room, part, pitch, table, index, taps, vectors
            )  # fmt: skip
    elif way == GATHER:
        spread_columns(GATHER, 0, out, size, planes, rows, width, room, part, pitch, table, index, taps, vectors)
    else:
        for p in range(planes):
            target, source = move(out, p * size), move(part, p * pitch)
            if way == SLIDE:
                sum_contiguous(target, move(source, table[0]), 1, taps, width)
            else:
                _add_pixels(target, source, c, w_n, whole, table, move(table, w_n))
            for k in range(1, rows):
                sum_contiguous(move(target, k * width), target, 0, 1, width)


@kernel()
def averages_backward(g, gx, plan, bands, table, index, weights):
    """Gradient of averages; the arguments after gx are what `plan_of` made.

    A chunk owns some planes, or some bands of one.
    """
    planes, band_n, h_n, w_n, c, oh_n, size, pitch = (
        plan[PLANES], plan[BANDS], plan[H], plan[W], plan[C], plan[OH], plan[SIZE], plan[PITCH]
    )  # fmt: skip
    group, margin, own_planes, own_bands = plan[GROUP], plan[MARGIN], plan[OWN_PLANES], plan[OWN_BANDS]
    cuts = (band_n + own_bands - 1) // own_bands
    for chunk in prange((planes + own_planes - 1) // own_planes * cuts):
        start = chunk // cuts
        band = (chunk - start * cuts) * own_bands
        start *= own_planes
        end = min(start + own_planes, planes)
        if plan[WAY] == FILL:
            size = h_n * w_n
            fill_planes(address(gx, start * size), address(g, start), end - start, size, weights[0], weights[1])
            continue
        memory = scratch(pitch * group + 2 * margin, g)
        memory[:] = 0  # windows that slide over the part's ends find zeros
        part, heights = address(memory, margin), address(weights, 0)
        last = min(band + own_bands, band_n) - 1
        bottom = bands[4 * last] + bands[4 * last + 1]
        widths = move(heights, oh_n)
        for p in range(start, end, group):
            count = min(group, end - p)
            for b in range(band, last + 1):
                row, rows, top, taps = bands[4 * b], bands[4 * b + 1], bands[4 * b + 2], bands[4 * b + 3]
                source, out = address(g, (p * oh_n + top) * size), address(gx, (p * h_n + row) * w_n * c)
                _weighted(part, pitch, source, oh_n * size, count, size, move(heights, top), taps, widths, size)
                _spread(out, count, rows, bottom - row, part, plan, address(table, 0), address(index, 0))
        keep(memory)


def plan_of(x_shape, grad_shape, dtype, layout, rows, columns, kernel_width, stride):
    """The arguments of averages_backward after gx.

    rows, columns: (starts, ends, weights) of the windows along an axis. kernel_width, stride: of evenly spaced columns,
    else 0.
    """
    (n, a, b, d), (_, e, f, k), lanes = x_shape, grad_shape, lane_count(dtype.itemsize)
    planes, h, w, oh, ow, c = (n * a, b, d, f, k, 1) if layout == "NCHW" else (n, a, b, e, f, d)
    top, height = covering(h, *rows[:2])
    near, taps = covering(w, *columns[:2])
    first = np.flatnonzero(np.diff(top, prepend=-1) | np.diff(height, prepend=-1))
    bands = np.stack((first, np.diff(first, append=h), top[first], height[first]), 1)
    most, index = int(taps.max(initial=0)), np.zeros((0, 0, lanes), int)
    if c == oh == ow == 1 and height.all() and taps.all():
        way, table = FILL, near
    elif c > 1:
        way, table = PIXELS, np.concatenate((near, taps))
    elif stride == 1:
        way, table, most = SLIDE, near[:1] + taps[:1] - kernel_width, kernel_width
    else:
        way, table, index = _columns_of_vectors(near, taps, most, lanes)
    margin = _rounded(max(kernel_width, 1), lanes)
    pitch = _rounded(ow * c, lanes) + margin
    plane = max(h * w * c, 1)
    group = max(min(PART // pitch, PART // plane, planes), 1)
    own_planes = max(CHUNK // plane, 1)
    own_bands = max(CHUNK * len(bands) // plane, 1) if own_planes == 1 else max(len(bands), 1)
    whole = w - -(-(_rounded(c, lanes) - c) // c)
    plan = (planes, len(bands), h, w, c, oh, ow * c, pitch, group, way, most, margin, whole, index.shape[0])
    integers = np.int32 if dtype.itemsize == 4 else np.int64
    weights = np.concatenate((rows[2], np.repeat(columns[2], c), np.zeros(lanes))).astype(dtype)
    return (
        np.array((*plan, own_planes, own_bands), np.int64),
        bands.astype(np.int64).ravel(),
        table.astype(np.int64).ravel(),
        index.astype(integers).ravel(),
        weights,
    )


def covering(n, starts, ends):
    """For each pixel of an axis: the first window that it lies in, and their number."""
    pixels = np.arange(n)
    first = np.searchsorted(ends, pixels, "right")
    return first, np.maximum(np.searchsorted(starts, pixels, "right") - first, 0)


def _columns_of_vectors(near, taps, most, lanes):
    """(way, table, index) of `spread_columns`. The last vector of a row ends with it, where the row is that long."""
    vectors = -(-near.size // lanes)
    first = np.minimum(np.arange(vectors) * lanes, max(near.size - lanes, 0))
    base = near[first]
    column = first[:, None, None] + np.arange(lanes)
    tap = np.arange(most)[:, None]
    inside = np.minimum(column, near.size - 1)
    index = np.where((column < near.size) & (tap < taps[inside]), near[inside] + tap - base[:, None, None], -1)
    way = PERMUTE if PERMUTES and index.max(initial=0) < lanes else GATHER
    return way, np.stack((first, base), 1), index


def _rounded(count, lanes):
    return -(-count // lanes) * lanes


def windows(count, n, k, s, low):
    """Starts and ends of windows along an axis of n pixels."""
    starts = np.arange(count) * s - low
    return np.maximum(starts, 0), np.minimum(starts + k, n)
