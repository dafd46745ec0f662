"""Folding the taps of windows, many windows at once: the vector loop under all of max and average pooling.

LLVM's own vectoriser falls back to gathers for every second element, and slices of arrays are counted references, whose
atomic operations cost more than a short row. So this is emitted as vector IR, on plain pointers.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tilewise.kernels.cpu.jit import device
from tilewise.kernels.cpu.simd import _I32, _I64, _literal, lane_count

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


def _over_windows(builder, element, count, emit):
    """Call emit(i, lanes) for all windows i < count, in vectors as long as there are windows for.

    The last vector ends with the last window, overlapping the one before it: no masks, which 8-bit and 16-bit lanes
    lack on most machines. Fewer windows than a vector has lanes take halves or quarters of a vector, then single ones.
    """
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
            emit(builder.select(builder.icmp_signed("<", i, last), i, last), lanes)
        builder.branch(end)
        builder.position_at_end(narrower)
    with cgutils.for_range(builder, count) as loop:
        emit(loop.index, 1)
    builder.branch(end)
    builder.position_at_end(end)


@intrinsic(prefer_literal=True)
def fold(typingctx, operation, stride, out, source, step, taps, count):
    """out[i] = the maximum or the sum, over 0 <= t < taps, of source[i * stride + t * step], for i < count.

    operation, stride: literals; MAXIMUM or SUM, 1 or 2. out and source may not overlap. For stride 2 the element after
    the last one used is read too. Sums go from the first tap to the last, so bits do not depend on the vector width.

        stride 2, 4 lanes, one tap:   source  a0 b0 a1 b1 | a2 b2 a3 b3   ->   out  a0 a1 a2 a3
    """
    kind, every = _literal(operation), _literal(stride)
    signature = types.void(operation, stride, out, source, types.intp, types.intp, types.intp)

    def codegen(context, builder, signature, args):
        _, _, out, source, step, taps, count = args
        element = signature.args[2].dtype

        def emit(i, lanes):
            first = builder.gep(source, [builder.mul(i, _I64(every))])
            value = _load(builder, first, every, lanes)
            total = cgutils.alloca_once(builder, value.type)  # LLVM keeps it in a register
            builder.store(value, total)
            with cgutils.for_range_slice(builder, _I64(1), taps, _I64(1), inc=True) as (t, _):
                value = _load(builder, builder.gep(first, [builder.mul(t, step)]), every, lanes)
                builder.store(_combine(builder, element, kind, value, builder.load(total)), total)
            _store(builder, builder.load(total), builder.gep(out, [i]))

        _over_windows(builder, element, count, emit)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def fold_indexed(
    typingctx, stride, out, where, source, rows, row_step, columns, column_step, count, index, lane, width, dilation
):
    """The maximum over rows x columns taps, and where it is, for `count` windows: NaN wins, the first of equals wins.

    Window i reads source[i * stride + s * row_step + t * column_step]; out[i] is the maximum, and where[i] its index
    index + i * lane + s * width + t * dilation, of the last NaN if there is one. Taps are visited row by row, and a
    later one wins if it is greater or NaN. stride: a literal, 1 or 2; for 2 the element after the last is read too.

    Indices take 64 bits also inside: a window over a plane of more than 2**31 pixels is a window like any other.
    """
    every = _literal(stride)
    signature = types.void(stride, out, where, source, *[types.intp] * 9)

    def codegen(context, builder, signature, args):
        _, out, where, source, rows, row_step, columns, column_step, count, index, lane, width, dilation = args
        element = signature.args[1].dtype

        def emit(i, lanes):
            first = builder.gep(source, [builder.mul(i, _I64(every))])
            value = _load(builder, first, every, lanes)
            best = cgutils.alloca_once_value(builder, value)
            # the loops visit the first tap again, which changes nothing
            numbers = _of_lanes(_I64, lanes)
            winner = cgutils.alloca_once(builder, numbers)
            builder.store(ir.Constant(numbers, None), winner)
            with cgutils.for_range(builder, rows) as row, cgutils.for_range(builder, columns) as column:
                s, t = row.index, column.index
                offset = builder.add(builder.mul(s, row_step), builder.mul(t, column_step))
                relative = builder.add(builder.mul(s, width), builder.mul(t, dilation))
                value = _load(builder, builder.gep(first, [offset]), every, lanes)
                wins = _wins(builder, element, value, builder.load(best))
                builder.store(builder.select(wins, value, builder.load(best)), best)
                tap = _splat(builder, relative, lanes)
                builder.store(builder.select(wins, tap, builder.load(winner)), winner)
            _store(builder, builder.load(best), builder.gep(out, [i]))
            base = _splat(builder, builder.add(index, builder.mul(i, lane)), lanes)
            found = builder.add(base, builder.load(winner))
            if lanes > 1:
                ramp = ir.Constant(_of_lanes(_I64, lanes), list(range(lanes)))
                found = builder.add(found, builder.mul(ramp, _splat(builder, lane, lanes)))
            _store(builder, found, builder.gep(where, [i]))

        _over_windows(builder, element, count, emit)
        return context.get_dummy_value()

    return signature, codegen


def _of_lanes(scalar, lanes):
    return ir.VectorType(scalar, lanes) if lanes > 1 else scalar


def _splat(builder, value, lanes):
    if lanes == 1:
        return value
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    zeros = ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)
    return builder.shuffle_vector(builder.insert_element(undefined, value, _I32(0)), undefined, zeros)


def _itemsize(scalar) -> int:
    return {ir.FloatType(): 4, ir.DoubleType(): 8}.get(scalar) or scalar.width // 8


def _load(builder, pointer, every, lanes):
    """`lanes` elements from the pointer on, or every second of twice as many."""
    if lanes == 1:
        return builder.load(pointer)
    scalar = pointer.type.pointee
    vector = ir.VectorType(scalar, lanes * every)
    value = builder.load(builder.bitcast(pointer, vector.as_pointer()))
    value.align = _itemsize(scalar)
    if every == 1:
        return value
    even = ir.Constant(ir.VectorType(_I32, lanes), [2 * i for i in range(lanes)])
    return builder.shuffle_vector(value, ir.Constant(vector, ir.Undefined), even)


def _store(builder, value, pointer):
    scalar = pointer.type.pointee
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = _itemsize(scalar)


def _wins(builder, element, value, best):
    """Whether a later tap takes the place of the best so far."""
    if not isinstance(element, types.Float):
        return (builder.icmp_signed if element.signed else builder.icmp_unsigned)(">", value, best)
    greater = builder.fcmp_ordered(">", value, best)
    return builder.or_(greater, builder.fcmp_unordered("uno", value, value))


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


def folds(operation):
    """`fold` for one operation as functions: (contiguous windows, every second window).

    Functions, because a kernel folds in several places, and the vector loops are to be compiled once.
    """

    @device()
    def contiguous(out, source, step, taps, count):
        if taps == 3:  # a constant number of taps is unrolled
            fold(operation, 1, out, source, step, 3, count)
        else:
            fold(operation, 1, out, source, step, taps, count)

    @device()
    def every_second(out, source, step, taps, count):
        fold(operation, 2, out, source, step, taps, count)

    return contiguous, every_second


max_contiguous, max_every_second = folds(MAXIMUM)
sum_contiguous, sum_every_second = folds(SUM)
