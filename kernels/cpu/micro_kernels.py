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


class _Loop:
    """for (i = 0; i < end; i += step): `i`, and pointers that advance with it, between `begin` and `close`."""

    def __init__(self, builder, end, step, name):
        self.builder, self.end, self.step, self.name = builder, end, _I64(step), name

    def begin(self, *advancing):
        """advancing: pairs of a pointer and its step. Returns what they are in this round; end > 0 is assumed."""
        builder, entry = self.builder, self.builder.block
        self.top = builder.append_basic_block(self.name)
        builder.branch(self.top)
        builder.position_at_end(self.top)
        self.i = builder.phi(_I64)
        self.i.add_incoming(_I64(0), entry)
        self.moving = [(builder.phi(pointer.type), step) for pointer, step in advancing]
        for (phi, _), (pointer, _) in zip(self.moving, advancing, strict=True):
            phi.add_incoming(pointer, entry)
        return self.i, *(phi for phi, _ in self.moving)

    def close(self):
        builder = self.builder
        following = builder.add(self.i, self.step)
        self.i.add_incoming(following, builder.block)
        for phi, step in self.moving:
            phi.add_incoming(builder.gep(phi, [step]), builder.block)
        after = builder.append_basic_block(f"after_{self.name}")
        builder.cbranch(builder.icmp_signed("<", following, self.end), self.top, after)
        builder.position_at_end(after)


@intrinsic(prefer_literal=True)
def offset_product(typingctx, rows, vectors, a, a_step, b, offsets, depth, c, c_tile, accumulate, outputs):
    """C[i, j] (+)= sum over k < depth of a[i * a_step + k] * b[offsets[k] + j], i < outputs.

    In tiles of rows x vectors * lanes, all of which are written. offsets: pointer to int64. c: the first tile, its rows
    one after the other; the next is c_tile on.
    """
    shape = _literal(rows), _literal(vectors)
    intp = types.intp
    signature = types.void(rows, vectors, a, intp, b, offsets, intp, c, intp, intp, intp)

    def codegen(context, builder, signature, args):
        a, a_step, b, offsets, depth, c, c_tile, accumulate, outputs = args[2:]
        emit = _Emitter(builder, signature.args[2].dtype)
        tile = _Tile(emit, *shape)
        step = _I64(shape[1] * emit.lanes)
        loop = _Loop(builder, outputs, shape[0], "tile")
        o, a, c = loop.begin((a, builder.mul(a_step, _I64(shape[0]))), (c, c_tile))
        left = _row_pointers(tile, a, a_step, builder.sub(outputs, o))
        tile.finish(_offset_sums(tile, left, b, offsets, depth, c, step, accumulate), c, step)
        loop.close()
        return context.get_dummy_value()

    return signature, codegen


def _row_pointers(tile, a, a_step, count):
    """Where the rows of a tile begin in the left operand; those that do not exist repeat the last."""
    builder, last, pointers = tile.builder, tile.builder.sub(count, _I64(1)), []
    for i in range(tile.rows):
        row = builder.select(builder.icmp_signed("<", _I64(i), last), _I64(i), last)
        pointers.append(builder.gep(a, [builder.mul(row, a_step)]))
    return pointers


def _offset_sums(tile, left, b, offsets, depth, c, c_step, accumulate):
    builder = tile.builder
    begun = tile.start(c, c_step, accumulate)
    entry = builder.block
    loop = builder.append_basic_block("depth")
    builder.branch(loop)
    builder.position_at_end(loop)
    k = builder.phi(_I64)
    sums = tile.phis(begun, entry)
    place = builder.gep(b, [builder.load(builder.gep(offsets, [k]))])
    total = tile.step(sums, [builder.gep(row, [k]) for row in left], tile.loads(place))
    k_next = builder.add(k, _I64(1))
    k.add_incoming(_I64(0), entry)
    k.add_incoming(k_next, loop)
    tile.extend(sums, total, loop)
    done = builder.append_basic_block("done")
    builder.cbranch(builder.icmp_signed("<", k_next, depth), loop, done)
    builder.position_at_end(done)
    return total


