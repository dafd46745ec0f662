"""Folding the taps of windows, many windows at once: the vector loop under all of max and average pooling.

LLVM's own vectoriser falls back to gathers for every second element, and slices of arrays are counted references, whose
atomic operations cost more than a short row. So this is emitted as vector IR, on plain pointers.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tilewise.kernels.cpu.jit import device
from tilewise.kernels.cpu.simd import _I32, _I64, _Emitter, _literal, emit_prefetch, lane_count

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
def fold_rows(
    typingctx,
    operation,
    stride,
    unrolled,
    asked,
    out,
    out_pitch,
    source,
    source_pitch,
    rows,
    step,
    taps,
    count,
    ahead,
):
    """`fold` for many rows: row r reads from source + r * source_pitch and goes to out + r * out_pitch.

    Whole vectors only, which is what makes short rows fast: `count` is rounded up to a multiple of the lanes, in
    reading and in writing. What is written behind a row is overwritten by the next one, as rows are done in order; the
    caller sees to what lies behind the last. unrolled: a literal; the number of taps where it is known, else 0. ahead:
    the distance, from a row's start, of elements that will be wanted soon. asked: a literal; how many vectors of them
    are asked for, in the order of the memory, for each vector that is written.
    """
    kind, every, known, lines = (_literal(value) for value in (operation, stride, unrolled, asked))
    signature = types.void(operation, stride, unrolled, asked, out, types.intp, source, *[types.intp] * 6)

    def codegen(context, builder, signature, args):
        _, _, _, _, out, out_pitch, source, source_pitch, rows, step, taps, count, ahead = args
        element = signature.args[4].dtype
        lanes = lane_count(element.bitwidth // 8)

        def tap(first, t):
            return _load(builder, builder.gep(first, [builder.mul(t, step)]), every, lanes)

        with cgutils.for_range(builder, rows) as row:
            start = builder.gep(source, [builder.mul(row.index, source_pitch)])
            target = builder.gep(out, [builder.mul(row.index, out_pitch)])
            with cgutils.for_range_slice(builder, _I64(0), count, _I64(lanes), inc=True) as (i, _):
                first = builder.gep(start, [builder.mul(i, _I64(every))])
                value = _load(builder, first, every, lanes)
                if known:
                    for t in range(1, known):
                        value = _combine(builder, element, kind, tap(first, _I64(t)), value)
                else:
                    total = cgutils.alloca_once(builder, value.type)
                    builder.store(value, total)
                    with cgutils.for_range_slice(builder, _I64(1), taps, _I64(1), inc=True) as (t, _):
                        builder.store(_combine(builder, element, kind, tap(first, t), builder.load(total)), total)
                    value = builder.load(total)
                wanted = builder.gep(start, [builder.add(builder.mul(i, _I64(max(lines, 1))), ahead)])
                for k in range(lines):
                    emit_prefetch(builder, builder.gep(wanted, [_I64(k * lanes)]))
                _store(builder, value, builder.gep(target, [i]))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def fill_rows(typingctx, out, pitch, rows, value, count):
    """out[r * pitch + i] = value for r < rows, i < count; whole vectors, as in `fold_rows`."""
    signature = types.void(out, types.intp, types.intp, out.dtype, types.intp)

    def codegen(context, builder, signature, args):
        out, pitch, rows, value, count = args
        lanes = lane_count(signature.args[0].dtype.bitwidth // 8)
        vector = _splat(builder, value, lanes)
        with cgutils.for_range(builder, rows) as row:
            target = builder.gep(out, [builder.mul(row.index, pitch)])
            with cgutils.for_range_slice(builder, _I64(0), count, _I64(lanes), inc=True) as (i, _):
                _store(builder, vector, builder.gep(target, [i]))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def sum_rows(typingctx, out, source, source_pitch, rows, count):
    """out[r] = the sum of `count` elements from source + r * source_pitch on, in an order that no compiler changes.

    Four vectors of sums take turns, as an addition waits four cycles for the one before it; the last vector is masked.
    """
    signature = types.void(out, source, types.intp, types.intp, types.intp)

    def codegen(context, builder, signature, args):
        out, source, source_pitch, rows, count = args
        emit = _Emitter(builder, signature.args[0].dtype)
        lanes = emit.lanes
        rest, whole = builder.and_(count, _I64(-4 * lanes)), builder.and_(count, _I64(-lanes))
        mask = emit.mask(_I64(0), builder.sub(count, whole))
        totals = [cgutils.alloca_once(builder, emit.vector) for _ in range(4)]

        def add(total, value):
            builder.store(builder.fadd(builder.load(total), value), total)

        with cgutils.for_range(builder, rows) as row:
            start = builder.gep(source, [builder.mul(row.index, source_pitch)])
            for total in totals:
                builder.store(emit.zero, total)
            with cgutils.for_range_slice(builder, _I64(0), rest, _I64(4 * lanes), inc=True) as (i, _):
                for k, total in enumerate(totals):
                    add(total, emit.load(start, builder.add(i, _I64(k * lanes))))
            with cgutils.for_range_slice(builder, rest, whole, _I64(lanes), inc=True) as (i, _):
                add(totals[0], emit.load(start, i))
            add(totals[1], emit.masked_load(start, whole, mask))
            a, b, c, d = (builder.load(total) for total in totals)
            total = _total(builder, builder.fadd(builder.fadd(a, b), builder.fadd(c, d)))
            builder.store(total, builder.gep(out, [row.index]))
        return context.get_dummy_value()

    return signature, codegen


def _total(builder, value):
    """The sum of a vector's lanes, by halves."""
    lanes = value.type.count
    while lanes > 1:
        lanes //= 2
        numbers = ir.VectorType(_I32, lanes)
        halves = [ir.Constant(numbers, list(range(first, first + lanes))) for first in (0, lanes)]
        low, high = (builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), half) for half in halves)
        value = builder.fadd(low, high)
    return builder.extract_element(value, _I32(0))


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
    """`lanes` elements from the pointer on, the first of `every` each."""
    if lanes == 1:
        return builder.load(pointer)
    scalar = pointer.type.pointee
    vector = ir.VectorType(scalar, lanes * every)
    value = builder.load(builder.bitcast(pointer, vector.as_pointer()))
    value.align = _itemsize(scalar)
    if every == 1:
        return value
    chosen = ir.Constant(ir.VectorType(_I32, lanes), [every * i for i in range(lanes)])
    return builder.shuffle_vector(value, ir.Constant(vector, ir.Undefined), chosen)


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
    """`fold` and `fold_rows` for one operation as functions: contiguous windows, every second window, rows of both,
    rows of every third element.

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

    @device()
    def contiguous_rows(out, out_pitch, source, source_pitch, rows, step, taps, count):
        if taps == 2:
            fold_rows(operation, 1, 2, 0, out, out_pitch, source, source_pitch, rows, step, taps, count, 0)
        elif taps == 3:
            fold_rows(operation, 1, 3, 0, out, out_pitch, source, source_pitch, rows, step, taps, count, 0)
        elif taps == 5:
            fold_rows(operation, 1, 5, 0, out, out_pitch, source, source_pitch, rows, step, taps, count, 0)
        else:
            fold_rows(operation, 1, 0, 0, out, out_pitch, source, source_pitch, rows, step, taps, count, 0)

    @device()
    def down(out, out_pitch, source, source_pitch, rows, step, taps, count, ahead, asked):
        """The same for rows from memory. asked: 2 where windows move by two rows and more, else 1."""
        if asked == 1 and taps == 3:
            fold_rows(operation, 1, 3, 1, out, out_pitch, source, source_pitch, rows, step, taps, count, ahead)
        elif asked == 1:
            fold_rows(operation, 1, 0, 1, out, out_pitch, source, source_pitch, rows, step, taps, count, ahead)
        elif taps == 2:
            fold_rows(operation, 1, 2, 2, out, out_pitch, source, source_pitch, rows, step, taps, count, ahead)
        elif taps == 3:
            fold_rows(operation, 1, 3, 2, out, out_pitch, source, source_pitch, rows, step, taps, count, ahead)
        else:
            fold_rows(operation, 1, 0, 2, out, out_pitch, source, source_pitch, rows, step, taps, count, ahead)

    @device()
    def every_second_rows(out, out_pitch, source, source_pitch, rows, step, taps, count):
        if taps == 3:
            fold_rows(operation, 2, 3, 0, out, out_pitch, source, source_pitch, rows, step, taps, count, 0)
        else:
            fold_rows(operation, 2, 0, 0, out, out_pitch, source, source_pitch, rows, step, taps, count, 0)

    @device()
    def pick_rows(out, out_pitch, source, source_pitch, rows, count):
        """Every third element."""
        fold_rows(operation, 3, 1, 0, out, out_pitch, source, source_pitch, rows, 1, 1, count, 0)

    return contiguous, every_second, down, contiguous_rows, every_second_rows, pick_rows


MAXIMA, SUMS = folds(MAXIMUM), folds(SUM)
max_contiguous, sum_contiguous = MAXIMA[0], SUMS[0]


@device()
def sizes(image, nhwc):
    """(planes, height, width, channels side by side)"""
    a, b, c, d = image.shape
    return (a, b, c, d) if nhwc else (a * b, c, d, 1)


# Elements that a chunk reads: some tens of microseconds, well above what handing out a chunk costs.
CHUNK = 32768


@device()
def chunk_rows(width):
    """How many rows of this many elements make a chunk."""
    return max(CHUNK // max(width, 1), 1)
