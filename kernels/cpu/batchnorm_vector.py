"""The passes of batch norm in explicit vectors, on pointers.

`run_*` go along a run of one channel's pixels (NCHW), `rows_*` down the columns of a matrix of pixels by channels
(NHWC), several rows at a time; `planes_*` along the runs of several channels, one behind the other (NCHW). How they
treat what is left of a vector at an end is vector_pass.py's. The order of every sum is part of the code, so the serial
and the parallel form of a kernel give the same bits; without slices of arrays no references are counted, which would
cost more than a plane of 7x7. Images (x, y, grad, result) may also be float16, as its bits; what goes with a channel is
float32 then.

Callers are compiled without reassociation, which Numba would otherwise add to the instructions here too.
"""

from numba import types
from numba.extending import intrinsic

from tilewise.kernels.cpu.half_vector import emitted
from tilewise.kernels.cpu.simd import _I64, VECTOR_BYTES, _literal

ROWS = 8  # rows summed at a time, so that a column's sum in memory is touched once for eight of them
# The same where each row is read from two arrays, and where results are written, so that a column's factors are read
# once for four rows; but only in the caches (NEAR). From memory, processors fetch one row after the other faster than
# several at a time, most of all rows of 1 KB. Sums are the same either way, row after row.
ROWS_OF_TWO = 4 if VECTOR_BYTES >= 32 else 1
SEVERAL = ROWS_OF_TWO > 1  # else NEAR would be KEPT's code once more
# Bytes that passes over large arrays (STREAMED) ask for ahead (float16: half as many), because Zen 3 itself stops at
# every row: in NHWC, on one thread, training takes 9 to 19 % less time and the gradient 2 to 10 %. Arrays in the
# third-level cache lose as much.
AHEAD = 4096
# How a pass writes its result: through the caches, or past them, for which result and run must be whole, aligned
# vectors of a row. FROZEN: a gradient through statistics that do not depend on x. NEAR, FROZEN_NEAR: as KEPT and
# FROZEN, by several rows at a time. Kernels compare them by their order.
KEPT, STREAMED, NEAR, FROZEN_NEAR, FROZEN = range(5)


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

    return emitted(types.void(x, types.intp, moments, types.intp), emission)


@intrinsic(prefer_literal=True)
def planes_normalise(typingctx, mode, x, y, count, length, centre, scale, offset):
    """y = (x - centre[c]) * scale[c] + offset[c] in run c of `count`, each of this length, one behind the other. mode:
    a literal."""
    past = _literal(mode) == STREAMED

    def emission(emit, args):
        _, x, y, count, length, *factors = args

        def normalise(at, factors, mask):
            centre, scale, offset = factors
            deviation = emit.builder.fsub(emit.read(x, at, mask), centre)
            emit.write(emit.multiply_add(deviation, scale, offset), y, at, mask, past)

        emit.over_planes(count, length, y, past, factors, normalise)

    return emitted(types.void(mode, x, y, types.intp, types.intp, centre, scale, offset), emission)


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

    return emitted(types.void(grad, x, types.intp, centre, sums, types.intp), emission)


def _gradient(emit, frozen, slope, x, at, mask, centre, a, b, offset):
    if frozen:
        return emit.builder.fmul(slope, a)
    deviation = emit.builder.fsub(emit.read(x, at, mask), centre)
    return emit.multiply_add(slope, a, emit.multiply_add(deviation, b, offset))


@intrinsic(prefer_literal=True)
def planes_gradient(typingctx, mode, grad, x, result, count, length, centre, a, b, offset):
    """result = grad * a[c] + ((x - centre[c]) * b[c] + offset[c]) in run c of `count`, each of this length, one behind
    the other; FROZEN: result = grad * a[c]. mode: a literal."""
    frozen, past = _literal(mode) == FROZEN, _literal(mode) == STREAMED

    def emission(emit, args):
        _, grad, x, result, count, length, *factors = args

        def gradient(at, factors, mask):
            slope = emit.read(grad, at, mask)
            emit.write(_gradient(emit, frozen, slope, x, at, mask, *factors), result, at, mask, past)

        emit.over_planes(count, length, result, past, factors, gradient)

    signature = types.void(mode, grad, x, result, types.intp, types.intp, centre, a, b, offset)
    return emitted(signature, emission)


def _prefetch(emit, x, places, ahead, mask):
    """Ask for what lies `ahead` of whole vectors."""
    if mask is None:
        for at in places:
            emit.prefetch(emit.builder.gep(x, [emit.builder.add(at, ahead)]), 2)