@intrinsic(prefer_literal=True)
def offset_product_to(
    typingctx, rows, vectors, a, a_step, b, offsets, depth, c, c_tile, accumulate, outputs, y, y_step, places, bias,
    has_bias, relu,
):  # fmt: skip
    """`offset_product`, then bias and activation in registers, and straight to y.

    All tiles in one call, for setting one up costs 100 cycles and more: as much as 8 steps k of a tile. Row i < outputs
    goes to y[i * y_step ..]; of vector j the lanes places[6 * j] .. places[6 * j + 1] to offset places[6 * j + 2] (that
    of lane 0), and where a row of pixels ends within the vector, the lanes places[6 * j + 3] .. places[6 * j + 4] to
    offset places[6 * j + 5]. bias: one number a row, read where has_bias is not 0.
    """
    shape = _literal(rows), _literal(vectors)
    intp = types.intp
    signature = types.void(
        rows, vectors, a, intp, b, offsets, intp, c, intp, intp, intp, y, intp, places, bias, intp, intp
    )

    def codegen(context, builder, signature, args):
        a, a_step, b, offsets, depth, c, c_tile, accumulate, outputs, y, y_step, places, bias, has_bias, relu = args[2:]
        emit = _Emitter(builder, signature.args[2].dtype)
        tile = _Tile(emit, *shape)
        step = _I64(shape[1] * emit.lanes)
        way = _WayOut(tile, places, builder.icmp_signed("!=", has_bias, _I64(0)), relu)
        loop = _Loop(builder, outputs, shape[0], "tile")
        a_tile, y_tile = builder.mul(a_step, _I64(shape[0])), builder.mul(y_step, _I64(shape[0]))
        # without a bias its pointer must not wander off
        bias_tile = builder.select(way.biased, _I64(shape[0]), _I64(0))
        o, a, c, y, bias = loop.begin((a, a_tile), (c, c_tile), (y, y_tile), (bias, bias_tile))
        rest = builder.sub(outputs, o)
        left = _row_pointers(tile, a, a_step, rest)
        way.write(_offset_sums(tile, left, b, offsets, depth, c, step, accumulate), y, y_step, rest, bias)
        loop.close()
        return context.get_dummy_value()

    return signature, codegen


class _WayOut:
    """Where the vectors of a tile's rows go, as masks and offsets that all tiles of a call share."""

    def __init__(self, tile, places, biased, relu):
        self.tile, self.biased = tile, biased
        emit, builder = tile.emit, tile.builder
        self.floor = _floor(emit, relu)
        field = [builder.load(builder.gep(places, [_I64(i)])) for i in range(6 * tile.vectors)]
        self.first = [emit.mask(*field[6 * j : 6 * j + 2]) for j in range(tile.vectors)]
        self.second = [emit.mask(*field[6 * j + 3 : 6 * j + 5]) for j in range(tile.vectors)]
        self.offsets = [(field[6 * j + 2], field[6 * j + 5]) for j in range(tile.vectors)]
        self.broken = _I1(0)
        for j in range(tile.vectors):
            one = builder.icmp_signed("<", *field[6 * j + 3 : 6 * j + 5])
            self.broken = builder.or_(self.broken, one)

    def write(self, total, y, y_step, used, bias):
        """y's rows i < used = max(total + bias, floor), the lanes of the masks."""
        tile, emit, builder = self.tile, self.tile.emit, self.tile.builder
        end = builder.append_basic_block("placed")
        for i in range(tile.rows):
            row = builder.append_basic_block("row")
            builder.cbranch(builder.icmp_signed("<", _I64(i), used), row, end)
            builder.position_at_end(row)
            shifts = emit.splat(_load_if(builder, self.biased, builder.gep(bias, [_I64(i)]), emit))
            sums = total[i * tile.vectors : (i + 1) * tile.vectors]
            finished = [emit.maximum(self.floor, emit.add(value, shifts)) for value in sums]
            base = builder.gep(y, [builder.mul(y_step, _I64(i))])
            for value, (offset, _), mask in zip(finished, self.offsets, self.first, strict=True):
                emit.masked_store(value, base, offset, mask)
            with builder.if_then(self.broken):
                for value, (_, offset), mask in zip(finished, self.offsets, self.second, strict=True):
                    emit.masked_store(value, base, offset, mask)
        builder.branch(end)
        builder.position_at_end(end)


