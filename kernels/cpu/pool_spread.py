"""Gradient of averages: of windows, and of adaptive bins.

A row of grad_x is a sum of rows of grad, spread over the columns. Neighbouring rows of grad_x that lie in the same
windows are equal: such a group of rows, a band, is computed once and stored as often as it has rows.

    4 windows of 5 rows, 3 apart, over 14 rows: 7 bands

    rows      0-2   3-4   5   6-7   8   9-10   11-13
    windows    0    0 1   1   1 2   2    2 3      3

First the weighted sum of a band's rows of grad goes to a part, for several bands, then each part is spread: every column
gathers from the windows that it lies in, as told by a table, so nothing is scattered. In NCHW a vector of columns lies
in few windows, which one vector of the part holds: the gather is a permutation of a register (AVX-512).

Everything that follows from the shapes alone is in `plan`, made once per signature (`plan_of`).
"""

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.cpu.pool_fold import move, sum_contiguous, sum_contiguous_rows
from tilewise.kernels.cpu.scratch import scratch
from tilewise.kernels.cpu.simd import _I32, _I64, VECTOR_BYTES, _Emitter, _literal, address, lane_count

# Elements of parts that are worked on at once: 8 KB of float32; the rows of grad_x that they make are larger.
PART = 2048
CHUNK = 32768  # elements of grad_x in a chunk
# How a part is spread: pixel by pixel in NHWC; for windows one column apart as the sum of a moving window; else by table.
PIXELS, SLIDE, PERMUTE, GATHER = range(4)
_REGISTERS = PERMUTE if VECTOR_BYTES == 64 else GATHER  # other machines have no such permutation


@intrinsic
def weighted_rows(typingctx, out, source, step, heights, taps, widths, count):
    """out[i] = widths[i] * (sum over t < taps of heights[t] * source[t * step + i]) for i < count.

    Whole vectors are written, zeros behind the last element; nothing but the elements is read. widths must be readable
    in whole vectors.
    """
    signature = types.void(out, source, types.intp, heights, types.intp, widths, types.intp)

    def codegen(context, builder, signature, args):
        out, source, step, heights, taps, widths, count = args
        emit = _Emitter(builder, signature.args[0].dtype)
        total = cgutils.alloca_once(builder, emit.vector)

        def vector(i, load):
            builder.store(emit.zero, total)
            with cgutils.for_range(builder, taps) as tap:
                weight = emit.splat(builder.load(builder.gep(heights, [tap.index])))
                value = load(source, builder.add(builder.mul(tap.index, step), i))
                builder.store(emit.multiply_add(weight, value, builder.load(total)), total)
            emit.store(builder.fmul(builder.load(total), emit.load(widths, i)), out, i)

        whole = builder.and_(count, _I64(-emit.lanes))
        with cgutils.for_range_slice(builder, _I64(0), whole, _I64(emit.lanes), inc=True) as (i, _):
            vector(i, emit.load)
        with builder.if_then(builder.icmp_signed("<", whole, count)):
            mask = emit.mask(_I64(0), builder.sub(count, whole))
            vector(whole, lambda pointer, offset: emit.masked_load(pointer, offset, mask))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def spread_columns(typingctx, way, out, rows, width, part, table, index, taps, vectors):
    """For each of `vectors` vectors of columns, in `rows` rows of `width`: out[first + i] = sum over taps of
    part[base + index[i]], where an index below zero stands for 0.

    way: PERMUTE, where every index is less than the lanes, or GATHER. table: first and base of each vector; index: its
    `taps` vectors of indices, integers as wide as the elements.
    """
    how = _literal(way)
    signature = types.void(way, out, types.intp, types.intp, part, table, index, types.intp, types.intp)

    def codegen(context, builder, signature, args):
        _, out, rows, width, part, table, index, taps, vectors = args
        emit = _Emitter(builder, signature.args[1].dtype)
        places = _Emitter(builder, signature.args[6].dtype)
        total = cgutils.alloca_once(builder, emit.vector)
        mask = emit.mask(_I64(0), width)
        with cgutils.for_range(builder, vectors) as loop:
            v = loop.index
            entry = builder.mul(v, _I64(2))
            first = builder.load(builder.gep(table, [entry]))
            base = builder.gep(part, [builder.load(builder.gep(table, [builder.add(entry, _I64(1))]))])
            builder.store(emit.zero, total)
            with cgutils.for_range(builder, taps) as tap:
                number = builder.add(builder.mul(v, taps), tap.index)
                where = places.load(index, builder.mul(number, _I64(emit.lanes)))
                present = builder.icmp_signed(">=", where, places.zero)
                value = _permuted(emit, base, where) if how == PERMUTE else _gathered(emit, base, where, present)
                value = builder.select(present, value, emit.zero)
                builder.store(emit.add(builder.load(total), value), total)
            value = builder.load(total)
            with cgutils.for_range(builder, rows) as row:
                place = builder.add(builder.mul(row.index, width), first)
                emit.masked_store(value, out, place, mask)
        return context.get_dummy_value()

    return signature, codegen


def _permuted(emit, pointer, where):
    kind = "sf" if emit.itemsize == 4 else "df"
    function_type = ir.FunctionType(emit.vector, [emit.vector, where.type])
    name = f"llvm.x86.avx512.permvar.{kind}.512"
    permute = cgutils.get_or_insert_function(emit.builder.module, function_type, name)
    return emit.builder.call(permute, [emit.load(pointer, _I64(0)), where])


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
        elif w < whole:
            sum_contiguous_rows(target, c, source, 0, 1, c, taps[w], c, 0)
        else:
            sum_contiguous(target, source, c, taps[w], c)


