"""2x2 windows with stride 2 and no padding, forward, in one pass: most of the pooling of VGG, LeNet and their kin.

Every element lies in one window, so folding a block of rows and then their columns (pool_windows.py) saves no
arithmetic here, and costs a way through L1.

    NCHW   row 0   a b c d e f g h  ->  y   max(a b) max(c d) ...        NHWC   row 0   pixel 0 | pixel 1
           row 1   i j k l m n o p  ->  y   max(y, max(i j)) ...                row 1   pixel 2 | pixel 3

NCHW reads x in the order of the memory, and y's row keeps what row 0 gave: row 0 and row 1 side by side, in registers,
are two short streams that no processor follows for long, twice as slow where x comes from memory. NHWC has long rows,
and makes a vector of channels in registers from its four pixels.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tilewise.kernels.cpu.jit import device
from tilewise.kernels.cpu.pool_fold import MAXIMUM, SUM, _combine, _load, _store
from tilewise.kernels.cpu.simd import _I32, _I64, _literal, emit_prefetch, lane_count

# Bytes between what is read and what is asked for. Asking for y's lines too is slower, for nothing a little.
AHEAD = 8192


def serves(plane, counts, c, kernel_size, stride, starts, dilation, itemsize):
    """Whether this kernel does it. It needs whole vectors of windows, or in NHWC of channels."""
    (h, w), (oh, ow), (dh, dw), (top, left) = plane, counts, dilation, starts
    (kh, kw), (sh, sw) = kernel_size, stride
    wide = ow if c == 1 else c
    square = kh == kw == sh == sw == 2 and dh == dw == 1 and top == left == 0
    return square and h == 2 * oh and w >= 2 * ow and wide >= lane_count(itemsize)


def _even_and_odd(builder, value):
    """Every second element from the first and from the second on."""
    count = value.type.count
    orders = [ir.Constant(ir.VectorType(_I32, count // 2), list(range(q, count, 2))) for q in (0, 1)]
    return [builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), order) for order in orders]


@intrinsic(prefer_literal=True)
def fold_quads(typingctx, operation, out, source, rows, columns, width, channels):
    """out[r, j, i] = the maximum or the sum of the four source[2 r + s, 2 j + t, i], for i < channels.

    out: rows x columns pixels; source: its rows are `width` elements long. operation: a literal. The last two vectors
    of a row, in NHWC of a pixel, overlap.
    """
    kind, index = _literal(operation), types.intp
    signature = types.void(operation, out, source, index, index, index, index)

    def codegen(context, builder, signature, args):
        _, out, source, rows, columns, width, channels = args
        element = signature.args[1].dtype
        lanes = lane_count(element.bitwidth // 8)
        ahead = _I64(AHEAD // (element.bitwidth // 8))

        def read(pointer, size):
            for first in range(0, size, lanes):
                emit_prefetch(builder, builder.gep(pointer, [builder.add(ahead, _I64(first))]))
            return _load(builder, pointer, 1, size)

        def vectors(count, emit):
            last = builder.sub(count, _I64(lanes))
            with cgutils.for_range_slice(builder, _I64(0), count, _I64(lanes), inc=True) as (i, _):
                emit(builder.select(builder.icmp_signed("<", i, last), i, last))

        def combine(value, total):
            return _combine(builder, element, kind, value, total)

        def across(row, j):
            even, odd = _even_and_odd(builder, read(builder.gep(row, [builder.mul(j, _I64(2))]), 2 * lanes))
            return combine(odd, even)

        def of_planes(upper, lower, target):
            def place(j):
                return builder.gep(target, [j])

            vectors(columns, lambda j: _store(builder, across(upper, j), place(j)))
            last = builder.sub(columns, _I64(lanes))
            tail = _load(builder, place(last), 1, lanes)  # before a vector that overlaps it is added to
            with cgutils.for_range_slice(builder, _I64(0), last, _I64(lanes), inc=True) as (j, _):
                _store(builder, combine(across(lower, j), _load(builder, place(j), 1, lanes)), place(j))
            _store(builder, combine(across(lower, last), tail), place(last))

        def of_pixel(upper, lower, target, j):
            left = builder.mul(j, builder.mul(channels, _I64(2)))
            right, to = builder.add(left, channels), builder.gep(target, [builder.mul(j, channels)])

            def of_channels(i):
                places = [builder.add(pixel, i) for pixel in (left, right)]
                rows = [[read(builder.gep(row, [at]), lanes) for at in places] for row in (upper, lower)]
                sides = [combine(below, above) for above, below in zip(*rows, strict=True)]
                _store(builder, combine(sides[1], sides[0]), builder.gep(to, [i]))

            vectors(channels, of_channels)

        with cgutils.for_range(builder, rows) as row:
            upper = builder.gep(source, [builder.mul(row.index, builder.mul(width, _I64(2)))])
            lower = builder.gep(upper, [width])
            target = builder.gep(out, [builder.mul(row.index, builder.mul(columns, channels))])
            with builder.if_else(builder.icmp_signed("==", channels, _I64(1))) as (planes, pixels):
                with planes:
                    of_planes(upper, lower, target)
                with pixels, cgutils.for_range(builder, columns) as column:
                    of_pixel(upper, lower, target, column.index)
        return context.get_dummy_value()

    return signature, codegen


@device()
def max_of_quads(out, source, rows, columns, width, channels):
    fold_quads(MAXIMUM, out, source, rows, columns, width, channels)


@device()
def sum_of_quads(out, source, rows, columns, width, channels):
    fold_quads(SUM, out, source, rows, columns, width, channels)
