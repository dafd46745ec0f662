"""Register tiles for convolutions: products whose operands are read where they lie, without packing.

Both keep rows x vectors accumulators in registers over the whole sum, as `simd.micro_kernel` does, and differ in how an
operand is found:

- `offset_product`: the vectors of step k start at b[offsets[k]]: neighbouring pixels of one tap (conv_nchw.py).
- `row_product`: row i of the left operand starts at a[bases[i]], anywhere: one pixel's channels (conv_nhwc.py), one
  tap's pixels (conv_weight.py).
"""

from numba import types
from numba.extending import intrinsic

from tilewise.kernels.cpu.simd import _I1, _I64, _Emitter, _literal


class _Tile:
    """rows x vectors accumulators that pass through loops as phi nodes."""

    def __init__(self, emit, rows, vectors):
        self.emit, self.builder = emit, emit.builder
        self.rows, self.vectors = rows, vectors

    def start(self, c, c_step, accumulate):
        """C itself where accumulate is not 0, else zeros; ends in a new block."""
        builder, emit = self.builder, self.emit
        reading, clearing = builder.append_basic_block("read_tile"), builder.append_basic_block("clear_tile")
        begin = builder.append_basic_block("begin")
        builder.cbranch(builder.icmp_signed("!=", accumulate, _I64(0)), reading, clearing)
        builder.position_at_end(reading)
        old = [emit.load(c, self._place(c_step, i, j)) for i in range(self.rows) for j in range(self.vectors)]
        builder.branch(begin)
        builder.position_at_end(clearing)
        builder.branch(begin)
        builder.position_at_end(begin)
        values = []
        for value in old:
            phi = builder.phi(emit.vector)
            phi.add_incoming(value, reading)
            phi.add_incoming(emit.zero, clearing)
            values.append(phi)
        return values

    def _place(self, c_step, i, j):
        return self.builder.add(self.builder.mul(c_step, _I64(i)), _I64(j * self.emit.lanes))

    def phis(self, values, block):
        phis = [self.builder.phi(self.emit.vector) for _ in values]
        self.extend(phis, values, block)
        return phis

    @staticmethod
    def extend(phis, values, block):
        for phi, value in zip(phis, values, strict=True):
            phi.add_incoming(value, block)

    def step(self, values, row_values, vectors):
        """One step of the sum: values + (column of row_values) x (row of vectors)."""
        total = []
        for i, scalar in enumerate(row_values):
            row = self.emit.splat(self.builder.load(scalar))
            total += [self.emit.multiply_add(row, v, values[i * self.vectors + j]) for j, v in enumerate(vectors)]
        return total

    def finish(self, values, c, c_step):
        for i in range(self.rows):
            for j in range(self.vectors):
                self.emit.store(values[i * self.vectors + j], c, self._place(c_step, i, j))

    def loads(self, pointer):
        return [self.emit.load(pointer, _I64(j * self.emit.lanes)) for j in range(self.vectors)]


@intrinsic(prefer_literal=True)
def offset_product(typingctx, rows, vectors, a, b, offsets, depth, c, accumulate):
    """C[i, j] (+)= sum over k < depth of a[k * rows + i] * b[offsets[k] + j] for a whole tile, rows x vectors * lanes.

    a: a packed panel. offsets: pointer to int64. c: the tile, its rows one after the other.
    """
    shape = _literal(rows), _literal(vectors)
    signature = types.void(rows, vectors, a, b, offsets, types.intp, c, types.intp)

    def codegen(context, builder, signature, args):
        a, b, offsets, depth, c, accumulate = args[2:]
        emit = _Emitter(builder, signature.args[2].dtype)
        tile = _Tile(emit, *shape)
        step = _I64(shape[1] * emit.lanes)
        tile.finish(_offset_sums(tile, a, b, offsets, depth, c, step, accumulate), c, step)
        return context.get_dummy_value()

    return signature, codegen


