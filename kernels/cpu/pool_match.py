"""Gradient of maxima of evenly spaced windows in NHWC, by gathering.

Every pixel looks at the few windows that it lies in, and adds up the gradients of those that name it as their maximum:
vectors of channels, no scattered writes, and no pass that sets zeros. A window's index is expected inside that window,
as max_pool2d has it, and so matches once. Whether each did is counted, and if not, the caller scatters instead.

An index is read by as many pixels as its window has. Where that is often, the indices of a chunk's windows are narrowed
to the width of float32 first, a vector of which is then compared with one vector of them, not with two. That is done
row by row, as late as it can be, and the next row is fetched while one is matched: the two would take turns otherwise.
"""

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.cpu.pool_fold import chunk_rows, move
from tilewise.kernels.cpu.pool_spread import covering
from tilewise.kernels.cpu.scratch import ALIGNMENT, keep, scratch
from tilewise.kernels.cpu.simd import _I1, _I32, _I64, VECTOR_BYTES, _Emitter, address, emit_prefetch

# Windows over a pixel from which on narrowing pays: with 9 (3x3, stride 1) it does, with 2.25 (stride 2) and with 1
# (2x2, stride 2) it does not (`make bench-peers ARGS='--only "pool backward"'`).
SHARED = 4
COUNTERS = VECTOR_BYTES // 4  # as many as a vector of float32 has lanes
LINE = ALIGNMENT // 8  # int64 indices in a cache line


@intrinsic
def match_row(typingctx, out, values, indices, ahead, pixel, rows, row_step, columns, width, count, counters):
    """A row of `width` pixels of `count` channels, numbered from `pixel` on. Pixel w lies in `rows` x columns[2 w + 1]
    windows, from column columns[2 w] on:

        out[w, i] = the sum of values[o + i] where indices[o + i] == pixel + w, over o = r * row_step + s * count,
                    for r < rows and 0 <= s - columns[2 w] < columns[2 w + 1]

    indices: as wide as values. ahead: the int64 indices in memory; where `indices` are narrowed copies and nine windows
    meet, the row below these windows is asked for, as the processor sees no reads of it yet. counters: 32-bit integers,
    to whose sum the number of matches is added.
    """
    signature = types.void(out, values, indices, ahead, *[types.intp] * 3, columns, types.intp, types.intp, counters)

    def codegen(context, builder, signature, args):
        out, values, indices, ahead, pixel, rows, row_step, columns, width, count, counters = args
        emit = _Emitter(builder, signature.args[0].dtype)
        places, tally = ir.VectorType(indices.type.pointee, emit.lanes), ir.VectorType(_I32, emit.lanes)
        one = ir.Constant(tally, [1] * emit.lanes)
        total, matches = cgutils.alloca_once(builder, emit.vector), cgutils.alloca_once(builder, tally)
        counters = builder.bitcast(counters, tally.as_pointer())
        _move_tally(builder, counters, matches)
        whole = builder.and_(count, _I64(-emit.lanes))
        mask = emit.mask(_I64(0), builder.sub(count, whole))

        def add(offset, wanted, load_indices, load):
            where = builder.bitcast(builder.gep(indices, [offset]), places.as_pointer())
            found = builder.icmp_signed("==", load_indices(where), wanted)
            sum_, number = builder.load(total), builder.load(matches)
            builder.store(builder.select(found, emit.add(sum_, load(values, offset)), sum_), total)
            builder.store(builder.select(found, builder.add(number, one), number), matches)

        def ask(place):
            emit_prefetch(builder, builder.gep(values, [place]), 2)
            for k in range(0, emit.lanes, LINE):
                emit_prefetch(builder, builder.gep(ahead, [builder.add(place, _I64(k))]), 2)

        def vector(start, windows, wanted, load_indices, load):
            builder.store(emit.zero, total)
            with cgutils.for_range(builder, rows) as row, cgutils.for_range(builder, windows) as column:
                offset = builder.add(builder.mul(row.index, row_step), builder.mul(column.index, count))
                add(builder.add(offset, start), wanted, load_indices, load)
            return builder.load(total)

        def whole_indices(where):
            return _whole_indices(builder, where)

        def whole_vectors(window, wanted, target, value):
            with cgutils.for_range_slice(builder, _I64(0), whole, _I64(emit.lanes), inc=True) as (i, _):
                emit.store(value(builder.add(window, i)), target, i)

        def whole_pixel(window, windows, wanted, target):
            """The vectors of one pixel, in straight-line code for the usual numbers of windows."""
            end = builder.append_basic_block("pixel_done")
            for m, n in ((1, 1), (1, 2), (2, 1), (2, 2), (3, 3)):
                same = builder.and_(
                    builder.icmp_signed("==", rows, _I64(m)), builder.icmp_signed("==", windows, _I64(n))
                )
                usual, other = builder.append_basic_block("usual"), builder.append_basic_block("other")
                builder.cbranch(same, usual, other)
                builder.position_at_end(usual)
                steps = [
                    builder.add(builder.mul(_I64(r), row_step), builder.mul(_I64(c), count))
                    for r in range(m)
                    for c in range(n)
                ]

                def unrolled(start, steps=steps, nine=(m, n) == (3, 3)):
                    builder.store(emit.zero, total)
                    for step in steps:
                        add(builder.add(start, step), wanted, whole_indices, emit.load)
                    if nine and places.element != _I64:
                        ask(builder.add(start, builder.mul(rows, row_step)))
                    return builder.load(total)

                whole_vectors(window, wanted, target, unrolled)
                builder.branch(end)
                builder.position_at_end(other)
            whole_vectors(
                window, wanted, target, lambda start: vector(start, windows, wanted, whole_indices, emit.load)
            )
            builder.branch(end)
            builder.position_at_end(end)

        with cgutils.for_range(builder, width) as loop:
            entry = builder.mul(loop.index, _I64(2))
            window = builder.mul(builder.load(builder.gep(columns, [entry])), count)
            windows = builder.load(builder.gep(columns, [builder.add(entry, _I64(1))]))
            number = builder.add(pixel, loop.index)
            if places.element != _I64:
                number = builder.trunc(number, _I32)
            wanted = emit.splat(number, scalar=number.type)
            target = builder.gep(out, [builder.mul(loop.index, count)])
            whole_pixel(window, windows, wanted, target)
            with builder.if_then(builder.icmp_signed("<", whole, count)):
                value = vector(
                    builder.add(window, whole), windows, wanted,
                    lambda where: _masked_indices(builder, where, mask),
                    lambda pointer, offset: emit.masked_load(pointer, offset, mask),
                )  # fmt: skip
                emit.masked_store(value, target, whole, mask)
        _move_tally(builder, matches, counters)
        return context.get_dummy_value()

    return signature, codegen


