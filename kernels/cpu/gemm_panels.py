"""The packing of operands for the register tiles of matrix products, KC steps of the sum at a time."""

from numba import types
from numba.extending import intrinsic

from tilewise.kernels.cpu.emitted import emitted
from tilewise.kernels.cpu.scratch import integers, progression, scratch
from tilewise.kernels.cpu.simd import _I64, NV, VECTOR_BYTES, _Emitter, _literal, address, lanes, prefetch
from tilewise.kernels.cpu.vector_move import _transposed, copy_lanes, copy_vector, transpose_block, transpose_whole

# KC steps of the sum: a panel of B (KC * NR * 4 = 32 KB) stays in L1 while A's rows (KC * MR * 4 = 14 KB a tile) come
# from L2. With AVX2's smaller tiles, 16 and 6 KB.
KC = 256
# Panels packed together, so that longer runs are read and fewer pages visited: KC * GROUP * NR * 4 = 256 KB of L2 with
# AVX-512 (AVX2, which packs A as well, 64 KB), or FEWER where a block has not so many left; and how many rows ahead
# they are asked for: rows pages apart are runs too short for the processor's own prefetcher, and rows a power of two
# apart leave room in L2 for a few only.
GROUP, FEWER, ROWS_AHEAD = (8, 4, 4) if VECTOR_BYTES == 64 else (4, 4, 0)


@emitted
def pack_right_panel(b, start, row_step, column_step, depth, columns, panel, target):
    """Pack depth x columns (at most NR) of B, element (k, j) at b[start + k * row_step + j * column_step].

    panel[target + k * NR + j]; missing columns are zero.
    """
    width = lanes(b)
    count = NV * width
    if column_step == 1 and columns >= count:
        for k in range(depth):
            for j in range(0, count, width):
                copy_vector(address(panel, target + k * count + j), address(b, start + k * row_step + j))
    elif column_step == 1:
        for k in range(depth):
            for j in range(0, count, width):
                place, origin = target + k * count + j, start + k * row_step + j
                copy_lanes(1, 0, address(panel, place), address(b, origin), 0, columns - j, 1)
    elif row_step == 1:
        _pack_right_transposed(b, start, column_step, depth, columns, panel, target)
    else:
        for k in range(depth):
            for j in range(count):
                value = b[start + k * row_step + j * column_step] if j < columns else b.dtype.type(0)
                panel[target + k * count + j] = value


@emitted
def _pack_right_transposed(b, start, column_step, depth, columns, panel, target):
    """Whole squares of vectors are turned in registers; what is left goes through a stage, under masks."""
    width = lanes(b)
    count = NV * width
    whole = depth // width * width
    for j in range(0, count, width):
        first = whole if j + width <= columns else 0
        for k in range(0, first, width):
            _turn_square(panel, target + k * count + j, count, b, start + j * column_step + k, column_step)
        if first < depth:
            _pack_rest_transposed(b, start, column_step, first, depth, j, columns, panel, target)


@emitted
def _pack_rest_transposed(b, start, column_step, first, depth, j, columns, panel, target):
    width = lanes(b)
    count = NV * width
    stage = scratch(width * width, b)
    offsets = progression(column_step, width)
    lows = progression(0, width)
    highs = integers(width)
    for r in range(width):
        highs[r] = depth if j + r < columns else 0
    for k in range(first, depth, width):
        transpose_square(stage, b, start + j * column_step, offsets, lows, highs, k)
        for i in range(min(width, depth - k)):
            copy_vector(address(panel, target + (k + i) * count + j), address(stage, i * width))


@emitted
def _turn_square(target, at, step, source, start, source_step):
    """target[at + k * step + r] = source[start + r * source_step + k] for r, k < lanes."""
    if lanes(source) == 16:
        transpose_whole(16, address(target, at), step, address(source, start), source_step)
    elif lanes(source) == 8:
        transpose_whole(8, address(target, at), step, address(source, start), source_step)
    elif lanes(source) == 4:
        transpose_whole(4, address(target, at), step, address(source, start), source_step)
    else:
        transpose_whole(2, address(target, at), step, address(source, start), source_step)


@emitted
def transpose_square(stage, source, start, offsets, lows, highs, k):
    """A lanes x lanes square: stage[i * lanes + r] = source[start + offsets[r] + k + i] within the rows' bounds."""
    if lanes(source) == 16:
        transpose_block(
            16,
            address(stage, 0),
            address(source, start),
            address(offsets, 0),
            address(lows, 0),
            address(highs, 0),
            k,
            16,
        )
    elif lanes(source) == 8:
        transpose_block(
            8, address(stage, 0), address(source, start), address(offsets, 0), address(lows, 0), address(highs, 0), k, 8
        )
    elif lanes(source) == 4:
        transpose_block(
            4, address(stage, 0), address(source, start), address(offsets, 0), address(lows, 0), address(highs, 0), k, 4
        )
    else:
        transpose_block(
            2, address(stage, 0), address(source, start), address(offsets, 0), address(lows, 0), address(highs, 0), k, 2
        )


def _make_pack_right_group(group):
    @emitted
    def pack_right_group(b, b_at, b_row, depth, panels, panels_at):
        """`group` whole panels of B, each KC rows behind the one before, by unrolled loops."""
        width = lanes(b)
        count = NV * width
        for k in range(depth):
            target, source = panels_at + k * count, b_at + k * b_row
            if ROWS_AHEAD > 0:
                for j in range(0, group * count, width):
                    prefetch(address(b, source + ROWS_AHEAD * b_row + j))
            for number in range(group):
                for j in range(0, count, width):
                    place, origin = target + number * count * KC + j, source + number * count + j
                    copy_vector(address(panels, place), address(b, origin))

    return pack_right_group


pack_right_group, pack_fewer = _make_pack_right_group(GROUP), _make_pack_right_group(FEWER)


@intrinsic(prefer_literal=True)
def pack_rows(typingctx, rows, target, source, row_step, used, depth):
    """target[k * rows + r] = source[r * row_step + k] for r < used, k < depth; zeros up to the next whole vector.

    rows: a literal; lanes beyond it belong to the next step, which overwrites them. Rows from `used` on repeat the
    last.
    """
    count = _literal(rows)
    signature = types.void(rows, target, source, *[types.intp] * 3)

    def codegen(context, builder, signature, args):
        _, target, source, row_step, used, depth = args
        emit = _Emitter(builder, signature.args[1].dtype)
        last = builder.sub(used, _I64(1))
        places = [builder.select(builder.icmp_signed("<", _I64(r), last), _I64(r), last) for r in range(count)]
        starts = [builder.gep(source, [builder.mul(row_step, place)]) for place in places]
        entry, loop, end = builder.block, builder.append_basic_block("pack"), builder.append_basic_block("packed")
        builder.cbranch(builder.icmp_signed(">", depth, _I64(0)), loop, end)
        builder.position_at_end(loop)
        k = builder.phi(_I64)
        mask = emit.mask(_I64(0), builder.sub(depth, k))
        groups = []
        for first in range(0, count, emit.lanes):
            values = [emit.masked_load(start, k, mask) for start in starts[first : first + emit.lanes]]
            groups.append(_transposed(emit, values + [emit.zero] * (emit.lanes - len(values))))
        for i, vectors in enumerate(zip(*groups, strict=True)):
            at = builder.mul(builder.add(k, _I64(i)), _I64(count))
            for j, value in enumerate(vectors):
                emit.store(value, target, builder.add(at, _I64(j * emit.lanes)))
        following = builder.add(k, _I64(emit.lanes))
        k.add_incoming(_I64(0), entry)
        k.add_incoming(following, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return signature, codegen
