"""Averages of small NCHW planes whose windows overlap and lie three columns or more apart, in registers (AVX).

A folded row of such a plane is one vector or two, and few of its sums are wanted: 4 of 14 in GoogLeNet's 5x5 pool with
stride 3. Instead of going through memory and being picked there, they are permuted to their places:

    rows       a b c d e f g h ...      the rows of a window, added up
    tap 0      a . . d . . g . .        permuted: lane l takes column stride * (l % OW)
    tap 1      b . . e . . h . .        + the same, one column on, and so on
    result     row 0 | row 1 | ...      as many output rows side by side as fit in a vector, then stored

The sums go from the first row to the last and from the first column to the last, as in pool_windows.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tilewise.kernels.cpu.jit import device
from tilewise.kernels.cpu.simd import _I32, _I64, VECTOR_BYTES, _literal, lane_count
from tilewise.kernels.cpu.vector_pass import emitted

PERMUTES = VECTOR_BYTES >= 32  # other machines have no permutation by a vector of indices


def vectors(span: int, outputs: int, itemsize: int) -> int:
    """How many vectors hold `span` columns with `outputs` windows; 0 where that cannot be done here."""
    lanes = lane_count(itemsize)
    return -(-span // lanes) if PERMUTES and span <= 2 * lanes and outputs <= lanes else 0


def permuted(emit, value, index):
    """Lane l of the result: element index[l] of the vector, modulo its length. index: integers as wide as elements."""
    if VECTOR_BYTES == 64:
        name = f"llvm.x86.avx512.permvar.{'sf' if emit.itemsize == 4 else 'df'}.512"
        return _call(emit, name, emit.vector, value, index)
    if emit.itemsize == 4:
        return _call(emit, "llvm.x86.avx2.permps", emit.vector, value, index)
    builder = emit.builder  # AVX2 permutes halves of float64: 2 index and 2 index + 1
    low = builder.shl(index, ir.Constant(index.type, [1] * emit.lanes))
    high = builder.shl(low, ir.Constant(index.type, [32] * emit.lanes))
    pairs = builder.or_(builder.or_(low, high), ir.Constant(index.type, [1 << 32] * emit.lanes))
    singles = ir.VectorType(ir.FloatType(), 2 * emit.lanes)
    halves = builder.bitcast(pairs, ir.VectorType(_I32, 2 * emit.lanes))
    moved = _call(emit, "llvm.x86.avx2.permps", singles, builder.bitcast(value, singles), halves)
    return builder.bitcast(moved, emit.vector)


def _of_pair(emit, low, high, index):
    """Lane l: element index[l] of two vectors together."""
    if VECTOR_BYTES == 64:
        name = f"llvm.x86.avx512.vpermi2var.{'ps' if emit.itemsize == 4 else 'pd'}.512"
        return _call(emit, name, emit.vector, low, index, high)
    in_low = emit.builder.icmp_signed("<", index, ir.Constant(index.type, [emit.lanes] * emit.lanes))
    return emit.builder.select(in_low, permuted(emit, low, index), permuted(emit, high, index))


def _call(emit, name, result, *operands):
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    return emit.builder.call(cgutils.get_or_insert_function(emit.builder.module, kind, name), operands)


def _repeat(emit, known, count, values, body):
    """values = body(t, values) for 0 <= t < count; unrolled where the count is known."""
    if not known:
        return emit.loop(_I64(0), count, 1, values, body)[1]
    for t in range(known):
        values = body(_I64(t), values)
    return values


@intrinsic(prefer_literal=True)
def sum_windows(typingctx, wide, known, out, source, planes, height, width, rows, columns, kh, kw, sh, sw):
    """out[p, i, j] = the sum over s < kh, t < kw of source[p, i * sh + s, j * sw + t], for `planes` planes of height x
    width, i < rows, j < columns.

    wide: a literal; how many vectors hold the columns of a row that take part, 1 or 2. known: a literal; kh = kw where
    it is known, else 0. Nothing but these columns is read.
    """
    parts, taps = _literal(wide), _literal(known)
    signature = types.void(wide, known, out, source, *[types.intp] * 9)

    def emission(emit, args):
        if not PERMUTES:  # never called
            return
        _, _, out, source, planes, height, width, rows, columns, kh, kw, sh, sw = args
        builder, lanes = emit.builder, emit.lanes
        whole = ir.IntType(emit.itemsize * 8)
        numbers = ir.VectorType(whole, lanes)
        lane = ir.Constant(numbers, list(range(lanes)))

        def everywhere(value):
            return emit.splat(builder.trunc(value, whole) if emit.itemsize < 8 else value, scalar=whole)

        first = builder.mul(everywhere(sw), builder.urem(lane, everywhere(columns)))
        span = builder.add(builder.mul(builder.sub(columns, _I64(1)), sw), kw)
        mask = emit.mask(_I64(0), builder.sub(span, _I64((parts - 1) * lanes)))
        written = builder.mul(planes, builder.mul(rows, columns))
        together = builder.udiv(_I64(lanes), columns)  # output rows in a vector
        packs = builder.udiv(builder.add(rows, builder.sub(together, _I64(1))), together)
        one = ir.Constant(numbers, [1] * lanes)

        def row(start):
            """The sums of one row of windows, in every lane that they may go to."""

            def down(s, sums):
                at = builder.mul(s, width)
                last = builder.add(at, _I64((parts - 1) * lanes))
                values = [emit.load(start, at)] * (parts - 1) + [emit.masked_load(start, last, mask)]
                return [emit.add(total, value) for total, value in zip(sums, values, strict=True)]

            sums = _repeat(emit, taps, kh, [emit.zero] * parts, down)

            def across(t, values):
                total, index = values
                value = permuted(emit, *sums, index) if parts == 1 else _of_pair(emit, *sums, index)
                return [emit.add(total, value), builder.add(index, one)]

            return _repeat(emit, taps, kw, [emit.zero, first], across)[0]

        def plane(p, _):
            begin = builder.gep(source, [builder.mul(p, builder.mul(height, width))])
            at = builder.mul(p, builder.mul(rows, columns))
            step = builder.mul(sh, width)

            def pack(n, _):
                i = builder.mul(n, together)
                left = builder.sub(rows, i)
                count = builder.select(builder.icmp_signed("<", left, together), left, together)

                def place(k, packed):
                    sums = row(builder.gep(begin, [builder.mul(builder.add(i, k), step)]))
                    mine = builder.icmp_signed(">=", lane, everywhere(builder.mul(k, columns)))
                    return [builder.select(mine, sums, packed[0])]

                _, (packed,) = emit.loop(_I64(0), count, 1, [emit.zero], place)
                # a whole vector where what it spoils behind these rows is written later
                there = builder.add(at, builder.mul(i, columns))
                ends = builder.icmp_signed(">", builder.add(there, _I64(lanes)), written)
                with builder.if_else(ends) as (last, before):
                    with last:
                        emit.masked_store(packed, out, there, emit.mask(_I64(0), builder.mul(count, columns)))
                    with before:
                        emit.store(packed, out, there)
                return []

            emit.loop(_I64(0), packs, 1, [], pack)
            return []

        emit.loop(_I64(0), planes, 1, [], plane)

    return emitted(signature, emission)


@device()
def sums_of_planes(out, source, planes, height, width, rows, columns, kh, kw, sh, sw, wide):
    """`sum_windows` by the variant that fits."""
    five = kh == 5 and kw == 5
    if wide == 2 and five:
        sum_windows(2, 5, out, source, planes, height, width, rows, columns, 5, 5, sh, sw)
    elif wide == 2:
        sum_windows(2, 0, out, source, planes, height, width, rows, columns, kh, kw, sh, sw)
    elif five:
        sum_windows(1, 5, out, source, planes, height, width, rows, columns, 5, 5, sh, sw)
    else:
        sum_windows(1, 0, out, source, planes, height, width, rows, columns, kh, kw, sh, sw)