def _prefetch_operands(emit, operands, places, mask):
    """The same for all of them, AHEAD bytes further."""
    for operand in operands:
        _prefetch(emit, operand, places, _I64(AHEAD // emit.itemsize), mask)


def _rows_of_two(mode) -> int:
    return ROWS_OF_TWO if _literal(mode) == NEAR else 1


@intrinsic
def rows_total(typingctx, x, stride, rows, columns, total):
    """total[j] += the sum of column j of x, whose rows are `stride` elements apart."""

    def emission(emit, args):
        x, stride, rows, columns, total = args

        def add(i, height, j, mask):
            places = emit.places(i, height, stride, j)
            values = [emit.read(x, at, mask) for at in places]
            emit.write(emit.add(emit.read(total, j, mask), emit.tree_sum(values)), total, j, mask)

        emit.sweep(rows, columns, ROWS, add)

    return emitted(types.void(x, types.intp, types.intp, types.intp, total), emission)


@intrinsic
def rows_deviations(typingctx, x, stride, rows, columns, pivot, first, second, ahead):
    """first[j], second[j] += the sums of the deviations of column j from pivot[j], and of their squares. ahead: where
    what follows this block lies, which is asked for."""

    def emission(emit, args):
        x, stride, rows, columns, pivot, first, second, ahead = args

        def add(i, height, j, mask):
            middle = emit.read(pivot, j, mask)
            places = emit.places(i, height, stride, j)
            _prefetch(emit, x, places, ahead, mask)
            deviations = [emit.builder.fsub(emit.read(x, at, mask), middle) for at in places]
            squares = emit.read(second, j, mask)
            for deviation in deviations:
                squares = emit.multiply_add(deviation, deviation, squares)
            emit.write(emit.add(emit.read(first, j, mask), emit.tree_sum(deviations)), first, j, mask)
            emit.write(squares, second, j, mask)

        emit.sweep(rows, columns, ROWS, add)

    signature = types.void(x, types.intp, types.intp, types.intp, pivot, first, second, types.intp)
    return emitted(signature, emission)


@intrinsic(prefer_literal=True)
def rows_normalise(typingctx, mode, x, y, stride, rows, columns, centre, scale, offset):
    """y = (x - centre) * scale + offset, with a factor of each for every column. mode: a literal."""
    past = _literal(mode) == STREAMED

    def emission(emit, args):
        _, x, y, stride, rows, columns, *factors = args

        def normalise(i, height, j, mask):
            centre, scale, offset = (emit.read(factor, j, mask) for factor in factors)
            places = emit.places(i, height, stride, j)
            if past:
                _prefetch_operands(emit, (x,), places, mask)
            for at in places:
                deviation = emit.builder.fsub(emit.read(x, at, mask), centre)
                emit.write(emit.multiply_add(deviation, scale, offset), y, at, mask, past)

        emit.sweep(rows, columns, _rows_of_two(mode), normalise, None if past else y, stride)

    signature = types.void(mode, x, y, types.intp, types.intp, types.intp, centre, scale, offset)
    return emitted(signature, emission)


@intrinsic(prefer_literal=True)
def rows_sums(typingctx, mode, grad, x, stride, rows, columns, centre, total, product):
    """total[j], product[j] += the sums of grad and of grad * (x - centre[j]) down column j. mode: a literal."""
    past = _literal(mode) == STREAMED

    def emission(emit, args):
        _, grad, x, stride, rows, columns, centre, total, product = args

        def add(i, height, j, mask):
            middle = emit.read(centre, j, mask)
            places = emit.places(i, height, stride, j)
            if past:
                _prefetch_operands(emit, (grad, x), places, mask)
            slopes, products = emit.read(total, j, mask), emit.read(product, j, mask)
            for at in places:
                slope = emit.read(grad, at, mask)
                deviation = emit.builder.fsub(emit.read(x, at, mask), middle)
                slopes = emit.add(slopes, slope)
                products = emit.multiply_add(slope, deviation, products)
            emit.write(slopes, total, j, mask)
            emit.write(products, product, j, mask)

        emit.sweep(rows, columns, _rows_of_two(mode), add)

    return emitted(types.void(mode, grad, x, types.intp, types.intp, types.intp, centre, total, product), emission)


@intrinsic(prefer_literal=True)
def rows_gradient(typingctx, mode, grad, x, result, stride, rows, columns, centre, a, b, offset):
    """result = grad * a + ((x - centre) * b + offset), with a factor of each for every column. mode: a literal."""
    frozen, past = _literal(mode) == FROZEN, _literal(mode) == STREAMED

    def emission(emit, args):
        _, grad, x, result, stride, rows, columns, *factors = args

        def gradient(i, height, j, mask):
            centre, a, b, offset = (emit.read(factor, j, mask) for factor in factors)
            places = emit.places(i, height, stride, j)
            if past:
                _prefetch_operands(emit, (grad, x), places, mask)
            for at in places:
                slope = emit.read(grad, at, mask)
                value = _gradient(emit, frozen, slope, x, at, mask, centre, a, b, offset)
                emit.write(value, result, at, mask, past)

        emit.sweep(rows, columns, _rows_of_two(mode), gradient, None if past else result, stride)

    return emitted(
        types.void(mode, grad, x, result, types.intp, types.intp, types.intp, centre, a, b, offset), emission
    )