@intrinsic(prefer_literal=True)
def panel_product_to(
    typingctx, rows, vectors, a, b, b_step, panel, depth, outputs, columns, y, y_step, bias, extra, has_extra, relu
):  # fmt: skip
    """y[i * y_step + j] = f(bias[i] + extra[i * y_step + j] + sum over k < depth of a[i * depth + k] * b[k * b_step +
    j]), i < outputs, j < columns; f is max(., 0) where relu is not 0.

    In tiles of rows x vectors * lanes. The first reads b and leaves it in `panel`, its rows vectors * lanes apart; the
    others read that, and ask for b's next panel. bias: for all rows of all tiles. extra: read where has_extra is not 0.
    """
    shape = _literal(rows), _literal(vectors)
    intp = types.intp
    signature = types.void(rows, vectors, a, b, intp, panel, intp, intp, intp, y, intp, bias, extra, intp, intp)

    def codegen(context, builder, signature, args):
        a, b, b_step, panel, depth, outputs, columns, y, y_step, bias, extra, has_extra, relu = args[2:]
        tile = _Tile(_Emitter(builder, signature.args[2].dtype), *shape)
        way = _WayThrough(tile, columns, y_step, builder.icmp_signed("!=", has_extra, _I64(0)), _floor(tile.emit, relu))
        step = _I64(shape[0])
        way.write(way.sums(way.start(bias, extra, outputs), a, b, b_step, depth, outputs, panel), y, outputs)
        rest = builder.sub(outputs, step)
        with builder.if_then(builder.icmp_signed(">", rest, _I64(0))):
            a_tile, y_tile = builder.mul(depth, step), builder.mul(y_step, step)
            extra_tile = builder.select(way.has_extra, y_tile, _I64(0))
            moving = (a, a_tile), (y, y_tile), (bias, step), (extra, extra_tile)
            loop = _Loop(builder, rest, shape[0], "tile")
            o, a, y, bias, extra = loop.begin(*((builder.gep(pointer, [by]), by) for pointer, by in moving))
            left = builder.sub(rest, o)
            width = _I64(shape[1] * tile.emit.lanes)
            asking = builder.icmp_signed("<", o, _I64(shape[0] * shape[1]))
            ahead = builder.gep(b, [builder.add(width, builder.mul(builder.sdiv(o, step), _I64(tile.emit.lanes)))])
            ahead = ahead, builder.select(asking, b_step, _I64(0))
            way.write(way.sums(way.start(bias, extra, left), a, panel, width, depth, left, ahead=ahead), y, left)
            loop.close()
        return context.get_dummy_value()

    return signature, codegen


class _WayThrough:
    """The parts of `panel_product_to` that all tiles share."""

    def __init__(self, tile, columns, y_step, has_extra, floor):
        self.tile, self.y_step, self.has_extra, self.floor = tile, y_step, has_extra, floor
        emit = tile.emit
        self.masks = [emit.mask(_I64(0), emit.builder.sub(columns, _I64(j * emit.lanes))) for j in range(tile.vectors)]

    def _rows(self, pointer, count):
        """For each row of the tile: the pointer to it, in a block that is only reached where it is below count."""
        builder = self.tile.builder
        end = builder.append_basic_block("rows_done")
        for i in range(self.tile.rows):
            row = builder.append_basic_block("row")
            builder.cbranch(builder.icmp_signed("<", _I64(i), count), row, end)
            builder.position_at_end(row)
            yield i, builder.gep(pointer, [builder.mul(self.y_step, _I64(i))])
        builder.branch(end)
        builder.position_at_end(end)

    def start(self, bias, extra, count):
        """Accumulators that begin with bias and extra."""
        builder, tile, emit = self.tile.builder, self.tile, self.tile.emit
        shifts = [emit.splat(builder.load(builder.gep(bias, [_I64(i)]))) for i in range(tile.rows)]
        plain = [shift for shift in shifts for _ in range(tile.vectors)]
        before, adding = builder.block, builder.append_basic_block("add_extra")
        begin = builder.append_basic_block("begin")
        builder.cbranch(self.has_extra, adding, begin)
        builder.position_at_end(adding)
        more = []
        for i in range(tile.rows):
            inside = emit.splat(builder.icmp_signed("<", _I64(i), count), scalar=_I1)
            row = builder.gep(extra, [builder.mul(self.y_step, _I64(i))])
            for j, mask in enumerate(self.masks):
                value = emit.masked_load(row, _I64(j * emit.lanes), builder.and_(mask, inside))
                more.append(emit.add(plain[i * tile.vectors + j], value))
        builder.branch(begin)
        builder.position_at_end(begin)
        phis = tile.phis(plain, before)
        tile.extend(phis, more, adding)
        return phis

    def sums(self, begun, a, b, b_step, depth, count, panel=None, ahead=None):
        """The sum over k; with a panel, b is copied into it, the last vector under its mask."""
        tile, builder, emit = self.tile, self.tile.builder, self.tile.emit
        left = _row_pointers(tile, a, depth, count)
        entry, loop = builder.block, builder.append_basic_block("depth")
        builder.branch(loop)
        builder.position_at_end(loop)
        k, b_now = builder.phi(_I64), builder.phi(b.type)
        sums = tile.phis(begun, entry)
        places = [_I64(j * emit.lanes) for j in range(tile.vectors)]
        if ahead is not None:
            emit.prefetch(builder.gep(ahead[0], [builder.mul(k, ahead[1])]), 2)
        if panel is None:
            vectors = tile.loads(b_now)
        else:
            vectors = [emit.load(b_now, at) for at in places[:-1]]
            vectors.append(emit.masked_load(b_now, places[-1], self.masks[-1]))
            row = builder.gep(panel, [builder.mul(k, _I64(tile.vectors * emit.lanes))])
            for at, vector in zip(places, vectors, strict=True):
                emit.store(vector, row, at)
        total = tile.step(sums, [builder.gep(row, [k]) for row in left], vectors)
        k_next, b_next = builder.add(k, _I64(1)), builder.gep(b_now, [b_step])
        for phi, first, following in ((k, _I64(0), k_next), (b_now, b, b_next)):
            phi.add_incoming(first, entry)
            phi.add_incoming(following, loop)
        tile.extend(sums, total, loop)
        done = builder.append_basic_block("done")
        builder.cbranch(builder.icmp_signed("<", k_next, depth), loop, done)
        builder.position_at_end(done)
        return total

    def write(self, total, y, count):
        emit = self.tile.emit
        for i, row in self._rows(y, count):
            for j, mask in enumerate(self.masks):
                value = emit.maximum(self.floor, total[i * self.tile.vectors + j])
                emit.masked_store(value, row, _I64(j * emit.lanes), mask)


