"""The inner loops of 3x3 depthwise convolutions in NCHW, and of the transpose of those with stride 2, row after row.

The planes are read where they lie and as the memory runs. With stride 1 a tap's pixels are a vector. With stride 2 they
lie two apart, two vectors of a row hold them, and a shuffle picks those with even or odd columns:

    row of x, from column 2 j - 1 on:   a b c d e f g h     even -> a c e g: left tap     odd -> b d f h: middle tap
    the same from two columns on:           c d e f g h i   even -> c e g i: right tap

The transpose has four kinds of pixels in y, which meet one, two, two and four taps; two vectors of pixels of a row are
computed apart and interleaved.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tilewise.kernels.cpu.depthwise_strip import AHEAD
from tilewise.kernels.cpu.simd import _I1, _I32, _I64, VECTOR_BYTES, _Emitter, _literal, emit_prefetch

SIZE = 3


@intrinsic(prefer_literal=True)
def correlate_plane(typingctx, stride, x, h, w, top, left, numbers, weights, bias, y, oh, ow):
    """y[i, j] = bias[0] + sum over r, s of weights[numbers[3 r + s]] * x[S i - top + r, S j - left + s], 0 outside x.

    S, the stride: a literal, 1 or 2. The h x w plane at pointer x, the oh x ow one at y; top and left: the padding. The
    last output needs at most one column beyond x: S (ow - 1) - left + 2 <= w.
    """
    apart, index = _literal(stride), types.intp
    signature = types.void(stride, x, index, index, index, index, numbers, weights, bias, y, index, index)

    def codegen(context, builder, signature, args):
        _, x, h, w, top, left, numbers, weights, bias, y, oh, ow = args
        emit = _Emitter(builder, signature.args[1].dtype)
        (factors, shift), stored = _splats(emit, numbers, weights, bias), emit.mask(_I64(0), ow)

        def visit(i, j, vectors, _):
            total = shift
            for r in range(SIZE):
                for s, value in enumerate(vectors(r)):
                    total = emit.multiply_add(factors[SIZE * r + s], value, total)
            emit.masked_store(total, y, builder.add(builder.mul(i, ow), j), stored)

        over_rows(emit, apart, x, h, w, top, left, oh, ow, visit)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def correlate_narrow(typingctx, x, h, w, top, left, numbers, weights, bias, y, oh, ow):
    """`correlate_plane` with stride 2 where a row of outputs is one vector at most.

    The lowest of the three rows that an output sees is the highest of the next's: its taps are carried along.
    """
    index = types.intp
    signature = types.void(x, index, index, index, index, numbers, weights, bias, y, index, index)

    def codegen(context, builder, signature, args):
        x, h, w, top, left, numbers, weights, bias, y, oh, ow = args
        emit = _Emitter(builder, signature.args[0].dtype)
        factors, shift = _splats(emit, numbers, weights, bias)
        _narrow_plane(emit, factors, shift, (x, h, w, top, left), (y, oh, ow))
        return context.get_dummy_value()

    return signature, codegen


def _splats(emit, numbers, weights, bias):
    """The taps' weights and the bias, each in all lanes."""
    builder = emit.builder
    places = [builder.load(builder.gep(numbers, [_I64(t)])) for t in range(SIZE**2)]
    return [emit.splat(builder.load(builder.gep(weights, [k]))) for k in places], emit.splat(builder.load(bias))


def _narrow_plane(emit, factors, shift, image, result):
    (x, h, w, top, left), (y, oh, ow) = image, result
    builder = emit.builder
    masks, stored = _column_masks(emit, 2, _I64(0), left, w), emit.mask(_I64(0), ow)
    nothing = [builder.and_(mask, emit.splat(builder.icmp_signed("==", top, _I64(0)), scalar=_I1)) for mask in masks]
    above = _Rows(emit, 2, [x], left).vectors(0, _I64(0), nothing)
    carried = [cgutils.alloca_once_value(builder, value) for value in above]

    def visit(i, rows, rows_masks):
        taps = [builder.load(value) for value in carried]
        for r, row_masks in enumerate(rows_masks):
            taps += rows.vectors(r, _I64(0), row_masks)
        for place, value in zip(carried, taps[-SIZE:], strict=True):
            builder.store(value, place)
        total = shift
        for factor, value in zip(factors, taps, strict=True):
            total = emit.multiply_add(factor, value, total)
        _store_row(emit, total, y, i, oh, ow, stored)

    # outputs whose rows all lie in x, but for the first's highest
    inside = builder.sdiv(builder.add(builder.sub(h, _I64(1)), top), _I64(2))
    inside = builder.select(builder.icmp_signed("<", inside, oh), inside, oh)
    with cgutils.for_range_slice(builder, _I64(0), inside, _I64(1), inc=True) as (i, _):
        line = builder.add(builder.sub(builder.mul(i, _I64(2)), top), _I64(1))
        start = builder.gep(x, [builder.mul(line, w)])
        rows = _Rows(emit, 2, [start, builder.gep(start, [w])], left)
        rows.ask(_I64(0))
        visit(i, rows, (masks, masks))
    with cgutils.for_range_slice(builder, inside, oh, _I64(1), inc=True) as (i, _):
        pointers, there = [], []
        for r in (1, 2):
            line = builder.add(builder.sub(builder.mul(i, _I64(2)), top), _I64(r))
            exists = builder.icmp_signed("<", line, h)
            pointers.append(builder.gep(x, [builder.mul(builder.select(exists, line, _I64(0)), w)]))
            there.append(emit.splat(exists, scalar=_I1))
        visit(i, _Rows(emit, 2, pointers, left), [[builder.and_(m, t) for m in masks] for t in there])


