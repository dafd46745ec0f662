"""Matrix products whose operands lie as they are; the first tiles pack panels for the others (conv_pointwise.py)."""

from numba import types
from numba.extending import intrinsic

from tilewise.kernels.cpu.register_tile import Bounds, Loop, Tile, row_pointers
from tilewise.kernels.cpu.simd import _I1, _I64, _Emitter, _literal


@intrinsic(prefer_literal=True)
def panel_product_to(
    typingctx, rows, vectors, a, b, b_step, panel, depth, outputs, panels, columns, y, y_step, bias, extra, has_extra,
    bounds,
):  # fmt: skip
    """y[i * y_step + j] = f(bias[i] + extra[i * y_step + j] + sum over k < depth of a[i * depth + k] * b[k * b_step +
    j]), i < outputs, j < (panels - 1) * width + columns, width = vectors * lanes; f keeps to `Bounds`.

    In tiles of rows x width; the last panel's has `columns` <= width, and so have the others, if there are any. The
    first tiles read b and leave it in `panel`, one panel after another, its rows a width apart; the others read that,
    and ask for b's next panels. bias: for all rows of all tiles. extra: read where has_extra is not 0.
    """
    shape = _literal(rows), _literal(vectors)
    intp = types.intp
    signature = types.void(rows, vectors, a, b, intp, panel, *[intp] * 4, y, intp, bias, extra, intp, intp)

    def codegen(context, builder, signature, args):
        a, b, b_step, panel, depth, outputs, panels, columns, y, y_step, bias, extra, has_extra, bounds = args[2:]
        tile = Tile(_Emitter(builder, signature.args[2].dtype), *shape)
        way = _WayThrough(
            tile, columns, y_step, builder.icmp_signed("!=", has_extra, _I64(0)), Bounds(tile.emit, bounds)
        )
        step, width = _I64(shape[0]), _I64(shape[1] * tile.emit.lanes)
        more, size = builder.select(way.has_extra, width, _I64(0)), builder.mul(depth, width)
        beside = Loop(builder, panels, 1, "first")
        _, b_now, panel_now, y_now, extra_now = beside.begin((b, width), (panel, size), (y, width), (extra, more))
        begun = way.start(bias, extra_now, outputs)
        a_tile = builder.mul(depth, step)
        next_rows = builder.gep(a, [a_tile])
        way.write(way.sums(begun, a, b_now, b_step, depth, outputs, next_rows, panel_now), y_now, outputs)
        beside.close()
        rest = builder.sub(outputs, step)
        with builder.if_then(builder.icmp_signed(">", rest, _I64(0))):
            y_tile = builder.mul(y_step, step)
            extra_tile = builder.select(way.has_extra, y_tile, _I64(0))
            moving = (a, a_tile), (y, y_tile), (bias, step), (extra, extra_tile)
            loop = Loop(builder, rest, shape[0], "tile")
            o, a, y, bias, extra = loop.begin(*((builder.gep(pointer, [by]), by) for pointer, by in moving))
            left = builder.sub(rest, o)
            asking = builder.icmp_signed("<", o, _I64(shape[0] * shape[1]))
            vector = builder.mul(builder.sdiv(o, step), _I64(tile.emit.lanes))
            ahead = builder.gep(b, [builder.add(builder.mul(panels, width), vector)])
            next_rows = builder.gep(a, [a_tile])
            apart = builder.select(asking, b_step, _I64(0))
            further = builder.select(asking, width, _I64(0))
            beside = Loop(builder, panels, 1, "beside")
            _, panel, y, extra, ahead = beside.begin((panel, size), (y, width), (extra, more), (ahead, further))
            begun = way.start(bias, extra, left)
            way.write(way.sums(begun, a, panel, width, depth, left, next_rows, ahead=(ahead, apart)), y, left)
            beside.close()
            loop.close()
        return context.get_dummy_value()

    return signature, codegen


class _WayThrough:
    """The parts of `panel_product_to` that all tiles share."""

    def __init__(self, tile, columns, y_step, has_extra, bounds):
        self.tile, self.y_step, self.has_extra, self.bounds = tile, y_step, has_extra, bounds
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

    def sums(self, begun, a, b, b_step, depth, count, next_rows, panel=None, ahead=None):
        """The sum over k; with a panel, b is copied into it, the last vector under its mask.

        next_rows: the next tile's rows of a, asked for meanwhile: in a network they come from memory or the last cache,
        and eight runs as short as the channels are too many, and too short, for the processor to foresee.
        """
        tile, builder, emit = self.tile, self.tile.builder, self.tile.emit
        left = row_pointers(tile, a, depth, count)
        entry, loop = builder.block, builder.append_basic_block("depth")
        builder.branch(loop)
        builder.position_at_end(loop)
        k, b_now = builder.phi(_I64), builder.phi(b.type)
        sums = tile.phis(begun, entry)
        places = [_I64(j * emit.lanes) for j in range(tile.vectors)]
        emit.prefetch(builder.gep(next_rows, [builder.mul(k, _I64(tile.rows))]), 2)
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
                value = self.bounds.apply(total[i * self.tile.vectors + j])
                emit.masked_store(value, row, _I64(j * emit.lanes), mask)