def _move_tally(builder, source, target):
    value = builder.load(source)
    value.align = 4
    builder.store(value, target).align = 4


def _whole_indices(builder, where):
    value = builder.load(where)
    value.align = where.type.pointee.element.width // 8
    return value


def _masked_indices(builder, where, mask):
    places = where.type.pointee
    width = places.element.width
    kind = ir.FunctionType(places, [where.type, _I32, ir.VectorType(_I1, places.count), places])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.load.v{places.count}i{width}.p0")
    return builder.call(function, [where, _I32(width // 8), mask, ir.Constant(places, [-1] * places.count)])


@intrinsic
def narrow_indices(typingctx, target, source, count, most):
    """Indices as what target takes; -1 for those above `most` and below 0, which lie in no plane."""
    signature = types.void(target, source, types.intp, types.intp)

    def codegen(context, builder, signature, args):
        target, source, count, most = args
        integer, lanes = target.type.pointee, VECTOR_BYTES // 4

        def move(i, size):
            wide, fitting = (ir.VectorType(kind, size) for kind in (_I64, integer))
            value = builder.load(builder.bitcast(builder.gep(source, [i]), wide.as_pointer()))
            value.align = 8
            limit = builder.insert_element(ir.Constant(wide, ir.Undefined), most, _I32(0))
            limit = builder.shuffle_vector(limit, limit, ir.Constant(ir.VectorType(_I32, size), [0] * size))
            inside = builder.icmp_unsigned("<=", value, limit)
            value = builder.trunc(value, fitting) if integer != _I64 else value
            value = builder.select(inside, value, ir.Constant(fitting, [-1] * size))
            to = builder.bitcast(builder.gep(target, [i]), fitting.as_pointer())
            builder.store(value, to).align = integer.width // 8

        whole = builder.and_(count, _I64(-lanes))
        with cgutils.for_range_slice(builder, _I64(0), whole, _I64(lanes), inc=True) as (i, _):
            move(i, lanes)
        with cgutils.for_range_slice(builder, whole, count, _I64(1), inc=True) as (i, _):
            move(i, 1)
        return context.get_dummy_value()

    return signature, codegen


@device()
def _match_rows(g, indices, ahead, gx, table, p, h, end, counters):
    """Rows h to end of image p. indices, ahead: pointers to those of the first window over row h."""
    _, h_n, w_n, c = gx.shape
    _, oh_n, ow_n, _ = g.shape
    top, window_row = table[2 * h], ow_n * c
    for r in range(h, end):
        skip = (table[2 * r] - top) * window_row
        match_row(
            address(gx, (p * h_n + r) * w_n * c), address(g, (p * oh_n + top) * window_row + skip),
            move(indices, skip), move(ahead, skip), r * w_n, table[2 * r + 1], window_row, address(table, 2 * h_n), w_n,
            c, counters,
        )  # fmt: skip


@device()
def _missed(matches, windows):
    for k in range(matches.size):
        windows -= matches[k]
    return windows


@kernel()
def match(g, indices, gx, table):
    """The gradient; returns the number of windows that name a pixel outside themselves. table: `table_of`."""
    planes, h_n, w_n, c = gx.shape
    _, oh_n, ow_n, _ = g.shape
    rows, per_chunk = planes * h_n, chunk_rows(w_n * c)
    chunks = (rows + per_chunk - 1) // per_chunk
    matches = np.zeros(chunks * COUNTERS, np.int32)
    for chunk in prange(chunks):
        first = chunk * per_chunk
        last = min(first + per_chunk, rows)
        while first < last:
            p = first // h_n
            h = first - p * h_n
            end = min(h + last - first, h_n)
            where = address(indices, (p * oh_n + table[2 * h]) * ow_n * c)
            _match_rows(g, where, where, gx, table, p, h, end, address(matches, chunk * COUNTERS))
            first += end - h
    return _missed(matches, g.size)


@kernel()
def match_narrowed(g, indices, gx, table, limit):
    """The same with the indices narrowed first. limit: an array of one, the highest index."""
    planes, h_n, w_n, c = gx.shape
    _, oh_n, ow_n, _ = g.shape
    row = ow_n * c
    rows, per_chunk = planes * h_n, chunk_rows(w_n * c)
    chunks = (rows + per_chunk - 1) // per_chunk
    matches = np.zeros(chunks * COUNTERS, np.int32)
    for chunk in prange(chunks):
        first = chunk * per_chunk
        last = min(first + per_chunk, rows)
        while first < last:
            p = first // h_n
            h = first - p * h_n
            end = min(h + last - first, h_n)
            top, bottom = table[2 * h], table[2 * end - 2] + table[2 * end - 1]
            narrow, ready = scratch((bottom - top) * row, limit), top
            # A row of windows is narrowed when a row of pixels first needs it: the match before it asked for it.
            for r in range(h, end):
                window, below = table[2 * r], table[2 * r] + table[2 * r + 1]
                if below > ready:
                    source, target = address(indices, (p * oh_n + ready) * row), address(narrow, (ready - top) * row)
                    narrow_indices(target, source, (below - ready) * row, limit[0])
                    ready = below
                where, ahead = address(narrow, (window - top) * row), address(indices, (p * oh_n + window) * row)
                _match_rows(g, where, ahead, gx, table, p, r, r + 1, address(matches, chunk * COUNTERS))
            keep(narrow)
            first += end - h
    return _missed(matches, g.size)


def table_of(pixels, bounds):
    """For each row, then each column of the image: the first window over it, and the number of them."""
    axes = [np.stack(covering(n, *bound), 1).ravel() for n, bound in zip(pixels, bounds, strict=True)]
    return np.concatenate(axes).astype(np.int64)


def limit_of(pixels, windows, kernel_size, itemsize):
    """The last argument of `match_narrowed`; None where narrowing does not pay."""
    shared = windows[0] * windows[1] * kernel_size[0] * kernel_size[1] >= SHARED * pixels[0] * pixels[1]
    limit = pixels[0] * pixels[1] - 1
    fits = itemsize == 4 and limit <= np.iinfo(np.int32).max
    return np.array([limit], np.int32) if shared and fits else None
