"""Passes over arrays in explicit vectors, on pointers: the loops that the intrinsics of several families share.

Whole vectors are moved without a mask, and what an end leaves of a vector under one. But where masked stores are slow
(not MASKED), a run or row that is not summed ends with a whole vector over the one before it (`ends`). Planes one
behind the other have no more than two ends in all (`over_planes`). The order of every sum is part of the code, so the
serial and the parallel form of a kernel give the same bits, if what calls it is compiled without reassociation: Numba
would add that to these instructions too.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tilewise.kernels.cpu.simd import _I32, _I64, VECTOR_BYTES, _Emitter

MASKED = VECTOR_BYTES == 64  # masked stores are as fast as others; AVX2's take 12 cycles on Zen 3
UNROLLED = 4  # vectors of a run taken together: as many sums as an addition takes cycles


class Pass(_Emitter):
    """Vector arithmetic and the loops around it."""

    def read(self, pointer, offset, mask=None):
        return self.load(pointer, offset) if mask is None else self.masked_load(pointer, offset, mask)

    def write(self, value, pointer, offset, mask=None, streamed=False):
        if mask is not None:
            self.masked_store(value, pointer, offset, mask)
        elif streamed:
            self.store_past(value, pointer, offset)
        else:
            self.store(value, pointer, offset)

    def minus(self, a, b, mask=None):
        """a - b, and 0 outside the mask."""
        difference = self.builder.fsub(a, b)
        return difference if mask is None else self.builder.select(mask, difference, self.zero)

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

    def ends(self, first, at, count, body):
        """body(offset, mask) for the elements before `first` and those from `at` to count, each fewer than a vector.

        Elements next to them may be done once more, so that whole vectors are: results must not lie on operands.
        """
        builder, start = self.builder, _I64(0)
        if MASKED:
            self.rest(start, first, [], lambda _, mask: body(start, mask) or [])
            self.rest(at, count, [], lambda _, mask: body(at, mask) or [])
            return
        last = builder.sub(count, _I64(self.lanes))
        with builder.if_else(builder.icmp_signed(">=", last, start)) as (wide, narrow):
            with wide:
                for low, high, here in ((start, first, start), (at, count, last)):
                    with builder.if_then(builder.icmp_signed("<", low, high)):
                        body(here, None)
            with narrow:
                self.rest(at, count, [], lambda _, mask: body(at, mask) or [])

    def to_alignment(self, pointer, count, always=False):
        """How many of `count` elements lie before the first whole, aligned vector; 0 in a short run, where one more
        vector under a mask costs as much as it saves, unless always."""
        builder = self.builder
        missing = builder.and_(builder.neg(builder.ptrtoint(pointer, _I64)), _I64(self.lanes * self.itemsize - 1))
        missing = builder.udiv(missing, _I64(self.itemsize))
        if always:
            return missing
        return builder.select(builder.icmp_signed("<", count, _I64(8 * self.lanes)), _I64(0), missing)

    def over_run(self, count, sums, body, result=None):
        """Adds body(at, sums, mask) up over a run: `sums` vectors for each of UNROLLED, returned as one each.

        result: where the run is written to, without sums; its vectors are then aligned, as a store across two cache
        lines costs two."""
        many = [self.zero] * (sums * UNROLLED)
        start = _I64(0)
        if result is not None:
            start = self.to_alignment(result, count)

        def several(i, values):
            offsets = [self.builder.add(i, _I64(k * self.lanes)) for k in range(UNROLLED)]
            parts = [body(at, values[k * sums : k * sums + sums], None) for k, at in enumerate(offsets)]
            return [value for part in parts for value in part]

        at, many = self.loop(start, count, UNROLLED * self.lanes, many, several)
        at, first = self.loop(at, count, self.lanes, many[:sums], lambda i, values: body(i, values, None))
        if not sums:
            self.ends(start, at, count, lambda offset, mask: body(offset, [], mask))
            return []
        first = self.rest(at, count, first, lambda values, mask: body(at, values, mask))
        return [self.tree_sum([first[s], *many[s + sums :: sums]]) for s in range(sums)]

    def over_planes(self, count, length, result, past, factors, body):
        """body(at, factors, mask) for `count` runs of `length` elements, one behind the other, each with its own number
        of every factor (pointers).

        Vectors are aligned in the result (past: always, as stores past the caches need), from the first run to the
        last; where two runs meet, each lane takes its own run's factors. Runs shorter than a vector are done alone."""
        builder, start = self.builder, _I64(0)
        with builder.if_else(builder.icmp_signed("<", length, _I64(self.lanes))) as (short, long):
            with short:

                def alone(c, _):
                    body(builder.mul(c, length), self._splats(factors, c), self.below(length))
                    return []

                self.loop(start, count, 1, [], alone)
            with long:
                self._over_long_planes(count, length, result, past, factors, body)

    def _over_long_planes(self, count, length, result, past, factors, body):
        builder, start = self.builder, _I64(0)
        total, last = builder.mul(count, length), builder.sub(count, _I64(1))
        first = self.to_alignment(result, total, past)
        values = self._splats(factors, start)
        self.rest(start, first, [], lambda _, mask: body(start, values, mask) or [])

        def plane(c, carried):
            at, end, *own = carried
            at, _ = self.loop(at, end, self.lanes, [], lambda i, _: body(i, own, None) or [])
            more = builder.add(c, _I64(1))
            more = builder.select(builder.icmp_signed("<", c, last), more, c)
            others, beyond = self._splats(factors, more), builder.add(at, _I64(self.lanes))
            meet = builder.icmp_signed("<", at, end)
            meet = builder.and_(meet, builder.icmp_signed("<=", beyond, total))
            with builder.if_then(meet):
                mask = self.below(builder.sub(end, at))
                mixed = [builder.select(mask, *pair) for pair in zip(own, others, strict=True)]
                body(at, mixed, None)
            return [builder.select(meet, beyond, at), builder.add(end, length), *others]

        _, (at, _, *values) = self.loop(start, count, 1, [first, length, *values], plane)
        self.rest(at, total, [], lambda _, mask: body(at, values, mask) or [])

    def _splats(self, pointers, offset):
        return [self.splat(self.builder.load(self.builder.gep(pointer, [offset]))) for pointer in pointers]

    def sweep(self, rows, columns, together, body, result=None, stride=None):
        """body(first row, rows, column, mask) for every vector: along the columns for `together` rows at a time.

        result: where rows are written, `stride` apart; their vectors are aligned, if that is possible in all rows."""
        first = _I64(0)
        if result is not None:
            same = self.builder.and_(stride, _I64(self.lanes - 1))
            missing = self.to_alignment(result, columns)
            first = self.builder.select(self.builder.icmp_signed("==", same, _I64(0)), missing, first)

        def along(i, height):
            at, _ = self.loop(first, columns, self.lanes, [], lambda j, _: body(i, height, j, None) or [])
            if result is None:
                self.rest(at, columns, [], lambda _, mask: body(i, height, at, mask) or [])
            else:
                self.ends(first, at, columns, lambda j, mask: body(i, height, j, mask))
            return []

        left, _ = self.loop(_I64(0), rows, together, [], lambda i, _: along(i, together))
        self.loop(left, rows, 1, [], lambda i, _: along(i, 1))

    def places(self, i, height, stride, column):
        """Offsets of `height` rows from row i on."""
        start = self.builder.add(self.builder.mul(i, stride), column)
        return [self.builder.add(start, self.builder.mul(stride, _I64(r))) for r in range(height)]


def emitted(signature, emission):
    """What an intrinsic that returns nothing hands to Numba: emission(emitter for the first pointer's type, args)."""

    def codegen(context, builder, signature, args):
        pointer = next(a for a in signature.args if isinstance(a, types.CPointer))
        emission(Pass(builder, pointer.dtype), args)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def run_total(typingctx, x, count):
    """The sum of x[:count]."""

    def codegen(context, builder, signature, args):
        emit = Pass(builder, signature.args[0].dtype)
        (total,) = emit.over_run(args[1], 1, lambda at, sums, mask: [emit.add(sums[0], emit.read(args[0], at, mask))])
        return emit.lane_sum(total)

    return x.dtype(x, types.intp), codegen


@intrinsic
def run_product(typingctx, a, b, count):
    """The sum of a[:count] * b[:count]."""

    def codegen(context, builder, signature, args):
        a, b, count = args
        emit = Pass(builder, signature.args[0].dtype)

        def add(at, sums, mask):
            return [emit.multiply_add(emit.read(a, at, mask), emit.read(b, at, mask), sums[0])]

        return emit.lane_sum(emit.over_run(count, 1, add)[0])

    return a.dtype(a, b, types.intp), codegen
