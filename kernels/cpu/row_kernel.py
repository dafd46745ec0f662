"""Products whose left operand is found row by row: row i starts at a[bases[i]] (conv_nhwc.py, conv_weight.py)."""

from numba import types
from numba.extending import intrinsic

from tilewise.kernels.cpu.register_tile import Bounds, Loop, Tile
from tilewise.kernels.cpu.simd import _I1, _I64, VECTOR_BYTES, _Emitter, _literal

# Steps of a single piece up to which the lines of y and of the next rows are asked for.
_FEW_STEPS = 512


@intrinsic(prefer_literal=True)
def row_product(
    typingctx, rows, vectors, a, bases, a_step, starts, segments, length, b, b_step, c, c_step, accumulate, count
):  # fmt: skip
    """C[i, j] (+)= sum over s < segments, k < length of a[bases[i] + starts[s] + k * a_step] * b[(s * length + k) *
    b_step + j], i < count, in tiles of rows x vectors * lanes.

    bases, starts: pointers to int64. C's rows are c_step apart; whole tiles are read and written.
    """
    shape = _literal(rows), _literal(vectors)
    intp = types.intp
    signature = types.void(rows, vectors, a, bases, intp, starts, intp, intp, b, intp, c, intp, intp, intp)

    def codegen(context, builder, signature, args):
        a, bases, *operands, c, c_step, accumulate, count = args[2:]
        tile = Tile(_Emitter(builder, signature.args[2].dtype), *shape)
        loop = Loop(builder, count, shape[0], "tile")
        _, bases, c = loop.begin((bases, _I64(shape[0])), (c, builder.mul(c_step, _I64(shape[0]))))
        tile.finish(_row_sums(tile, a, bases, *operands, tile.start(c, c_step, accumulate)), c, c_step)
        loop.close()
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def row_product_to(
    typingctx, rows, vectors, a, bases, a_step, starts, segments, length, b, b_step, c, c_step, accumulate, count,
    y, places, columns, bias, has_bias, extra, has_extra, bounds, past,
):  # fmt: skip
    """`row_product`, then bias, summand and activation in registers, and straight to y.

    Row i < count goes to y[places[i]], its first `columns` lanes. bias: one number a column, read where has_bias is not
    0; extra: laid out as y, read where has_extra is not 0; bounds: as in `Bounds`. past: not 0 to write past the
    caches, where y and all rows of it are aligned and columns are whole vectors; `settle_stores` must follow.
    With a visit of one piece of few steps memory is up to half of the time: a tile asks for its lines of y, and for as
    much of a as its own rows have, from the next tile's first row on (AVX-512 only: not measured with AVX2). Those are
    the next rows of a 1x1 convolution with stride 1; with a stride, or where a piece has several taps, some of them. It
    pays for MobileNet's first 1x1 and ResNet's expanding ones (`make bench-peers ARGS='--only "pw1|expand"'`, Zen 4);
    asked for with several pieces as well, it cost stride 2 a little. All panels of outputs for 16 KB of y before the
    next pixels gained nothing, nor did asking for y alone with 27 steps on Zen 3, nor code without tests for tiles that
    are whole, nor a branch around bounds and summand (Zen 4).
    """
    shape = _literal(rows), _literal(vectors)
    intp = types.intp
    signature = types.void(
        rows, vectors, a, bases, intp, starts, intp, intp, b, intp, c, intp, intp, intp, y, places, intp, bias, intp,
        extra, intp, intp, intp,
    )  # fmt: skip

    def codegen(context, builder, signature, args):
        a, bases, *operands, c, c_step, accumulate, count = args[2:14]
        y, places, columns, bias, has_bias, extra, has_extra, bounds, past = args[14:]
        emit = _Emitter(builder, signature.args[2].dtype)
        tile = Tile(emit, *shape)
        masks = [emit.mask(_I64(0), builder.sub(columns, _I64(j * emit.lanes))) for j in range(shape[1])]
        biased = emit.splat(builder.icmp_signed("!=", has_bias, _I64(0)), scalar=_I1)
        shifts = [emit.masked_load(bias, _I64(j * emit.lanes), builder.and_(m, biased)) for j, m in enumerate(masks)]
        some = builder.icmp_signed("!=", has_extra, _I64(0))
        limits = Bounds(emit, bounds)
        past = builder.icmp_signed("!=", past, _I64(0))
        way = _WayOut(tile, masks, places, count, columns, some, past)
        asking = _asks(builder, *operands[2:4])
        loop, rows = Loop(builder, count, shape[0], "tile"), _I64(shape[0])
        i, bases, c, places = loop.begin((bases, rows), (c, builder.mul(c_step, rows)), (places, rows))
        if asking is not None:
            way.ask(y, places, asking)
        total = _row_sums(tile, a, bases, *operands, tile.start(c, c_step, accumulate), asking)
        used = builder.sub(count, i)
        end = builder.append_basic_block("written")
        for i in range(shape[0]):
            row = builder.append_basic_block("row")
            builder.cbranch(builder.icmp_signed("<", _I64(i), used), row, end)
            builder.position_at_end(row)
            place = builder.load(builder.gep(places, [_I64(i)]))
            summands = emit.masked_loads_if(some, builder.gep(extra, [place]), masks)
            values = [
                limits.apply(emit.add(emit.add(total[i * shape[1] + j], shifts[j]), summands[j]))
                for j in range(shape[1])
            ]
            way.write(values, y, place)
        builder.branch(end)
        builder.position_at_end(end)
        loop.close()
        return context.get_dummy_value()

    return signature, codegen


class _WayOut:
    """Rows of a tile to y. A masked store costs AVX2 12 cycles, so there rows are stored whole where that does no harm:
    where the pixels are neighbours, what a row writes beyond its end is written again by the next.
    """

    def __init__(self, tile, masks, places, count, columns, some, past):
        self.tile, self.masks, self.past = tile, masks, past
        builder, width = tile.builder, _I64(tile.vectors * tile.emit.lanes)
        first = builder.load(places)
        last = builder.load(builder.gep(places, [builder.sub(count, _I64(1))]))
        joined = builder.icmp_signed("==", builder.sub(last, first), builder.mul(builder.sub(count, _I64(1)), columns))
        joined = builder.and_(joined, builder.not_(some))  # a summand may lie where a row's end would be written
        reach = builder.select(joined, builder.sub(builder.add(last, columns), width), _I64(-1))
        self.reach = builder.select(builder.icmp_signed(">=", columns, width), _I64(2**62), reach)

    def ask(self, y, places, asking):
        """Have the tile's lines of y fetched while the sums are made."""
        emit, builder = self.tile.emit, self.tile.builder
        with builder.if_then(builder.and_(asking, builder.not_(self.past))):
            for i in range(self.tile.rows):
                row = builder.gep(y, [builder.load(builder.gep(places, [_I64(i)]))])
                for j in range(self.tile.vectors):
                    emit.prefetch(builder.gep(row, [_I64(j * emit.lanes)]), 3, write=True)

    def write(self, values, y, place):
        emit, builder = self.tile.emit, self.tile.builder
        where = builder.gep(y, [place])
        with builder.if_else(builder.icmp_signed("<=", place, self.reach)) as (whole, bounded):
            with whole, builder.if_else(self.past) as (past, kept):
                with past:
                    for j, value in enumerate(values):
                        emit.store_past(value, where, _I64(j * emit.lanes))
                with kept:
                    for j, value in enumerate(values):
                        emit.store(value, where, _I64(j * emit.lanes))
            with bounded:
                for j, (value, mask) in enumerate(zip(values, self.masks, strict=True)):
                    emit.masked_store(value, where, _I64(j * emit.lanes), mask)


def _asks(builder, segments, length):
    """Whether a tile asks for memory's lines beforehand; None where it never does."""
    if VECTOR_BYTES != 64:
        return None
    few = builder.icmp_signed("<=", length, _I64(_FEW_STEPS))
    return builder.and_(builder.icmp_signed("==", segments, _I64(1)), few)


def _row_sums(tile, a, bases, a_step, starts, segments, length, b, b_step, begun, asking=None):
    """A loop over segments around one over steps; the accumulators stay in registers through both.

    asking: whether to ask meanwhile for what lies behind the next tile's first row, as much as a tile reads; then
    `bases` has room for one more than the tiles, and any number may stand there: asking for what is not there does
    nothing.
    """
    builder = tile.builder
    ahead = each = None
    if asking is not None:
        ahead = builder.gep(a, [builder.load(builder.gep(bases, [_I64(tile.rows)]))])
        each = builder.select(asking, _I64(tile.rows), _I64(0))
    left = [builder.gep(a, [builder.load(builder.gep(bases, [_I64(i)]))]) for i in range(tile.rows)]
    entry = builder.block
    outer, inner = builder.append_basic_block("segment"), builder.append_basic_block("depth")
    after, done = builder.append_basic_block("after"), builder.append_basic_block("done")
    builder.branch(outer)

    builder.position_at_end(outer)
    segment, b_segment = builder.phi(_I64), builder.phi(b.type)
    outer_sums = tile.phis(begun, entry)
    first = builder.load(builder.gep(starts, [segment]))
    builder.branch(inner)

    builder.position_at_end(inner)
    k, place, b_now = builder.phi(_I64), builder.phi(_I64), builder.phi(b.type)
    sums = tile.phis(outer_sums, outer)
    if ahead is not None:
        tile.emit.prefetch(builder.gep(ahead, [builder.mul(k, each)]), 3)
    total = tile.step(sums, [builder.gep(row, [place]) for row in left], tile.loads(b_now))
    k_next, b_next = builder.add(k, _I64(1)), builder.gep(b_now, [b_step])
    place_next = builder.add(place, a_step)
    for phi, start, following in ((k, _I64(0), k_next), (place, first, place_next), (b_now, b_segment, b_next)):
        phi.add_incoming(start, outer)
        phi.add_incoming(following, inner)
    tile.extend(sums, total, inner)
    builder.cbranch(builder.icmp_signed("<", k_next, length), inner, after)

    builder.position_at_end(after)
    segment_next = builder.add(segment, _I64(1))
    for phi, start, following in ((segment, _I64(0), segment_next), (b_segment, b, b_next)):
        phi.add_incoming(start, entry)
        phi.add_incoming(following, after)
    tile.extend(outer_sums, total, after)
    builder.cbranch(builder.icmp_signed("<", segment_next, segments), outer, done)
    builder.position_at_end(done)
    return total