def _store_row(emit, value, y, i, oh, ow, stored):
    """Store row i of at most one vector. What is beyond it belongs to rows that are stored afterwards, if y has them:
    AVX2's masked store takes as long as the sums."""
    builder = emit.builder
    place = builder.mul(i, ow)
    if VECTOR_BYTES < 64:
        rest = builder.sub(builder.mul(oh, ow), place)
        followed = emit.splat(builder.icmp_signed(">=", rest, _I64(emit.lanes)), scalar=_I1)
        stored = builder.or_(stored, followed)
    emit.masked_store(value, y, place, stored)


class _Rows:
    """Three rows of x, read in vectors of every `stride`-th column."""

    def __init__(self, emit, stride, pointers, left):
        self.emit, self.stride, self.pointers, self.left = emit, stride, pointers, left
        parts = 2 * emit.lanes
        self.even, self.odd = (ir.Constant(ir.VectorType(_I32, emit.lanes), list(range(q, parts, 2))) for q in (0, 1))

    def vectors(self, r, j, masks):
        """What the three taps across of row r see from output column j on. masks: of the loads, or None."""
        emit, builder = self.emit, self.emit.builder
        base = builder.sub(builder.mul(j, _I64(self.stride)), self.left)
        loads = []
        for k, first in enumerate(_firsts(emit, self.stride)):
            place = builder.add(base, _I64(first))
            loads.append(
                emit.load(self.pointers[r], place)
                if masks is None
                else emit.masked_load(self.pointers[r], place, masks[k])
            )
        if self.stride == 1:
            return loads
        near, far = loads[:2], loads[2:]
        return [
            builder.shuffle_vector(*pair, order)
            for pair, order in ((near, self.even), (near, self.odd), (far, self.even))
        ]

    def ask(self, j):
        """Ask for what later outputs read: as many lines as a vector of them takes, in the order of the memory."""
        builder, lines = self.emit.builder, self.stride**2
        place = builder.add(builder.mul(j, _I64(lines)), _I64(AHEAD // self.emit.itemsize))
        for k in range(lines):
            emit_prefetch(builder, builder.gep(self.pointers[0], [builder.add(place, _I64(k * self.emit.lanes))]))


def _firsts(emit, stride):
    """Where the loads of `_Rows.vectors` begin, seen from the first tap."""
    return (0, 1, 2) if stride == 1 else (0, emit.lanes, 2, emit.lanes + 2)


def _column_masks(emit, stride, j, left, w):
    """Which lanes of these loads lie inside a row."""
    builder = emit.builder
    base = builder.sub(builder.mul(j, _I64(stride)), left)
    masks = []
    for first in _firsts(emit, stride):
        place = builder.add(base, _I64(first))
        masks.append(emit.mask(builder.neg(place), builder.sub(w, place)))
    return masks


def over_rows(emit, stride, x, h, w, top, left, oh, ow, visit):
    """Call visit(i, j, vectors, fresh) for every row of outputs and every vector of it; the last two overlap.

    vectors(r): what the taps of row r of the window see. fresh: the lanes that are outputs and were not in the vector
    before; None for all. Rows whose windows lie inside x go without masks but for their first and last vectors; the
    others' rows beyond x count as zeros.
    """
    builder, lanes = emit.builder, emit.lanes
    over = builder.sub(ow, _I64(lanes))
    last = builder.select(builder.icmp_signed(">", over, _I64(0)), over, _I64(0))
    edges = [_column_masks(emit, stride, j, left, w) for j in (_I64(0), last)]
    some = emit.mask(_I64(0), ow)
    beyond = emit.mask(builder.and_(builder.sub(_I64(0), last), _I64(lanes - 1)), _I64(lanes))
    with cgutils.for_range(builder, oh) as row:
        i = row.index
        first = builder.sub(builder.mul(i, _I64(stride)), top)
        inside = builder.and_(
            builder.icmp_signed(">=", first, _I64(0)),
            builder.icmp_signed("<", builder.add(first, _I64(SIZE - 1)), h),
        )
        with builder.if_else(inside) as (plain, bounded):
            with plain:
                start = builder.gep(x, [builder.mul(first, w)])
                rows = _Rows(emit, stride, [builder.gep(start, [builder.mul(w, _I64(r))]) for r in range(SIZE)], left)
                rows.ask(_I64(0))
                visit(i, _I64(0), lambda r: rows.vectors(r, _I64(0), edges[0]), some)
                with cgutils.for_range_slice(builder, _I64(lanes), last, _I64(lanes), inc=True) as (j, _):
                    rows.ask(j)
                    visit(i, j, lambda r: rows.vectors(r, j, None), None)
                with builder.if_then(builder.icmp_signed(">", last, _I64(0))):
                    rows.ask(last)
                    visit(i, last, lambda r: rows.vectors(r, last, edges[1]), beyond)
            with bounded:
                pointers, there = [], []
                for r in range(SIZE):
                    line = builder.add(first, _I64(r))
                    exists = builder.and_(builder.icmp_signed(">=", line, _I64(0)), builder.icmp_signed("<", line, h))
                    pointers.append(builder.gep(x, [builder.mul(builder.select(exists, line, _I64(0)), w)]))
                    there.append(emit.splat(exists, scalar=_I1))
                edge_rows = _Rows(emit, stride, pointers, left)
                with cgutils.for_range_slice(builder, _I64(0), ow, _I64(lanes), inc=True) as (at, _):
                    j = builder.select(builder.icmp_signed("<", at, last), at, last)
                    masks = _column_masks(emit, stride, j, left, w)
                    fresh = emit.mask(builder.sub(at, j), builder.sub(ow, j))
                    visit(i, j, lambda r: edge_rows.vectors(r, j, [builder.and_(m, there[r]) for m in masks]), fresh)


@intrinsic(prefer_literal=True)
def sum_products(typingctx, stride, taps, sums, x, h, w, top, left, numbers, grad, oh, ow):
    """sums[numbers[3 r + s]] += sum over i, j of grad[i, j] * x[S i - top + r, S j - left + s], lane by lane, and
    sums[9] += that of grad.

    sums: a vector for each number of a tap. taps: a literal, 9, or 0 for the sum of grad alone, by the same additions.
    Otherwise as correlate_plane.
    """
    apart, count, index = _literal(stride), _literal(taps), types.intp
    signature = types.void(stride, taps, sums, x, index, index, index, index, numbers, grad, index, index)

    def codegen(context, builder, signature, args):
        _, _, sums, x, h, w, top, left, numbers, grad, oh, ow = args
        emit = _Emitter(builder, signature.args[2].dtype)
        places = [builder.load(builder.gep(numbers, [_I64(t)])) for t in range(count)]
        places = [builder.mul(place, _I64(emit.lanes)) for place in [*places, _I64(SIZE**2)]]
        totals = [cgutils.alloca_once(builder, emit.vector) for _ in places]  # registers, by the compiler
        for total, place in zip(totals, places, strict=True):
            builder.store(emit.load(sums, place), total)

        def add(total, value, fresh):
            before = builder.load(total)
            after = value(before)
            # not by a zero in grad: x may be infinite there
            builder.store(after if fresh is None else builder.select(fresh, after, before), total)

        def visit(i, j, vectors, fresh):
            place = builder.add(builder.mul(i, ow), j)
            factor = emit.load(grad, place) if fresh is None else emit.masked_load(grad, place, fresh)
            emit_prefetch(builder, builder.gep(grad, [builder.add(place, _I64(AHEAD // emit.itemsize))]))
            for r in range(SIZE if count else 0):
                for s, value in enumerate(vectors(r)):
                    add(totals[SIZE * r + s], lambda before, v=value: emit.multiply_add(factor, v, before), fresh)
            add(totals[-1], lambda before: emit.add(before, factor), fresh)

        over_rows(emit, apart, x, h, w, top, left, oh, ow, visit)
        for total, place in zip(totals, places, strict=True):
            emit.store(builder.load(total), sums, place)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def double_plane(typingctx, past, grad, oh, ow, weights, bias, y, h, w):
    """The transpose of `correlate_plane` for stride 2 and a padding of 1: y[2 i - 1 + r, 2 j - 1 + s] +=
    weights[3 r + s] * grad[i, j].

    y starts as bias[0]; all of it is written. h is 2 oh or one less, and so is w.

        y[2 i, 2 j]     = w11 g[i, j]                        y[2 i, 2 j + 1]     = w12 g[i, j] + w10 g[i, j + 1]
        y[2 i + 1, 2 j] = w21 g[i, j] + w01 g[i + 1, j]      y[2 i + 1, 2 j + 1] = w22 g[i, j] + w20 g[i, j + 1]
                                                                    + w02 g[i + 1, j] + w00 g[i + 1, j + 1]
    """
    index, streamed = types.intp, bool(_literal(past))
    signature = types.void(past, grad, index, index, weights, bias, y, index, index)

    def codegen(context, builder, signature, args):
        _Doubling(builder, signature.args[1].dtype, streamed, args[1:]).emit()
        return context.get_dummy_value()

    return signature, codegen


class _Doubling:
    """The code of one `double_plane`."""

    def __init__(self, builder, element, streamed, args):
        self.builder, self.emitter, self.streamed = builder, _Emitter(builder, element), streamed
        self.grad, self.oh, self.ow, weights, bias, self.y, self.h, self.w = args
        self.factors = [self.emitter.splat(builder.load(builder.gep(weights, [_I64(t)]))) for t in range(SIZE**2)]
        self.shift = self.emitter.splat(builder.load(bias))

    def emit(self):
        builder, emit = self.builder, self.emitter
        # not over the vector before it: a line that was written past the caches must not be written again
        last = builder.and_(builder.sub(self.ow, _I64(1)), _I64(-emit.lanes))
        count = builder.sub(self.ow, last)
        loads = [emit.mask(_I64(0), builder.sub(count, _I64(k))) for k in (0, 1)]
        rest = builder.sub(self.w, builder.mul(last, _I64(2)))
        stores = [emit.mask(_I64(0), builder.sub(rest, _I64(k))) for k in (0, emit.lanes)]
        with cgutils.for_range(builder, self.oh) as row:
            self._begin_row(row.index)
            with cgutils.for_range_slice(builder, _I64(0), last, _I64(emit.lanes), inc=True) as (j, _):
                self._vector(j, (None, None), (None, None))
            self._vector(last, loads, stores)

    def _begin_row(self, i):
        """Row i of grad and the one below, if there is one; the two rows of y that they make."""
        builder = self.builder
        self.here = builder.gep(self.grad, [builder.mul(i, self.ow)])
        more = builder.icmp_signed("<", builder.add(i, _I64(1)), self.oh)
        self.below = builder.select(more, builder.gep(self.here, [self.ow]), self.here)
        self.more = self.emitter.splat(more, scalar=_I1)
        line = builder.mul(i, _I64(2))
        self.upper = builder.gep(self.y, [builder.mul(line, self.w)])
        self.lower = builder.gep(self.upper, [self.w])
        self.has_lower = builder.icmp_signed("<", builder.add(line, _I64(1)), self.h)

    def _vector(self, j, loads, stores):
        builder, emit = self.builder, self.emitter
        values = []
        for k, mask in enumerate(loads):
            place = builder.add(j, _I64(k))
            here = emit.load(self.here, place) if mask is None else emit.masked_load(self.here, place, mask)
            under = self.more if mask is None else builder.and_(self.more, mask)
            values.append((here, emit.masked_load(self.below, place, under)))
        (here, below), (right, corner) = values
        ahead = builder.add(j, _I64(AHEAD // emit.itemsize))
        emit_prefetch(builder, builder.gep(self.here, [ahead]))
        self._store(self.upper, j, self._sum((4, here)), self._sum((5, here), (3, right)), stores)
        with builder.if_then(self.has_lower):
            odd = self._sum((8, here), (6, right), (2, below), (0, corner))
            self._store(self.lower, j, self._sum((7, here), (1, below)), odd, stores)

    def _sum(self, *products):
        total = self.shift
        for t, value in products:
            total = self.emitter.multiply_add(self.factors[t], value, total)
        return total

    def _store(self, row, j, even, odd, masks):
        builder, emit = self.builder, self.emitter
        order = [i // 2 + (emit.lanes if i % 2 else 0) for i in range(2 * emit.lanes)]
        for k, mask in enumerate(masks):
            half = ir.Constant(ir.VectorType(_I32, emit.lanes), order[k * emit.lanes : (k + 1) * emit.lanes])
            value = builder.shuffle_vector(even, odd, half)
            place = builder.add(builder.mul(j, _I64(2)), _I64(k * emit.lanes))
            if mask is not None:
                emit.masked_store(value, row, place, mask)
            elif self.streamed:
                emit.store_past(value, row, place)
            else:
                emit.store(value, row, place)
