"""Folding the taps of windows, many windows at once: the vector loop under all of max and average pooling.

LLVM's own vectoriser falls back to gathers for every second element, and slices of arrays are counted references, whose
atomic operations cost more than a short row. So this is emitted as vector IR, on plain pointers.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tilewise.kernels.cpu.simd import _I64, _literal, lane_count

MAXIMUM, SUM = 0, 1


@intrinsic
def larger(typingctx, v, m):
    """The larger of two numbers, NaN if either is.

    As an intrinsic, because `v if v > m or v != v else m` becomes four vector instructions on x86, this one three, and
    on ARM one. nsz: which of -0 and 0 is larger does not matter.
    """

    def codegen(context, builder, signature, args):
        return _combine(builder, signature.args[0], MAXIMUM, *args)

    return v(v, m), codegen


@intrinsic
def move(typingctx, pointer, count):
    """The pointer `count` elements on."""

    def codegen(context, builder, signature, args):
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.intp), codegen


@intrinsic(prefer_literal=True)
def fold(typingctx, operation, stride, out, source, step, taps, count):
    """out[i] = the maximum or the sum, over 0 <= t < taps, of source[i * stride + t * step], for i < count.

    operation, stride: literals; MAXIMUM or SUM, 1 or 2. out and source may not overlap. For stride 2 the element after
    the last one used is read too. Sums go from the first tap to the last, so bits do not depend on the vector width.

        stride 2, 4 lanes, one tap:   source  a0 b0 a1 b1 | a2 b2 a3 b3   ->   out  a0 a1 a2 a3

    The last vector ends with the last window, overlapping the one before it: no masks, which 8-bit and 16-bit lanes
    lack on most machines. Fewer windows than a vector has lanes take a half or a quarter of a vector, then single ones.
    """
    kind, every = _literal(operation), _literal(stride)
    signature = types.void(operation, stride, out, source, types.intp, types.intp, types.intp)

    def codegen(context, builder, signature, args):
        _, _, out, source, step, taps, count = args
        element = signature.args[2].dtype
        whole = lane_count(element.bitwidth // 8)
        end = builder.append_basic_block("folded")
        for lanes in (whole, whole // 2, whole // 4):
            if lanes < 2:
                continue
            wide = builder.append_basic_block(f"fold_{lanes}")
            narrower = builder.append_basic_block("fold_fewer")
            builder.cbranch(builder.icmp_signed(">=", count, _I64(lanes)), wide, narrower)
            builder.position_at_end(wide)
            last = builder.sub(count, _I64(lanes))
            with cgutils.for_range_slice(builder, _I64(0), count, _I64(lanes), inc=True) as (i, _):
                i = builder.select(builder.icmp_signed("<", i, last), i, last)
                _emit_windows(builder, element, kind, every, lanes, (out, source, step, taps, i))
            builder.branch(end)
            builder.position_at_end(narrower)
        with cgutils.for_range(builder, count) as loop:
            _emit_windows(builder, element, kind, every, 1, (out, source, step, taps, loop.index))
        builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return signature, codegen


def _emit_windows(builder, element, kind, every, lanes, args):
    """Windows i to i + lanes - 1: the folded value stays in a register over all taps."""
    out, source, step, taps, i = args
    itemsize = element.bitwidth // 8
    first = builder.gep(source, [builder.mul(i, _I64(every))])
    value = _load(builder, first, every, lanes, itemsize)
    total = cgutils.alloca_once(builder, value.type)
    builder.store(value, total)
    with cgutils.for_range_slice(builder, _I64(1), taps, _I64(1), inc=True) as (t, _):
        value = _load(builder, builder.gep(first, [builder.mul(t, step)]), every, lanes, itemsize)
        builder.store(_combine(builder, element, kind, value, builder.load(total)), total)
    target = builder.gep(out, [i])
    target = builder.bitcast(target, value.type.as_pointer())
    builder.store(builder.load(total), target).align = itemsize


def _load(builder, pointer, every, lanes, itemsize):
    """`lanes` elements from the pointer on, or every second of twice as many."""
    scalar = pointer.type.pointee
    if lanes == 1:
        return builder.load(pointer)
    vector = ir.VectorType(scalar, lanes * every)
    value = builder.load(builder.bitcast(pointer, vector.as_pointer()))
    value.align = itemsize
    if every == 1:
        return value
    even = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [2 * i for i in range(lanes)])
    return builder.shuffle_vector(value, ir.Constant(vector, ir.Undefined), even)


def _combine(builder, element, kind, v, total):
    if isinstance(element, types.Float):
        if kind == SUM:
            return builder.fadd(total, v)
        lanes = f"v{v.type.count}" if isinstance(v.type, ir.VectorType) else ""
        name = f"llvm.maximum.{lanes}f{element.bitwidth}"
        maximum = cgutils.get_or_insert_function(builder.module, ir.FunctionType(v.type, [v.type] * 2), name)
        return builder.call(maximum, [v, total], fastmath=("nsz",))
    if kind == SUM:
        return builder.add(total, v)
    compare = builder.icmp_signed if element.signed else builder.icmp_unsigned
    return builder.select(compare(">", v, total), v, total)