def _offset_sums(tile, a, b, offsets, depth, c, c_step, accumulate):
    builder, shape = tile.builder, (tile.rows, tile.vectors)
    begun = tile.start(c, c_step, accumulate)
    entry = builder.block
    loop = builder.append_basic_block("depth")
    builder.branch(loop)
    builder.position_at_end(loop)
    k, a_now = builder.phi(_I64), builder.phi(a.type)
    sums = tile.phis(begun, entry)
    place = builder.gep(b, [builder.load(builder.gep(offsets, [k]))])
    vectors = tile.loads(place)
    total = tile.step(sums, [builder.gep(a_now, [_I64(i)]) for i in range(shape[0])], vectors)
    k_next, a_next = builder.add(k, _I64(1)), builder.gep(a_now, [_I64(shape[0])])
    for phi, first, following in ((k, _I64(0), k_next), (a_now, a, a_next)):
        phi.add_incoming(first, entry)
        phi.add_incoming(following, loop)
    tile.extend(sums, total, loop)
    done = builder.append_basic_block("done")
    builder.cbranch(builder.icmp_signed("<", k_next, depth), loop, done)
    builder.position_at_end(done)
    return total


@intrinsic(prefer_literal=True)
def offset_product_to(
    typingctx, rows, vectors, a, b, offsets, depth, c, accumulate, y, y_step, places, used, bias, has_bias,
    relu,
):  # fmt: skip
    """`offset_product`, then bias and activation in registers, and straight to y.

    Row i < used goes to y[i * y_step ..]; of vector j the lanes places[6 * j] .. places[6 * j + 1] to offset
    places[6 * j + 2] (that of lane 0), and where a row of pixels ends within the vector, the lanes places[6 * j + 3] ..
    places[6 * j + 4] to offset places[6 * j + 5]. bias: one number a row, read where has_bias is not 0.
    """
    shape = _literal(rows), _literal(vectors)
    intp = types.intp
    signature = types.void(rows, vectors, a, b, offsets, intp, c, intp, y, intp, places, intp, bias, intp, intp)

    def codegen(context, builder, signature, args):
        a, b, offsets, depth, c, accumulate, y, y_step, places, used, bias, has_bias, relu = args[2:]
        emit = _Emitter(builder, signature.args[2].dtype)
        tile = _Tile(emit, *shape)
        step = _I64(shape[1] * emit.lanes)
        total = _offset_sums(tile, a, b, offsets, depth, c, step, accumulate)
        _emit_placed(tile, total, y, y_step, places, used, bias, has_bias, relu)
        return context.get_dummy_value()

    return signature, codegen


def _emit_placed(tile, total, y, y_step, places, used, bias, has_bias, relu):
    emit, builder = tile.emit, tile.builder
    end = builder.append_basic_block("placed")
    clamp = emit.splat(builder.icmp_signed("!=", relu, _I64(0)), scalar=_I1)
    biased = builder.icmp_signed("!=", has_bias, _I64(0))
    field = [builder.load(builder.gep(places, [_I64(i)])) for i in range(6 * tile.vectors)]
    first = [emit.mask(*field[6 * j : 6 * j + 2]) for j in range(tile.vectors)]
    second = [emit.mask(*field[6 * j + 3 : 6 * j + 5]) for j in range(tile.vectors)]
    broken = [builder.icmp_signed("<", *field[6 * j + 3 : 6 * j + 5]) for j in range(tile.vectors)]
    some_broken = broken[0]
    for one in broken[1:]:
        some_broken = builder.or_(some_broken, one)
    for i in range(tile.rows):
        row = builder.append_basic_block("row")
        builder.cbranch(builder.icmp_signed("<", _I64(i), used), row, end)
        builder.position_at_end(row)
        shifts = emit.splat(_load_if(builder, biased, builder.gep(bias, [_I64(i)]), emit))
        finished = []
        for value in total[i * tile.vectors : (i + 1) * tile.vectors]:
            value = emit.add(value, shifts)
            negative = builder.and_(builder.fcmp_ordered("<", value, emit.zero), clamp)
            finished.append(builder.select(negative, emit.zero, value))
        base = builder.gep(y, [builder.mul(y_step, _I64(i))])
        for j, value in enumerate(finished):
            emit.masked_store(value, base, field[6 * j + 2], first[j])
        with builder.if_then(some_broken):
            for j, value in enumerate(finished):
                emit.masked_store(value, base, field[6 * j + 5], second[j])
    builder.branch(end)
    builder.position_at_end(end)


