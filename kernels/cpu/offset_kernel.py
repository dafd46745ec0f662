"""Products whose right operand is found through a table: step k reads its vectors at b[offsets[k]] (conv_nchw.py)."""

from numba import types
from numba.extending import intrinsic

from tilewise.kernels.cpu.register_tile import Bounds, Loop, Tile, row_pointers
from tilewise.kernels.cpu.simd import _I64, _Emitter, _literal

# Below so many steps a tile is done so soon that its stores wait for memory: y's lines are asked for before. Measured
# with 27 steps: a tenth faster; with 147 the requests cost as much as they gain.
_FEW_STEPS = 64


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
def offset_product(
    typingctx, rows, vectors, a, a_step, b, offsets, depth, c, c_tile, accumulate, outputs, finishing, y, y_step,
    places, bias, has_bias, bounds, panels, c_panel,
):  # fmt: skip
    """C[i, j] (+)= sum over k < depth of a[i * a_step + k] * b[offsets[k] + j], i < outputs.

    In tiles of rows x vectors * lanes, all of which are written. offsets: pointer to int64. c: the first tile, its rows
    one after the other; the next is c_tile on.

    Where finishing is not 0 the sums are not written to C: they get bias and activation in registers, and go straight
    to y; for neighbouring panels of b and y. (One function for both, because each is three tiles to compile.)

    All tiles in one call, for setting one up costs 100 cycles and more: as much as 8 steps k of a tile. Row i < outputs
    goes to y[i * y_step ..]; of vector j the lanes places[6 * j] .. places[6 * j + 1] to offset places[6 * j + 2] (that
    of lane 0), and where a row of pixels ends within the vector, the lanes places[6 * j + 3] .. places[6 * j + 4] to
    offset places[6 * j + 5]. bias: one number a row, read where has_bias is not 0. Panel q < panels is the same with b
    and y a panel's width further on for each before it, and c c_panel further on.
    """
    shape = _literal(rows), _literal(vectors)
    intp = types.intp
    signature = types.void(
        rows, vectors, a, intp, b, offsets, intp, c, intp, intp, intp, intp, y, intp, places, bias, intp, intp, intp,
        intp,
    )  # fmt: skip

    def codegen(context, builder, signature, args):
        a, a_step, b, offsets, depth, c, c_tile, accumulate, outputs, finishing, y, y_step, places, bias = args[2:16]
        has_bias, bounds, panels, c_panel = args[16:]
        emit = _Emitter(builder, signature.args[2].dtype)
        tile = Tile(emit, *shape)
        step = _I64(shape[1] * emit.lanes)
        way = _WayOut(tile, places, builder.icmp_signed("!=", has_bias, _I64(0)), bounds)
        beside = Loop(builder, panels, 1, "panel")
        _, b, c, y = beside.begin((b, step), (c, c_panel), (y, step))
        loop = Loop(builder, outputs, shape[0], "tile")
        a_tile, y_tile = builder.mul(a_step, _I64(shape[0])), builder.mul(y_step, _I64(shape[0]))
        # without a bias its pointer must not wander off
        bias_tile = builder.select(way.biased, _I64(shape[0]), _I64(0))
        o, a, c, y, bias = loop.begin((a, a_tile), (c, c_tile), (y, y_tile), (bias, bias_tile))
        rest = builder.sub(outputs, o)
        left = row_pointers(tile, a, a_step, rest)
        soon = builder.icmp_signed("<", depth, _I64(_FEW_STEPS))
        finished = builder.icmp_signed("!=", finishing, _I64(0))
        with builder.if_then(builder.and_(soon, finished)):
            way.ask(y, y_step)
        total = _offset_sums(tile, left, b, offsets, depth, c, step, accumulate)
        with builder.if_else(finished) as (to_y, to_c):
            with to_y:
                way.write(total, y, y_step, rest, bias)
            with to_c:
                tile.finish(total, c, step)
        loop.close()
        beside.close()
        return context.get_dummy_value()

    return signature, codegen


class _WayOut:
    """Where the vectors of a tile's rows go, as masks and offsets that all tiles of a call share."""

    def __init__(self, tile, places, biased, bounds):
        self.tile, self.biased = tile, biased
        emit, builder = tile.emit, tile.builder
        self.bounds = Bounds(emit, bounds)
        field = [builder.load(builder.gep(places, [_I64(i)])) for i in range(6 * tile.vectors)]
        self.first = [emit.mask(*field[6 * j : 6 * j + 2]) for j in range(tile.vectors)]
        self.second = [emit.mask(*field[6 * j + 3 : 6 * j + 5]) for j in range(tile.vectors)]
        edges = [(_I64(0), field[6 * j]) for j in range(tile.vectors)]
        edges += [(field[6 * j + 1], _I64(emit.lanes)) for j in range(tile.vectors)]
        self.whole = builder.icmp_signed("==", *edges[0])
        for bound in edges[1:]:
            self.whole = builder.and_(self.whole, builder.icmp_signed("==", *bound))
        self.offsets = [(field[6 * j + 2], field[6 * j + 5]) for j in range(tile.vectors)]
        self.broken = [builder.icmp_signed("<", *field[6 * j + 3 : 6 * j + 5]) for j in range(tile.vectors)]

    def ask(self, y, y_step):
        """Have the lines of y fetched while the sums are made."""
        builder = self.tile.builder
        for i in range(self.tile.rows):
            base = builder.gep(y, [builder.mul(y_step, _I64(i))])
            for offset, _ in self.offsets:
                self.tile.emit.prefetch(builder.gep(base, [offset]), 3, write=True)

    def write(self, total, y, y_step, used, bias):
        """y's rows i < used = f(total + bias), the lanes of the masks."""
        tile, emit, builder = self.tile, self.tile.emit, self.tile.builder
        end = builder.append_basic_block("placed")
        for i in range(tile.rows):
            row = builder.append_basic_block("row")
            builder.cbranch(builder.icmp_signed("<", _I64(i), used), row, end)
            builder.position_at_end(row)
            shifts = emit.splat(_load_if(builder, self.biased, builder.gep(bias, [_I64(i)]), emit))
            sums = total[i * tile.vectors : (i + 1) * tile.vectors]
            finished = [self.bounds.apply(emit.add(value, shifts)) for value in sums]
            base = builder.gep(y, [builder.mul(y_step, _I64(i))])
            with builder.if_else(self.whole) as (whole, parts):
                with whole:
                    for value, (offset, _) in zip(finished, self.offsets, strict=True):
                        emit.store(value, base, offset)
                with parts:
                    self._write_parts(finished, base)
        builder.branch(end)
        builder.position_at_end(end)

    def _write_parts(self, values, base):
        emit, builder = self.tile.emit, self.tile.builder
        for value, (offset, _), mask in zip(values, self.offsets, self.first, strict=True):
            emit.masked_store(value, base, offset, mask)
        for value, (_, offset), mask, broken in zip(values, self.offsets, self.second, self.broken, strict=True):
            with builder.if_then(broken):
                emit.masked_store(value, base, offset, mask)


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