def _floor(emit, relu):
    """What `_Emitter.maximum` raises results to: 0 for relu, else -inf, which lets all pass."""
    no_floor = emit.scalar(float("-inf"))
    active = emit.builder.icmp_signed("!=", relu, _I64(0))
    return emit.splat(emit.builder.select(active, emit.scalar(0), no_floor))


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
        tile = _Tile(_Emitter(builder, signature.args[2].dtype), *shape)
        loop = _Loop(builder, count, shape[0], "tile")
        _, bases, c = loop.begin((bases, _I64(shape[0])), (c, builder.mul(c_step, _I64(shape[0]))))
        tile.finish(_row_sums(tile, a, bases, *operands, tile.start(c, c_step, accumulate)), c, c_step)
        loop.close()
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def row_product_to(
    typingctx, rows, vectors, a, bases, a_step, starts, segments, length, b, b_step, c, c_step, accumulate, count,
    y, places, columns, bias, has_bias, extra, has_extra, relu,
):  # fmt: skip
    """`row_product`, then bias, summand and activation in registers, and straight to y.

    Row i < count goes to y[places[i]], its first `columns` lanes. bias: one number a column, read where has_bias is not
    0; extra: laid out as y, read where has_extra is not 0; relu: max(., 0) where it is not 0.
    """
    shape = _literal(rows), _literal(vectors)
    intp = types.intp
    signature = types.void(
        rows, vectors, a, bases, intp, starts, intp, intp, b, intp, c, intp, intp, intp, y, places, intp, bias, intp,
        extra, intp, intp,
    )  # fmt: skip

    def codegen(context, builder, signature, args):
        a, bases, *operands, c, c_step, accumulate, count = args[2:14]
        y, places, columns, bias, has_bias, extra, has_extra, relu = args[14:]
        emit = _Emitter(builder, signature.args[2].dtype)
        tile = _Tile(emit, *shape)
        masks = [emit.mask(_I64(0), builder.sub(columns, _I64(j * emit.lanes))) for j in range(shape[1])]
        biased = emit.splat(builder.icmp_signed("!=", has_bias, _I64(0)), scalar=_I1)
        shifts = [emit.masked_load(bias, _I64(j * emit.lanes), builder.and_(m, biased)) for j, m in enumerate(masks)]
        some = builder.icmp_signed("!=", has_extra, _I64(0))
        floor = _floor(emit, relu)
        loop, rows = _Loop(builder, count, shape[0], "tile"), _I64(shape[0])
        i, bases, c, places = loop.begin((bases, rows), (c, builder.mul(c_step, rows)), (places, rows))
        total = _row_sums(tile, a, bases, *operands, tile.start(c, c_step, accumulate))
        used = builder.sub(count, i)
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
                value = emit.maximum(floor, value)
                emit.masked_store(value, where, _I64(j * emit.lanes), mask)
        builder.branch(end)
        builder.position_at_end(end)
        loop.close()
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
