"""Filling strips of padded rows, and putting the columns of a transposed convolution's phases together; on pointers."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tilewise.kernels.cpu.simd import _I32, _I64, _Emitter, _literal, emit_prefetch

# Bytes from what is read now to what is asked for: it arrives while the outputs in between are computed. Between 4 and
# 32 KB the distance makes no difference.
AHEAD = 8192


@intrinsic(prefer_literal=True)
def deal_rows(typingctx, stride, target, part, source, source_step, rows, low, high):
    """target[r, q, i] = source[r * source_step + i * stride + q] where low <= i * stride + q < high, else 0.

    For q < stride and 0 <= i < part, a multiple of the vector's length. stride: a literal, 1 or 2.
    """
    ways = _literal(stride)
    index = types.intp
    signature = types.void(stride, target, index, target, index, index, index, index)

    def codegen(context, builder, signature, args):
        _Deal(builder, signature.args[1].dtype, ways, args[1:]).emit()
        return context.get_dummy_value()

    return signature, codegen


class _Deal:
    """The code of one `deal_rows`. Computing a mask costs more than moving the vector under it, so the first vector's
    mask and the last two's are made before the loop over rows: in between there is image, if the padding is small.
    """

    def __init__(self, builder, element, ways, args):
        self.builder, self.vector, self.ways = builder, _Emitter(builder, element), ways
        self.target, self.part, self.source, self.source_step, self.rows, self.low, self.high = args

    def emit(self):
        builder, lanes = self.builder, self.vector.lanes
        second, before_last = builder.sub(self.part, _I64(2 * lanes)), builder.sub(self.part, _I64(lanes))
        masks = [(place, self._masks(place)) for place in (_I64(0), second, before_last)]
        exists = [builder.icmp_signed(">", self.part, _I64(n * lanes)) for n in (0, 2, 1)]
        inner_end = builder.mul(second, _I64(self.ways))
        inside = builder.and_(
            builder.icmp_signed("<=", self.low, _I64(self.ways * lanes)),
            builder.icmp_signed(">=", self.high, inner_end),
        )
        pitch = builder.mul(self.part, _I64(self.ways))
        with cgutils.for_range_slice(builder, _I64(0), self.rows, _I64(1)) as (r, _):
            target = builder.gep(self.target, [builder.mul(r, pitch)])
            source = builder.gep(self.source, [builder.mul(r, self.source_step)])
            for (place, edge), there in zip(masks, exists, strict=True):
                with builder.if_then(there):
                    self._move(target, source, place, edge)
            with builder.if_else(inside) as (plain, bounded):
                with plain, cgutils.for_range_slice(builder, _I64(lanes), second, _I64(lanes)) as (i, _):
                    self._move(target, source, i, None)
                with bounded, cgutils.for_range_slice(builder, _I64(lanes), second, _I64(lanes)) as (i, _):
                    self._move(target, source, i, self._masks(i))

    def _masks(self, i):
        """Which lanes of the vectors loaded for place i lie between low and high."""
        builder, masks = self.builder, []
        for q in range(self.ways):
            first = builder.add(builder.mul(i, _I64(self.ways)), _I64(q * self.vector.lanes))
            masks.append(self.vector.mask(builder.sub(self.low, first), builder.sub(self.high, first)))
        return masks

    def _move(self, target, source, i, masks):
        builder, lanes = self.builder, self.vector.lanes
        parts = []
        for q in range(self.ways):
            place = builder.add(builder.mul(i, _I64(self.ways)), _I64(q * lanes))
            emit_prefetch(builder, builder.gep(source, [builder.add(place, _I64(AHEAD // self.vector.itemsize))]))
            parts.append(
                self.vector.load(source, place) if masks is None else self.vector.masked_load(source, place, masks[q])
            )
        for q in range(self.ways):
            value = parts[0]
            if self.ways == 2:
                order = ir.Constant(ir.VectorType(_I32, lanes), [2 * k + q for k in range(lanes)])
                value = builder.shuffle_vector(*parts, order)
            self.vector.store(value, target, builder.add(i, builder.mul(self.part, _I64(q))))


@intrinsic
def step(typingctx, pointer, count):
    """The pointer `count` elements on. An array handed to a function costs two atomic operations, a pointer nothing."""
    signature = pointer(pointer, types.intp)
    return signature, lambda context, builder, signature, args: builder.gep(args[0], [args[1]])


@intrinsic
def interleave(typingctx, target, even, odd, count):
    """target[2 i] = even[i], target[2 i + 1] = odd[i] for `count` elements of target; reads whole vectors."""
    signature = types.void(target, target, target, types.intp)

    def codegen(context, builder, signature, args):
        target, even, odd, count = args
        emit = _Emitter(builder, signature.args[0].dtype)
        both = 2 * emit.lanes
        order = [i // 2 + (emit.lanes if i % 2 else 0) for i in range(both)]
        halves = [ir.Constant(ir.VectorType(_I32, emit.lanes), order[h : h + emit.lanes]) for h in (0, emit.lanes)]

        def move(i, masks):
            half = builder.ashr(i, _I64(1))
            values = emit.load(even, half), emit.load(odd, half)
            for k, mask in enumerate(masks):
                value, place = builder.shuffle_vector(*values, halves[k]), builder.add(i, _I64(k * emit.lanes))
                if mask is None:
                    emit.store(value, target, place)
                else:
                    emit.masked_store(value, target, place, mask)

        whole = builder.and_(count, _I64(-both))
        with cgutils.for_range_slice(builder, _I64(0), whole, _I64(both)) as (i, _):
            move(i, (None, None))
        with builder.if_then(builder.icmp_signed("<", whole, count)):
            left = builder.sub(count, whole)
            move(whole, [emit.mask(_I64(0), builder.sub(left, _I64(k * emit.lanes))) for k in (0, 1)])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def spread(typingctx, target, target_step, source, count):
    """target[i * target_step] = source[i] for i < count."""
    signature = types.void(target, types.intp, target, types.intp)

    def codegen(context, builder, signature, args):
        target, target_step, source, count = args
        with cgutils.for_range_slice(builder, _I64(0), count, _I64(1)) as (i, _):
            builder.store(builder.load(builder.gep(source, [i])), builder.gep(target, [builder.mul(i, target_step)]))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def clear(typingctx, target, count):
    """target[i] = 0 for i < count, a multiple of the vector's length."""
    signature = types.void(target, types.intp)

    def codegen(context, builder, signature, args):
        emit = _Emitter(builder, signature.args[0].dtype)
        with cgutils.for_range_slice(builder, _I64(0), args[1], _I64(emit.lanes)) as (i, _):
            emit.store(emit.zero, args[0], i)
        return context.get_dummy_value()

    return signature, codegen