@device()
def _spread(out, number, part, plan, table, places):
    """One part, spread over the columns of `number` rows."""
    w_n, c, way, taps, whole, vectors = plan[4], plan[5], plan[10], plan[11], plan[13], plan[14]
    if way == PERMUTE:
        spread_columns(_REGISTERS, out, number, w_n, part, table, places, taps, vectors)
    elif way == GATHER:
        spread_columns(GATHER, out, number, w_n, part, table, places, taps, vectors)
    else:
        if way == SLIDE:
            sum_contiguous(out, move(part, table[0]), 1, taps, w_n)
        else:
            _add_pixels(out, part, c, w_n, whole, table, move(table, w_n))
        for k in range(1, number):
            sum_contiguous(move(out, k * w_n * c), out, 0, 1, w_n * c)


@kernel()
def averages_backward(g, gx, plan, bands, table, index, weights):
    """Gradient of averages; the arguments after gx are what `plan_of` made."""
    units, per_chunk, band_n, h_n, w_n, c, oh_n = plan[0], plan[1], plan[2], plan[3], plan[4], plan[5], plan[6]
    size, pitch, group, margin = plan[7] * c, plan[8], plan[9], plan[12]
    for chunk in prange((units + per_chunk - 1) // per_chunk):
        last = min((chunk + 1) * per_chunk, units)
        memory = scratch(pitch * group + 2 * margin, g)
        memory[:] = 0
        part, heights = address(memory, margin), address(weights, 0)
        for start in range(chunk * per_chunk, last, group):
            count = min(group, last - start)
            p = start // band_n
            b = start - p * band_n
            for i in range(count):
                top, number = bands[4 * b + 2], bands[4 * b + 3]
                source = address(g, (p * oh_n + top) * size)
                target = move(part, i * pitch)
                weighted_rows(target, source, size, move(heights, top), number, move(heights, oh_n), size)
                b += 1
                if b == band_n:
                    b = 0
                    p += 1
            p = start // band_n
            b = start - p * band_n
            for i in range(count):
                out = address(gx, (p * h_n + bands[4 * b]) * w_n * c)
                _spread(out, bands[4 * b + 1], move(part, i * pitch), plan, address(table, 0), address(index, 0))
                b += 1
                if b == band_n:
                    b = 0
                    p += 1


def plan_of(x_shape, grad_shape, dtype, layout, rows, columns, kernel_width, stride):
    """The arguments of averages_backward after gx.

    rows, columns: (starts, ends, weights) of the windows along an axis. kernel_width, stride: of evenly spaced columns,
    else 0.
    """
    (n, a, b, d), (_, e, f, k), lanes = x_shape, grad_shape, lane_count(dtype.itemsize)
    planes, h, w, oh, ow, c = (n * a, b, d, f, k, 1) if layout == "NCHW" else (n, a, b, e, f, d)
    top, height = _covering(h, *rows[:2])
    near, taps = _covering(w, *columns[:2])
    if c == oh == ow == 1 and height.all() and taps.all():  # a plane is one window: it may as well be one row
        h, w, top, height, near, taps = 1, h * w, np.zeros(1, int), np.ones(1, int), np.zeros(h * w, int), np.ones(h * w, int)
    first = np.flatnonzero(np.diff(top, prepend=-1) | np.diff(height, prepend=-1))
    bands = np.stack((first, np.diff(first, append=h), top[first], height[first]), 1)
    most, index = int(taps.max(initial=0)), np.zeros((0, 0, lanes), int)
    if c > 1:
        way, table = PIXELS, np.concatenate((near, taps))
    elif stride == 1:
        way, table, most = SLIDE, near[:1] + taps[:1] - kernel_width, kernel_width
    else:
        way, table, index = _columns_of_vectors(near, taps, most, lanes)
    size = ow * c
    margin = _rounded(max(kernel_width, 1), lanes)
    pitch = _rounded(size, lanes) + margin
    units = planes * len(bands)
    per_chunk = max(CHUNK * len(bands) // max(w * c * h, 1), 1)
    whole = w - -(-(_rounded(c, lanes) - c) // c)
    plan = (units, per_chunk, len(bands), h, w, c, oh, ow, pitch, max(PART // pitch, 1), way, most, margin, whole)
    integers = np.int32 if dtype.itemsize == 4 else np.int64
    weights = np.concatenate((rows[2], np.repeat(columns[2], c), np.zeros(lanes))).astype(dtype)
    return (
        np.array((*plan, index.shape[0]), np.int64),
        bands.astype(np.int64).ravel(),
        table.astype(np.int64).ravel(),
        index.astype(integers).ravel(),
        weights,
    )


def _covering(n, starts, ends):
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
    way = PERMUTE if VECTOR_BYTES == 64 and index.max(initial=0) < lanes else GATHER
    return way, np.stack((first, base), 1), index


def _rounded(count, lanes):
    return -(-count // lanes) * lanes


def windows(count, n, k, s, low):
    """Starts and ends of windows along an axis of n pixels."""
    starts = np.arange(count) * s - low
    return np.maximum(starts, 0), np.minimum(starts + k, n)
