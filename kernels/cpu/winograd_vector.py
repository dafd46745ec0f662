"""The transforms of Winograd F(4x4, 3x3) on whole vectors, as straight-line code: lane l works on tile l.

    y = A^T [ (G w G^T) * (B^T d B) ] A      (* elementwise; Lavin and Gray 2016, interpolation points 0, 1, -1, 2, -2)

        | 4  0 -5  0 1 0 |        |  1/4    0     0  |
        | 0 -4 -4  1 1 0 |        | -1/6  -1/6  -1/6 |          | 1 1  1 1  1 0 |
  B^T = | 0  4 -4 -1 1 0 |    G = | -1/6   1/6  -1/6 |    A^T = | 0 1 -1 2 -2 0 |
        | 0 -2 -1  2 1 0 |        | 1/24  1/12   1/6 |          | 0 1  1 4  4 0 |
        | 0  2 -1 -2 1 0 |        | 1/24 -1/12   1/6 |          | 0 1 -1 8 -8 1 |
        | 0  4  0 -5 0 1 |        |   0     0     1  |

36 multiplications for 16 outputs, where the definition takes 144.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tilewise.kernels.cpu.register_tile import Bounds
from tilewise.kernels.cpu.simd import _I1, _I32, _I64, _Emitter, _literal


def _transform(name, rows_in, rows_out, one_dimension):
    """An intrinsic that applies a 1-D transform to the columns, then to the rows, of a square of vectors.

    Entry (i, j) of the source is the vector at source[i * row_step + j * column_step]; of the target, at target[(i *
    rows_out + j) * target_step].
    """

    @intrinsic
    def transform(typingctx, target, target_step, source, row_step, column_step):
        signature = types.void(target, types.intp, source, types.intp, types.intp)

        def codegen(context, builder, signature, args):
            target, target_step, source, row_step, column_step = args
            emit = _Emitter(builder, signature.args[0].dtype)
            for i, row in enumerate(_apply(emit, one_dimension, rows_in, rows_out, source, row_step, column_step)):
                for j, value in enumerate(row):
                    emit.store(value, target, builder.mul(target_step, _I64(i * rows_out + j)))
            return context.get_dummy_value()

        return signature, codegen

    transform.__doc__ = name
    return transform


def _apply(emit, one_dimension, rows_in, rows_out, source, row_step, column_step):
    """The transformed square, row by row; it is loaded column by column."""
    builder = emit.builder

    def entry(i, j):
        return emit.load(source, builder.add(builder.mul(row_step, _I64(i)), builder.mul(column_step, _I64(j))))

    columns = [one_dimension(emit, [entry(i, j) for i in range(rows_in)]) for j in range(rows_in)]
    return [one_dimension(emit, [columns[j][i] for j in range(rows_in)]) for i in range(rows_out)]


class _Algebra:
    """Vectors with constants: k * a, and k * a + b in one rounding."""

    def __init__(self, emit):
        self.emit = emit

    def constant(self, value):
        return ir.Constant(self.emit.vector, [float(value)] * self.emit.lanes)

    def scaled(self, k, a):
        return self.emit.builder.fmul(self.constant(k), a)

    def plus(self, k, a, b):
        return self.emit.multiply_add(self.constant(k), a, b)


def _input_rows(emit, d):
    m = _Algebra(emit)
    even, odd = m.plus(-4, d[2], d[4]), m.plus(-4, d[1], d[3])
    near, twice = m.plus(-1, d[2], d[4]), m.scaled(2, m.plus(-1, d[1], d[3]))
    return [
        m.plus(4, d[0], m.plus(-5, d[2], d[4])),
        m.plus(1, even, odd),
        m.plus(-1, odd, even),
        m.plus(1, near, twice),
        m.plus(-1, twice, near),
        m.plus(4, d[1], m.plus(-5, d[3], d[5])),
    ]


def _weight_rows(emit, w):
    m = _Algebra(emit)
    ends = m.plus(1, w[0], w[2])
    sixth = m.scaled(-1 / 6, ends)
    far = m.plus(4, w[2], w[0])
    return [
        m.scaled(1 / 4, w[0]),
        m.plus(-1 / 6, w[1], sixth),
        m.plus(1 / 6, w[1], sixth),
        m.plus(1 / 12, w[1], m.scaled(1 / 24, far)),
        m.plus(-1 / 12, w[1], m.scaled(1 / 24, far)),
        w[2],
    ]


def _output_rows(emit, p):
    m = _Algebra(emit)
    sum_one, difference_one = m.plus(1, p[1], p[2]), m.plus(-1, p[2], p[1])
    sum_two, difference_two = m.plus(1, p[3], p[4]), m.plus(-1, p[4], p[3])
    return [
        m.plus(1, p[0], m.plus(1, sum_one, sum_two)),
        m.plus(2, difference_two, difference_one),
        m.plus(4, sum_two, sum_one),
        m.plus(1, p[5], m.plus(8, difference_two, difference_one)),
    ]


input_transform = _transform("B^T d B: 6x6 pixels to 6x6.", 6, 6, _input_rows)
weight_transform = _transform("G w G^T: 3x3 taps to 6x6.", 3, 6, _weight_rows)
output_transform = _transform("A^T m A: 6x6 to 4x4 outputs.", 6, 4, _output_rows)


@intrinsic
def output_transform_to(
    typingctx, y, row_step, column_step, rows, columns, lanes, source, source_row, source_column, bias, has_bias,
    extra, has_extra, bounds,
):  # fmt: skip
    """The output transform, then bias, summand and activation, straight to y: pixel (i, j) to y[i * row_step + j *
    column_step] for i < rows, j < columns, the first `lanes` lanes of it.

    bias: a number a lane, read where has_bias is not 0; extra: laid out as y, read where has_extra is not 0. Returns
    whether all sums are finite; if not, nothing is written.
    """
    intp = types.intp
    signature = types.intp(y, intp, intp, intp, intp, intp, source, intp, intp, bias, intp, extra, intp, intp)

    def codegen(context, builder, signature, args):
        y, row_step, column_step, rows, columns, lanes, source, source_row, source_column = args[:9]
        bias, has_bias, extra, has_extra, bounds = args[9:]
        emit = _Emitter(builder, signature.args[0].dtype)
        mask = emit.mask(_I64(0), lanes)
        biased = emit.splat(builder.icmp_signed("!=", has_bias, _I64(0)), scalar=_I1)
        limits = Bounds(emit, bounds)
        shift = emit.masked_load(bias, _I64(0), builder.and_(mask, biased))
        tile = _apply(emit, _output_rows, 6, 4, source, source_row, source_column)
        # a NaN or an Inf times 0 is NaN, and a NaN stays one in a sum
        residue = emit.zero
        for row in tile:
            for value in row:
                residue = emit.multiply_add(value, emit.zero, residue)
        finite = builder.or_(builder.fcmp_ordered("==", residue, emit.zero), builder.not_(mask))
        all_finite = builder.icmp_signed("==", builder.bitcast(finite, ir.IntType(emit.lanes)),
                                         ir.IntType(emit.lanes)(-1))  # fmt: skip
        some = builder.icmp_signed("!=", has_extra, _I64(0))
        rows = builder.select(all_finite, rows, _I64(0))
        for i, row in enumerate(tile):
            with builder.if_then(builder.icmp_signed("<", _I64(i), rows)):
                line = builder.mul(row_step, _I64(i))
                for j, value in enumerate(row):
                    with builder.if_then(builder.icmp_signed("<", _I64(j), columns)):
                        place = builder.add(line, builder.mul(column_step, _I64(j)))
                        (summand,) = emit.masked_loads_if(some, builder.gep(extra, [place]), [mask])
                        total = limits.apply(emit.add(emit.add(value, shift), summand))
                        emit.masked_store(total, y, place, mask)
        return builder.zext(all_finite, _I64)

    return signature, codegen


def _picked(emit, a, b, order):
    numbers = ir.VectorType(_I32, emit.lanes)
    return emit.builder.shuffle_vector(a, b, ir.Constant(numbers, order))


@intrinsic(prefer_literal=True)
def split_fours(typingctx, count, target, target_step, source):
    """target[e * target_step + l] = source[4 * l + e] for e < count: columns of one vector's worth of tiles.

    count: a literal, 2 or 4.
    """
    wanted = _literal(count)
    signature = types.void(count, target, types.intp, source)

    def codegen(context, builder, signature, args):
        _, target, step, source = args
        emit = _Emitter(builder, signature.args[1].dtype)
        n, half = emit.lanes, emit.lanes // 2
        parts = [emit.load(source, _I64(i * n)) for i in range(4)]
        for e in range(0, wanted, 2):
            # first e and e + 1 of two neighbouring vectors, half a vector each; then the halves together
            order = [4 * i + e for i in range(half)] + [4 * i + e + 1 for i in range(half)]
            left, right = _picked(emit, parts[0], parts[1], order), _picked(emit, parts[2], parts[3], order)
            first = [*range(half), *range(n, n + half)]
            emit.store(_picked(emit, left, right, first), target, builder.mul(step, _I64(e)))
            second = [i + half for i in first]
            emit.store(_picked(emit, left, right, second), target, builder.mul(step, _I64(e + 1)))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def join_fours(typingctx, target, source, source_step):
    """target[4 * l + e] = source[e * source_step + l] for e < 4: the reverse of `split_fours`."""
    signature = types.void(target, source, types.intp)

    def codegen(context, builder, signature, args):
        target, source, step = args
        emit = _Emitter(builder, signature.args[0].dtype)
        n, quarter = emit.lanes, emit.lanes // 4
        parts = [emit.load(source, builder.mul(step, _I64(e))) for e in range(4)]
        for i in range(4):
            lanes = range(i * quarter, (i + 1) * quarter)
            pair = [p for lane in lanes for p in (lane, lane + n)] + [0] * (n - 2 * quarter)
            left, right = _picked(emit, parts[0], parts[1], pair), _picked(emit, parts[2], parts[3], pair)
            order = [p for q in range(quarter) for p in (2 * q, 2 * q + 1, n + 2 * q, n + 2 * q + 1)]
            emit.store(_picked(emit, left, right, order), target, _I64(i * n))
        return context.get_dummy_value()

    return signature, codegen
