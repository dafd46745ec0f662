"""Gradient of maxima of evenly spaced windows in NHWC, by gathering.

Every pixel looks at the few windows that it lies in, and adds up the gradients of those that name it as their maximum:
vectors of channels, no scattered writes, and no pass that sets zeros. A window's index is expected inside that window,
as max_pool2d has it, and so matches once. Whether each did is counted, and if not, the caller scatters instead.
"""

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from tilewise.kernels.cpu.jit import kernel
from tilewise.kernels.cpu.pool_fold import chunk_rows
from tilewise.kernels.cpu.pool_spread import covering
from tilewise.kernels.cpu.simd import _I1, _I32, _I64, VECTOR_BYTES, _Emitter, address

COUNTERS = VECTOR_BYTES // 4  # as many as a vector of float32 has lanes


@intrinsic
def match_pixel(typingctx, out, values, indices, pixel, rows, row_step, columns, column_step, count, counters):
    """out[i] = the sum of values[o + i] where indices[o + i] == pixel, over o = r * row_step + s * column_step for
    r < rows and s < columns; i < count. counters: 32-bit integers, to whose sum the number of matches is added.
    """
    signature = types.void(out, values, indices, *[types.intp] * 6, counters)

    def codegen(context, builder, signature, args):
        out, values, indices, pixel, rows, row_step, columns, column_step, count, counters = args
        emit = _Emitter(builder, signature.args[0].dtype)
        places, tally = ir.VectorType(_I64, emit.lanes), ir.VectorType(_I32, emit.lanes)
        total, matches = cgutils.alloca_once(builder, emit.vector), cgutils.alloca_once(builder, tally)
        wanted = emit.splat(pixel, scalar=_I64)
        counters = builder.bitcast(counters, tally.as_pointer())
        before = builder.load(counters)
        before.align = 4
        builder.store(before, matches)

        def vector(i, load_indices, load):
            builder.store(emit.zero, total)
            with cgutils.for_range(builder, rows) as row, cgutils.for_range(builder, columns) as column:
                offset = builder.add(builder.mul(row.index, row_step), builder.mul(column.index, column_step))
                offset = builder.add(offset, i)
                where = builder.bitcast(builder.gep(indices, [offset]), places.as_pointer())
                found = builder.icmp_signed("==", load_indices(where), wanted)
                sum_, number = builder.load(total), builder.load(matches)
                builder.store(builder.select(found, emit.add(sum_, load(values, offset)), sum_), total)
                one = ir.Constant(tally, [1] * emit.lanes)
                builder.store(builder.select(found, builder.add(number, one), number), matches)
            return builder.load(total)

        def whole_indices(where):
            value = builder.load(where)
            value.align = 8
            return value

        whole = builder.and_(count, _I64(-emit.lanes))
        with cgutils.for_range_slice(builder, _I64(0), whole, _I64(emit.lanes), inc=True) as (i, _):
            emit.store(vector(i, whole_indices, emit.load), out, i)
        with builder.if_then(builder.icmp_signed("<", whole, count)):
            mask = emit.mask(_I64(0), builder.sub(count, whole))
            absent = ir.Constant(places, [-1] * emit.lanes)
            kind = ir.FunctionType(places, [places.as_pointer(), _I32, ir.VectorType(_I1, emit.lanes), places])
            name = f"llvm.masked.load.v{emit.lanes}i64.p0"
            function = cgutils.get_or_insert_function(builder.module, kind, name)
            value = vector(
                whole,
                lambda where: builder.call(function, [where, _I32(8), mask, absent]),
                lambda pointer, offset: emit.masked_load(pointer, offset, mask),
            )
            emit.masked_store(value, out, whole, mask)
        builder.store(builder.load(matches), counters).align = 4
        return context.get_dummy_value()

    return signature, codegen


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
        p = first // h_n
        h = first - p * h_n
        counters = address(matches, chunk * COUNTERS)
        for r in range(first, min(first + per_chunk, rows)):
            top, height = table[2 * h], table[2 * h + 1]
            for w in range(w_n):
                left, width = table[2 * (h_n + w)], table[2 * (h_n + w) + 1]
                window = ((p * oh_n + top) * ow_n + left) * c
                match_pixel(
                    address(gx, (r * w_n + w) * c), address(g, window), address(indices, window),
                    h * w_n + w, height, ow_n * c, width, c, c, counters,
                )  # fmt: skip
            h += 1
            if h == h_n:
                h = 0
                p += 1
    total = g.size
    for k in range(matches.size):
        total -= matches[k]
    return total


def table_of(pixels, bounds):
    """For each row, then each column of the image: the first window over it, and the number of them."""
    axes = [np.stack(covering(n, *bound), 1).ravel() for n, bound in zip(pixels, bounds, strict=True)]
    return np.concatenate(axes).astype(np.int64)
