"""The passes of batch norm in explicit vectors, on pointers.

`run_*` go along a run of one channel's pixels (NCHW), `rows_*` down the columns of a matrix of pixels by channels
(NHWC), several rows at a time. Whole vectors are moved without a mask; only a run's or row's last vector has one. The
order of every sum is part of the code, so the serial and the parallel form of a kernel give the same bits; without
slices of arrays no references are counted, which would cost more than a plane of 7x7.

Callers are compiled without reassociation, which Numba would otherwise add to the instructions here too.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tilewise.kernels.cpu.simd import _I32, _I64, _Emitter, _literal

UNROLLED = 4  # vectors of a run taken together: as many sums as an addition takes cycles
ROWS = 8  # rows summed at a time, so that a column's sum in memory is touched once for eight of them
ROWS_OF_TWO = 4  # the same where each row is read from two arrays, and where results are written: fewer streams


# How a pass writes its result: through the caches, or past them, for which result and run must be whole, aligned
# vectors. FROZEN: a gradient through statistics that do not depend on x.
KEPT, STREAMED, FROZEN = 0, 1, 2


class _Pass(_Emitter):
    """Vector arithmetic and the loops around it."""

    def read(self, pointer, offset, mask=None):
        return self.load(pointer, offset) if mask is None else self.masked_load(pointer, offset, mask)

    def write(self, value, pointer, offset, mask=None, streamed=False):
        if mask is not None:
            self.masked_store(value, pointer, offset, mask)
        elif streamed:  # past the caches; aligned
            store = self.builder.store(value, self.at(pointer, offset))
            store.align = self.lanes * self.itemsize
            store.set_metadata("nontemporal", self.builder.module.add_metadata([_I32(1)]))
        else:
            self.store(value, pointer, offset)

    def minus(self, a, b, mask=None):
        """a - b, and 0 outside the mask."""
        difference = self.builder.fsub(a, b)
        return difference if mask is None else self.builder.select(mask, difference, self.zero)

    def gradient(self, frozen, slope, x, at, mask, centre, a, b, offset):
        if frozen:
            return self.builder.fmul(slope, a)
        deviation = self.builder.fsub(self.read(x, at, mask), centre)
        return self.multiply_add(slope, a, self.multiply_add(deviation, b, offset))

    def below(self, count):
        """The first `count` lanes; 0 < count < lanes."""
        index = ir.Constant(ir.VectorType(_I32, self.lanes), list(range(self.lanes)))
        return self.builder.icmp_signed("<", index, self.splat(self.builder.trunc(count, _I32), scalar=_I32))

    def tree_sum(self, values):
        while len(values) > 1:
            values = [self.builder.fadd(a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
        return values[0]

    def lane_sum(self, vector):
        """The sum of a vector's elements, by halves."""
        count = self.lanes
        undefined = ir.Constant(vector.type, ir.Undefined)
        while count > 1:
            count //= 2
            order = ir.Constant(
                ir.VectorType(_I32, self.lanes), [i + count if i < count else i for i in range(self.lanes)]
            )
            vector = self.builder.fadd(vector, self.builder.shuffle_vector(vector, undefined, order))
        return self.builder.extract_element(vector, _I32(0))

    def lane_sums(self, a, b):
        """The sums of two vectors' elements, by halves, both at once."""
        count, builder = self.lanes, self.builder
        numbers = ir.VectorType(_I32, count)
        low = [*range(count // 2), *range(count, count + count // 2)]
        halves = [ir.Constant(numbers, [i + shift for i in low]) for shift in (0, count // 2)]
        vector = builder.fadd(*[builder.shuffle_vector(a, b, half) for half in halves])
        undefined, length = ir.Constant(vector.type, ir.Undefined), count // 2
        while length > 1:
            length //= 2
            order = ir.Constant(numbers, [i ^ length for i in range(count)])
            vector = builder.fadd(vector, builder.shuffle_vector(vector, undefined, order))
        return builder.extract_element(vector, _I32(0)), builder.extract_element(vector, _I32(count // 2))

    def put(self, value, pointer, offset):
        """One number."""
        self.builder.store(value, self.builder.gep(pointer, [offset]))

    def loop(self, start, stop, step, values, body):
        """values = body(i, values) while i + step <= stop; returns (the i that is left, values)."""
        builder, entry = self.builder, self.builder.block
        head, inside, after = (builder.append_basic_block(name) for name in ("head", "inside", "after"))
        builder.branch(head)
        builder.position_at_end(head)
        i, carried = builder.phi(_I64), [builder.phi(value.type) for value in values]
        following = builder.add(i, _I64(step))
        builder.cbranch(builder.icmp_signed("<=", following, stop), inside, after)
        builder.position_at_end(inside)
        results = body(i, carried)
        for phi, first, then in zip((i, *carried), (start, *values), (following, *results), strict=True):
            phi.add_incoming(first, entry)
            phi.add_incoming(then, builder.block)
        builder.branch(head)
        builder.position_at_end(after)
        return i, carried

    def rest(self, at, count, values, body):
        """values = body(values, mask) for the elements from `at` to count, fewer than a vector, if there are any."""
        builder, before = self.builder, self.builder.block
        inside, after = builder.append_basic_block("rest"), builder.append_basic_block("done")
        builder.cbranch(builder.icmp_signed("<", at, count), inside, after)
        builder.position_at_end(inside)
        results, end = body(values, self.below(builder.sub(count, at))), builder.block
        builder.branch(after)
        builder.position_at_end(after)
        merged = [builder.phi(value.type) for value in values]
        for phi, value, result in zip(merged, values, results, strict=True):
            phi.add_incoming(value, before)
            phi.add_incoming(result, end)
        return merged

    def over_run(self, count, sums, body):
        """Adds body(at, sums, mask) up over a run: `sums` vectors for each of UNROLLED, returned as one each."""
        many = [self.zero] * (sums * UNROLLED)

        def several(i, values):
            offsets = [self.builder.add(i, _I64(k * self.lanes)) for k in range(UNROLLED)]
            parts = [body(at, values[k * sums : k * sums + sums], None) for k, at in enumerate(offsets)]
            return [value for part in parts for value in part]

        at, many = self.loop(_I64(0), count, UNROLLED * self.lanes, many, several)
        at, first = self.loop(at, count, self.lanes, many[:sums], lambda i, values: body(i, values, None))
        first = self.rest(at, count, first, lambda values, mask: body(at, values, mask))
        return [self.tree_sum([first[s], *many[s + sums :: sums]]) for s in range(sums)]

    def sweep(self, rows, columns, together, body):
        """body(first row, rows, column, mask) for every vector: along the columns for `together` rows at a time."""

        def along(i, height):
            at, _ = self.loop(_I64(0), columns, self.lanes, [], lambda j, _: body(i, height, j, None) or [])
            self.rest(at, columns, [], lambda _, mask: body(i, height, at, mask) or [])
            return []

        left, _ = self.loop(_I64(0), rows, together, [], lambda i, _: along(i, together))
        self.loop(left, rows, 1, [], lambda i, _: along(i, 1))

    def places(self, i, height, stride, column):
        """Offsets of `height` rows from row i on."""
        start = self.builder.add(self.builder.mul(i, stride), column)
        return [self.builder.add(start, self.builder.mul(stride, _I64(r))) for r in range(height)]


def _emitted(signature, emission):
    """What an intrinsic that returns nothing hands to Numba: emission(emitter for the first pointer's type, args)."""

    def codegen(context, builder, signature, args):
        pointer = next(a for a in signature.args if isinstance(a, types.CPointer))
        emission(_Pass(builder, pointer.dtype), args)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def run_moments(typingctx, x, count, moments, step):
    """moments[0], moments[step], moments[2 * step] = a pivot near the mean of x[:count], the sum of the deviations from
    it, and that of their squares. The run is read twice: it should fit in the first-level cache."""

    def emission(emit, args):
        x, count, moments, step = args
        (total,) = emit.over_run(count, 1, lambda at, sums, mask: [emit.add(sums[0], emit.read(x, at, mask))])
        number = emit.builder.sitofp(count, emit.scalar)
        pivot = emit.builder.fdiv(emit.lane_sum(total), number)
        everywhere = emit.splat(pivot)

        def deviations(at, sums, mask):
            deviation = emit.minus(emit.read(x, at, mask), everywhere, mask)
            return [emit.add(sums[0], deviation), emit.multiply_add(deviation, deviation, sums[1])]

        first, second = emit.over_run(count, 2, deviations)
        twice = emit.builder.add(step, step)
        first, second = emit.lane_sums(first, second)
        for value, at in ((pivot, _I64(0)), (first, step), (second, twice)):
            emit.put(value, moments, at)

    return _emitted(types.void(x, types.intp, moments, types.intp), emission)


@intrinsic(prefer_literal=True)
def run_normalise(typingctx, mode, x, y, count, centre, scale, offset):
    """y = (x - centre) * scale + offset along a run. mode: a literal."""
    past = _literal(mode) == STREAMED

    def emission(emit, args):
        _, x, y, count, *factors = args
        centre, scale, offset = (emit.splat(factor) for factor in factors)

        def normalise(at, _, mask):
            deviation = emit.builder.fsub(emit.read(x, at, mask), centre)
            emit.write(emit.multiply_add(deviation, scale, offset), y, at, mask, past)
            return []

        emit.over_run(count, 0, normalise)

    return _emitted(types.void(mode, x, y, types.intp, centre, scale, offset), emission)


@intrinsic
def run_sums(typingctx, grad, x, count, centre, sums, step):
    """sums[0], sums[step] = the sums of grad and of grad * (x - centre) along a run."""

    def emission(emit, args):
        grad, x, count, centre, sums, step = args
        middle = emit.splat(centre)

        def add(at, sums, mask):
            slope = emit.read(grad, at, mask)
            deviation = emit.minus(emit.read(x, at, mask), middle, mask)
            return [emit.add(sums[0], slope), emit.multiply_add(slope, deviation, sums[1])]

        total, product = emit.over_run(count, 2, add)
        total, product = emit.lane_sums(total, product)
        emit.put(total, sums, _I64(0))
        emit.put(product, sums, step)

    return _emitted(types.void(grad, x, types.intp, centre, sums, types.intp), emission)


@intrinsic(prefer_literal=True)
def run_gradient(typingctx, mode, grad, x, result, count, centre, a, b, offset):
    """result = grad * a + ((x - centre) * b + offset) along a run; FROZEN: result = grad * a. mode: a
    literal."""
    frozen, past = _literal(mode) == FROZEN, _literal(mode) == STREAMED

    def emission(emit, args):
        _, grad, x, result, count, *factors = args
        centre, a, b, offset = (emit.splat(factor) for factor in factors)

        def gradient(at, _, mask):
            slope = emit.read(grad, at, mask)
            value = emit.gradient(frozen, slope, x, at, mask, centre, a, b, offset)
            emit.write(value, result, at, mask, past)
            return []

        emit.over_run(count, 0, gradient)

    return _emitted(types.void(mode, grad, x, result, types.intp, centre, a, b, offset), emission)


@intrinsic
def rows_total(typingctx, x, stride, rows, columns, total):
    """total[j] += the sum of column j of x, whose rows are `stride` elements apart."""

    def emission(emit, args):
        x, stride, rows, columns, total = args

        def add(i, height, j, mask):
            values = [emit.read(x, at, mask) for at in emit.places(i, height, stride, j)]
            emit.write(emit.add(emit.read(total, j, mask), emit.tree_sum(values)), total, j, mask)

        emit.sweep(rows, columns, ROWS, add)

    return _emitted(types.void(x, types.intp, types.intp, types.intp, total), emission)


@intrinsic
def rows_deviations(typingctx, x, stride, rows, columns, pivot, first, second):
    """first[j], second[j] += the sums of the deviations of column j from pivot[j], and of their squares."""

    def emission(emit, args):
        x, stride, rows, columns, pivot, first, second = args

        def add(i, height, j, mask):
            middle = emit.read(pivot, j, mask)
            places = emit.places(i, height, stride, j)
            deviations = [emit.builder.fsub(emit.read(x, at, mask), middle) for at in places]
            squares = emit.read(second, j, mask)
            for deviation in deviations:
                squares = emit.multiply_add(deviation, deviation, squares)
            emit.write(emit.add(emit.read(first, j, mask), emit.tree_sum(deviations)), first, j, mask)
            emit.write(squares, second, j, mask)

        emit.sweep(rows, columns, ROWS, add)

    return _emitted(types.void(x, types.intp, types.intp, types.intp, pivot, first, second), emission)


@intrinsic
def rows_normalise(typingctx, x, y, stride, rows, columns, centre, scale, offset):
    """y = (x - centre) * scale + offset, with a factor of each for every column."""

    def emission(emit, args):
        x, y, stride, rows, columns, *factors = args

        def normalise(i, height, j, mask):
            centre, scale, offset = (emit.read(factor, j, mask) for factor in factors)
            for at in emit.places(i, height, stride, j):
                deviation = emit.builder.fsub(emit.read(x, at, mask), centre)
                emit.write(emit.multiply_add(deviation, scale, offset), y, at, mask)

        emit.sweep(rows, columns, ROWS_OF_TWO, normalise)

    signature = types.void(x, y, types.intp, types.intp, types.intp, centre, scale, offset)
    return _emitted(signature, emission)


@intrinsic
def rows_sums(typingctx, grad, x, stride, rows, columns, centre, total, product):
    """total[j], product[j] += the sums of grad and of grad * (x - centre[j]) down column j."""

    def emission(emit, args):
        grad, x, stride, rows, columns, centre, total, product = args

        def add(i, height, j, mask):
            middle = emit.read(centre, j, mask)
            places = emit.places(i, height, stride, j)
            slopes = [emit.read(grad, at, mask) for at in places]
            products = emit.read(product, j, mask)
            for slope, at in zip(slopes, places, strict=True):
                deviation = emit.builder.fsub(emit.read(x, at, mask), middle)
                products = emit.multiply_add(slope, deviation, products)
            emit.write(emit.add(emit.read(total, j, mask), emit.tree_sum(slopes)), total, j, mask)
            emit.write(products, product, j, mask)

        emit.sweep(rows, columns, ROWS_OF_TWO, add)

    return _emitted(types.void(grad, x, types.intp, types.intp, types.intp, centre, total, product), emission)


@intrinsic(prefer_literal=True)
def rows_gradient(typingctx, mode, grad, x, result, stride, rows, columns, centre, a, b, offset):
    """result = grad * a + ((x - centre) * b + offset), with a factor of each for every column. mode: KEPT or FROZEN,
    a literal."""
    frozen = _literal(mode) == FROZEN

    def emission(emit, args):
        _, grad, x, result, stride, rows, columns, *factors = args

        def gradient(i, height, j, mask):
            centre, a, b, offset = (emit.read(factor, j, mask) for factor in factors)
            for at in emit.places(i, height, stride, j):
                slope = emit.read(grad, at, mask)
                value = emit.gradient(frozen, slope, x, at, mask, centre, a, b, offset)
                emit.write(value, result, at, mask)

        emit.sweep(rows, columns, ROWS_OF_TWO, gradient)

    return _emitted(
        types.void(mode, grad, x, result, types.intp, types.intp, types.intp, centre, a, b, offset), emission
    )


@intrinsic
def settle_stores(typingctx):
    """Make stores that went past the caches visible to other threads."""

    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen
