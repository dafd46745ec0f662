"""The inner loops of depthwise convolutions as vector code: every tap of a tile of outputs is added up in registers.

Depthwise, a channel sees only itself, so both layouts come down to one loop over vectors,

    y[p] = bias + sum over taps t of weight[t] * x[p * step + offset[t]]         p: the outputs of one tile

with neighbouring pixels of a row in a vector (NCHW: a tap's weight is one number) or neighbouring channels (NHWC: it is
a vector). The outputs of a tile lie along the other axis, rows or columns of the image. There a 3x3 kernel's taps
overlap: a tile of 4 outputs loads 6 x 3 vectors instead of 36.

    x:  * * *             output 0 = taps over rows 0 .. 2
        * * * \\           output 1 = taps over rows 1 .. 3: rows 1 and 2 are in registers already
        * * *  | a row is loaded once and added to up to three outputs
        * * * /
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tilewise.kernels.cpu.depthwise_strip import AHEAD
from tilewise.kernels.cpu.simd import _I32, _I64, _Emitter, _literal, emit_prefetch

# Outputs of a tile. AVX-512 holds 9 weights, 4 sums and a few inputs of a 3x3 kernel in its 32 registers.
TILE = 4
# Bytes of a pixel (NHWC) up to which the inputs to come are asked for. A tile reads 18 pieces as long as a pixel; the
# processor follows long ones by itself, and asking again slows 14x14 images of 512 channels down by a third. 56x56
# images of 128 channels take half the time with it (Zen 3).
NEAR = 1024


def _repeat(builder, count, values, body):
    """values = body(k, values) for k = 0 .. count - 1, the values in registers; what they are in the end."""
    entry = builder.block
    loop, done = builder.append_basic_block("repeat"), builder.append_basic_block("repeated")
    builder.cbranch(builder.icmp_signed(">", count, _I64(0)), loop, done)
    builder.position_at_end(loop)
    k = builder.phi(_I64)
    now = [builder.phi(v.type) for v in values]
    following = body(k, now)
    k_next = builder.add(k, _I64(1))
    latch = builder.block
    builder.cbranch(builder.icmp_signed("<", k_next, count), loop, done)
    builder.position_at_end(done)
    result = [builder.phi(v.type) for v in values]
    k.add_incoming(_I64(0), entry)
    k.add_incoming(k_next, latch)
    for phi, final, first, last in zip(now, result, values, following, strict=True):
        for target, from_loop in ((phi, latch), (final, latch)):
            target.add_incoming(first, entry)
            target.add_incoming(last, from_loop)
    return result


@intrinsic(prefer_literal=True)
def correlate(
    typingctx, square, stride, tile, broadcast, x, tap_step, table, taps, weights, all_taps, bias, y, y_step, outputs,
    count, ahead, ahead_step,
):  # fmt: skip
    """y[p * y_step + i] = bias + sum over taps t of weight[t] * x[p * stride * tap_step + offset[t] + i].

    For 0 <= p < outputs and 0 <= i < count; outputs >= tile: where tiles do not divide them, the last two overlap.

    table: int64 pairs (offset[t], number of the tap's weight), `taps` of them.
    square: a literal; 0 for any taps, -n for exactly n, 3 for a 3x3 kernel: tap (a, b) is entry 3 a + b, and lies
    a * tap_step behind tap (0, b).
    broadcast: a literal. 1: weights[number] and bias[0] hold for all i. 0: they differ by i; weights are in blocks of
    vectors: vector v of tap t at weights[(v * all_taps + number) * lanes].
    Reads x up to the next whole vector if broadcast, else not beyond count. ahead: where to ask for memory that will
    be written later, a vector for each that is written now, the outputs' ahead_step apart.
    """
    shape = tuple(map(_literal, (square, stride, tile, broadcast)))
    index = types.intp
    signature = types.void(
        square, stride, tile, broadcast, x, index, table, index, weights, index, bias, y, index, index, index, y, index
    )

    def codegen(context, builder, signature, args):
        _Correlation(builder, signature.args[4].dtype, shape, args[4:]).emit()
        return context.get_dummy_value()

    return signature, codegen


class _Correlation:
    """The code of one `correlate`."""

    def __init__(self, builder, element, shape, args):
        self.builder, self.vector = builder, _Emitter(builder, element)
        self.square, self.stride, self.tile, self.broadcast = shape
        (
            self.x, self.tap_step, self.table, self.taps, self.weights, self.all_taps, self.bias, self.y, self.y_step,
            self.outputs, self.count, self.ahead, self.ahead_step,
        ) = args  # fmt: skip

    def emit(self):
        builder, lanes = self.builder, self.vector.lanes
        self.x_step = builder.mul(self.tap_step, _I64(self.stride))
        whole, last_vector = builder.and_(self.count, _I64(-lanes)), builder.sub(self.count, _I64(lanes))
        if self.broadcast:  # the last two vectors overlap, where there is one at all
            up = builder.and_(builder.add(self.count, _I64(lanes - 1)), _I64(-lanes))
            whole = builder.select(builder.icmp_signed(">=", last_vector, _I64(0)), up, whole)
        tail = builder.sub(self.count, whole)
        mask = self.vector.mask(_I64(0), tail)
        if self.broadcast:
            self.bias_value = self.vector.splat(builder.load(self.bias))
        if self.square < 0:
            self.offsets = [self._entry(_I64(t), 0) for t in range(-self.square)]
            self.factors = [self._factor(self._entry(_I64(t), 1), None) for t in range(-self.square)]
        if self.square > 0:
            # along the tile the taps are neighbours, so the first of them say where all lie
            self.offsets = [self._entry(_I64(b), 0) for b in range(self.square)]
            self.numbers = [self._entry(_I64(t), 1) for t in range(self.square**2)]
            if self.broadcast:
                self.factors = [self._factor(number, None) for number in self.numbers]
        with cgutils.for_range_slice(builder, _I64(0), self.outputs, _I64(self.tile)) as (p, _):
            last = builder.sub(self.outputs, _I64(self.tile))
            first = builder.select(builder.icmp_signed("<", p, last), p, last)
            x = builder.gep(self.x, [builder.mul(first, self.x_step)])
            y = builder.gep(self.y, [builder.mul(first, self.y_step)])
            self.ahead_now = builder.gep(self.ahead, [builder.mul(first, self.ahead_step)])
            with cgutils.for_range_slice(builder, _I64(0), whole, _I64(lanes)) as (i, _):
                if self.broadcast:
                    i = builder.select(builder.icmp_signed("<", i, last_vector), i, last_vector)
                self._tile(x, y, i, None)
            with builder.if_then(builder.icmp_signed(">", tail, _I64(0))):
                self._tile(x, y, whole, mask)

    def _entry(self, t, part):
        place = self.builder.add(self.builder.mul(t, _I64(2)), _I64(part))
        return self.builder.load(self.builder.gep(self.table, [place]))

    def _factor(self, number, i):
        """A tap's weight as a vector."""
        if self.broadcast:
            return self.vector.splat(self.builder.load(self.builder.gep(self.weights, [number])))
        place = self.builder.mul(number, _I64(self.vector.lanes))
        return self.vector.load(self.weights, self.builder.add(self.builder.mul(i, self.all_taps), place))

    def _load(self, x, offset, mask):
        if mask is None or self.broadcast:
            return self.vector.load(x, offset)
        return self.vector.masked_load(x, offset, mask)

    def _tile(self, x, y, i, mask):
        """One vector of each output of the tile."""
        builder = self.builder
        x, y = builder.gep(x, [i]), builder.gep(y, [i])
        sums = [self.bias_value if self.broadcast else self._load(self.bias, i, mask)] * self.tile
        add_taps = (self._any_sums, self._square_sums, self._some_sums)[(self.square > 0) - (self.square < 0)]
        sums = add_taps(x, i, sums, mask)
        if mask is None and self.square > 0 and not self.broadcast:
            self._ask_for_inputs(x)
        for p, value in enumerate(sums):
            offset = builder.mul(self.y_step, _I64(p))
            later = builder.gep(self.ahead_now, [builder.add(i, builder.mul(self.ahead_step, _I64(p)))])
            emit_prefetch(builder, later, write=True)
            if mask is None:
                self.vector.store(value, y, offset)
            else:
                self.vector.masked_store(value, y, offset, mask)

    def _ask_for_inputs(self, x):
        """What the row of outputs below will be the first to read: what the processor asks for by itself comes late."""
        builder = self.builder
        down = builder.sub(self.offsets[1], self.offsets[0])
        with builder.if_then(builder.icmp_signed("<=", self.count, _I64(NEAR // self.vector.itemsize))):
            for b in range(self.stride):
                row = builder.gep(x, [builder.add(self.offsets[-1], builder.mul(down, _I64(b + 1)))])
                for k in range(self.stride * self.tile):
                    self.vector.prefetch(builder.gep(row, [builder.mul(self.tap_step, _I64(k))]), 2)

    def _square_sums(self, x, i, sums, mask):
        builder, size = self.builder, self.square
        factors = self.factors if self.broadcast else [self._factor(number, i) for number in self.numbers]
        sums = list(sums)
        for b, offset in enumerate(self.offsets):
            row = builder.gep(x, [offset])
            for k in range(self.stride * (self.tile - 1) + size):
                users = [(p, k - p * self.stride) for p in range(self.tile) if 0 <= k - p * self.stride < size]
                if not users:
                    continue
                value = self._load(row, builder.mul(self.tap_step, _I64(k)), mask)
                for p, a in users:
                    factor = factors[a * size + b]
                    sums[p] = self.vector.multiply_add(factor, value, sums[p])
        return sums

    def _some_sums(self, x, i, sums, mask):
        for offset, factor in zip(self.offsets, self.factors, strict=True):
            row = self.builder.gep(x, [offset])
            inputs = [self._load(row, self.builder.mul(self.x_step, _I64(p)), mask) for p in range(self.tile)]
            sums = [self.vector.multiply_add(factor, v, total) for v, total in zip(inputs, sums, strict=True)]
        return sums

    def _any_sums(self, x, i, sums, mask):
        def add_tap(t, now):
            row = self.builder.gep(x, [self._entry(t, 0)])
            factor = self._factor(self._entry(t, 1), i)
            steps = [self.builder.mul(self.x_step, _I64(p)) for p in range(self.tile)]
            return [
                self.vector.multiply_add(factor, self._load(row, step, mask), value)
                for step, value in zip(steps, now, strict=True)
            ]

        return _repeat(self.builder, self.taps, sums, add_tap)


@intrinsic(prefer_literal=True)
def accumulate_taps(
    typingctx, taps, total, masked, sums, x, table, all_taps, x_row, x_step, grad, grad_row, grad_step, rows, steps,
    used,
):  # fmt: skip
    """sums[number[t]] += sum over i < rows, k < steps of grad[i, k] * x[i, k, t] for each tap t, lane by lane.

    sums: a vector a number. grad[i, k] is the vector at grad + i * grad_row + k * grad_step; x[i, k, t] the one at
    x + offset[t] + i * x_row + k * x_step. table: int64 pairs (offset[t], number[t]).
    taps, total, masked: literals. total 1 adds up grad itself as well, as number all_taps. masked 1 reads `used` lanes
    only and leaves the others' sums as they are.
    """
    shape = tuple(map(_literal, (taps, total, masked)))
    index = types.intp
    places = index, index, index, grad, index, index, index, index, index
    signature = types.void(taps, total, masked, sums, x, table, *places)

    def codegen(context, builder, signature, args):
        count, with_total, bounded = shape
        sums, x, table, all_taps, x_row, x_step, grad, grad_row, grad_step, rows, steps, used = args[3:]
        emit = _Emitter(builder, signature.args[3].dtype)
        load = _lane_loader(emit, used if bounded else None)
        offsets = [builder.load(builder.gep(table, [_I64(2 * t)])) for t in range(count)]
        numbers = [builder.load(builder.gep(table, [_I64(2 * t + 1)])) for t in range(count)]

        def add_step(pixel, grads, now):
            factor = load(grads, _I64(0))
            products = [emit.multiply_add(factor, load(pixel, o), v) for o, v in zip(offsets, now, strict=False)]
            return products + [emit.add(v, factor) for v in now[count:]]

        places = (x, x_row, x_step, grad, grad_row, grad_step, rows, steps)
        _emit_accumulation(emit, sums, numbers + [all_taps] * with_total, places, add_step)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def accumulate_square(
    typingctx, stride, masked, sums, x, table, all_taps, tap_step, x_row, x_step, grad, next_grad, grad_row, grad_step,
    rows, steps, used,
):  # fmt: skip
    """The same for all taps of a 3x3 kernel and grad itself, a tile of grads at a time, next_grad apart.

    An element of x meets up to three grads while it is in registers. The table is in the order of `correlate`: tap
    (a, b) of grad p lies (p * stride + a) * tap_step behind tap (0, b) of the first. stride: a literal, 1 or 2, or 0
    for grad alone, in the same order. rows, steps: of tiles; other arguments as for `accumulate_taps`.
    """
    apart, bounded = _literal(stride), _literal(masked)
    index = types.intp
    places = index, index, index, index, grad, index, index, index, index, index, index
    signature = types.void(stride, masked, sums, x, table, *places)

    def codegen(context, builder, signature, args):
        (
            sums, x, table, all_taps, tap_step, x_row, x_step, grad, next_grad, grad_row, grad_step, rows, steps, used,
        ) = args[2:]  # fmt: skip
        emit = _Emitter(builder, signature.args[2].dtype)
        load = _lane_loader(emit, used if bounded else None)
        offsets = [builder.load(builder.gep(table, [_I64(2 * b)])) for b in range(3 if apart else 0)]
        numbers = [builder.load(builder.gep(table, [_I64(2 * t + 1)])) for t in range(9 if apart else 0)]

        def add_step(pixel, grads, now):
            now = list(now)
            factors = [load(grads, builder.mul(next_grad, _I64(p))) for p in range(TILE)]
            for p in range(TILE):
                later = builder.add(builder.mul(next_grad, _I64(p)), _I64(AHEAD // emit.itemsize))
                emit_prefetch(builder, builder.gep(grads, [later]))
            for b, offset in enumerate(offsets):
                row = builder.gep(pixel, [offset])
                for k in range(apart * (TILE - 1) + 3):
                    users = [(p, k - p * apart) for p in range(TILE) if 0 <= k - p * apart < 3]
                    value = load(row, builder.mul(tap_step, _I64(k)))
                    for p, a in users:
                        now[a * 3 + b] = emit.multiply_add(factors[p], value, now[a * 3 + b])
            for factor in factors:
                now[-1] = emit.add(now[-1], factor)
            return now

        places = (x, x_row, x_step, grad, grad_row, grad_step, rows, steps)
        _emit_accumulation(emit, sums, [*numbers, all_taps], places, add_step)
        return context.get_dummy_value()

    return signature, codegen


def _lane_loader(emit, used):
    if used is None:
        return emit.load
    mask = emit.mask(_I64(0), used)
    return lambda pointer, offset: emit.masked_load(pointer, offset, mask)


def _emit_accumulation(emit, sums, numbers, places, add_step):
    """sums[numbers] = add_step(where x is, where grad is, sums) over rows and steps, the sums in registers."""
    builder = emit.builder
    x, x_row, x_step, grad, grad_row, grad_step, rows, steps = places

    def add_row(i, totals):
        x_first = builder.gep(x, [builder.mul(i, x_row)])
        grad_first = builder.gep(grad, [builder.mul(i, grad_row)])

        def add_one(k, now):
            pixel, grads = (
                builder.gep(at, [builder.mul(k, by)]) for at, by in ((x_first, x_step), (grad_first, grad_step))
            )
            return add_step(pixel, grads, now)

        return _repeat(builder, steps, totals, add_one)

    places = [builder.mul(number, _I64(emit.lanes)) for number in numbers]
    before = [emit.load(sums, place) for place in places]
    for place, value in zip(places, _repeat(builder, rows, before, add_row), strict=True):
        emit.store(value, sums, place)


@intrinsic
def sum_of_lanes(typingctx, source):
    """The sum of one vector's elements: halves are added until one is left."""
    signature = source.dtype(source)

    def codegen(context, builder, signature, args):
        emit = _Emitter(builder, signature.args[0].dtype)
        value, count = emit.load(args[0], _I64(0)), emit.lanes
        while count > 1:
            count //= 2
            halves = [ir.Constant(ir.VectorType(_I32, count), list(range(s, s + count))) for s in (0, count)]
            value = builder.fadd(*(builder.shuffle_vector(value, value, half) for half in halves))
        return builder.extract_element(value, _I32(0))

    return signature, codegen