def _load_if(builder, condition, pointer, emit):
    """The number there, or 0 without reading."""
    before = builder.block
    with builder.if_then(condition):
        value = builder.load(pointer)
        inside = builder.block
    phi = builder.phi(emit.scalar)
    phi.add_incoming(emit.scalar(0), before)
    phi.add_incoming(value, inside)
    return phi


@intrinsic(prefer_literal=True)
def row_product(typingctx, rows, vectors, a, bases, a_step, starts, segments, length, b, b_step, c, c_step, accumulate):
    """C[i, j] (+)= sum over s < segments, k < length of a[bases[i] + starts[s] + k * a_step] * b[(s * length + k) *
    b_step + j] for a whole tile, rows x vectors * lanes.

    bases, starts: pointers to int64. C's rows are c_step apart; the whole tile is written.
    """
    shape = _literal(rows), _literal(vectors)
    intp = types.intp
    signature = types.void(rows, vectors, a, bases, intp, starts, intp, intp, b, intp, c, intp, intp)

    def codegen(context, builder, signature, args):
        *operands, c, c_step, accumulate = args[2:]
        tile = _Tile(_Emitter(builder, signature.args[2].dtype), *shape)
        tile.finish(_row_sums(tile, *operands, tile.start(c, c_step, accumulate)), c, c_step)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def row_product_to(
    typingctx, rows, vectors, a, bases, a_step, starts, segments, length, b, b_step, c, c_step, accumulate,
    y, places, used, columns, bias, has_bias, extra, has_extra, relu,
):  # fmt: skip
    """`row_product`, then bias, summand and activation in registers, and straight to y.

    Row i < used goes to y[places[i]], its first `columns` lanes. bias: one number a column, read where has_bias is not
    0; extra: laid out as y, read where has_extra is not 0; relu: max(., 0) where it is not 0.
    """
    shape = _literal(rows), _literal(vectors)
    intp = types.intp
    signature = types.void(
        rows, vectors, a, bases, intp, starts, intp, intp, b, intp, c, intp, intp, y, places, intp, intp, bias, intp,
        extra, intp, intp,
    )  # fmt: skip

    def codegen(context, builder, signature, args):
        *operands, c, c_step, accumulate = args[2:13]
        y, places, used, columns, bias, has_bias, extra, has_extra, relu = args[13:]
        emit = _Emitter(builder, signature.args[2].dtype)
        tile = _Tile(emit, *shape)
        total = _row_sums(tile, *operands, tile.start(c, c_step, accumulate))
        masks = [emit.mask(_I64(0), builder.sub(columns, _I64(j * emit.lanes))) for j in range(shape[1])]
        biased = emit.splat(builder.icmp_signed("!=", has_bias, _I64(0)), scalar=_I1)
        clamp = emit.splat(builder.icmp_signed("!=", relu, _I64(0)), scalar=_I1)
        shifts = [emit.masked_load(bias, _I64(j * emit.lanes), builder.and_(m, biased)) for j, m in enumerate(masks)]
        some = builder.icmp_signed("!=", has_extra, _I64(0))
        end = builder.append_basic_block("written")
        for i in range(shape[0]):
            row = builder.append_basic_block("row")
            builder.cbranch(builder.icmp_signed("<", _I64(i), used), row, end)
            builder.position_at_end(row)
            place = builder.load(builder.gep(places, [_I64(i)]))
            where = builder.gep(y, [place])
            summands = emit.masked_loads_if(some, builder.gep(extra, [place]), masks)
            for j, mask in enumerate(masks):
                value = emit.add(emit.add(total[i * shape[1] + j], shifts[j]), summands[j])
                negative = builder.and_(builder.fcmp_ordered("<", value, emit.zero), clamp)
                value = builder.select(negative, emit.zero, value)
                emit.masked_store(value, where, _I64(j * emit.lanes), mask)
        builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return signature, codegen


def _row_sums(tile, a, bases, a_step, starts, segments, length, b, b_step, begun):
    """A loop over segments around one over steps; the accumulators stay in registers through both."""
    builder = tile.builder
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
