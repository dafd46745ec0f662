"""Moving data into the order the micro-kernel reads: masked vector copies, strided and transposed in registers.

A packed panel stores, for every step k of the sum, the elements that the register tile needs side by side. Where the
source has them side by side, `copy_lanes` moves a vector; where the source runs along k instead, `transpose_block`
turns a square of vectors in registers, which costs a quarter of a shuffle per element and no scalar access.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tilewise.kernels.cpu.emitted import emitted
from tilewise.kernels.cpu.simd import _I1, _I32, _I64, _Emitter, _literal, address, lanes


@intrinsic(prefer_literal=True)
def copy_lanes(typingctx, stride, merge, target, source, low, high, source_stride):
    """One vector: target[i] = source[i * source_stride] for low <= i < high.

    stride: a literal; 1 (contiguous), 2 (two loads and a shuffle), or 0 (any: a gather by source_stride).
    merge: a literal; 0 sets the lanes outside [low, high) to zero, 1 leaves them as they are.
    Nothing outside source[low * stride .. (high - 1) * stride] is read.
    """
    kind, keep = _literal(stride), _literal(merge)
    signature = types.void(stride, merge, target, source, types.intp, types.intp, types.intp)

    def codegen(context, builder, signature, args):
        _, _, target, source, low, high, source_stride = args
        emit = _Emitter(builder, signature.args[2].dtype)
        mask = emit.mask(low, high)
        if kind == 1:
            value = emit.masked_load(source, _I64(0), mask)
        elif kind == 2:
            value = _load_every_second(emit, source, low, high)
        else:
            value = _gather(emit, source, source_stride, mask)
        if keep:
            emit.masked_store(value, target, _I64(0), mask)
        else:
            emit.store(value, target, _I64(0))
        return context.get_dummy_value()

    return signature, codegen


def _load_every_second(emit, source, low, high):
    """Lanes source[0], source[2], source[4], ... from two vectors; the element after the last is never touched."""
    builder = emit.builder
    first = builder.mul(low, _I64(2))
    last = builder.sub(builder.mul(high, _I64(2)), _I64(1))
    parts = []
    for offset in (0, emit.lanes):
        mask = emit.mask(builder.sub(first, _I64(offset)), builder.sub(last, _I64(offset)))
        parts.append(emit.masked_load(source, _I64(offset), mask))
    even = ir.Constant(ir.VectorType(_I32, emit.lanes), [2 * i for i in range(emit.lanes)])
    return builder.shuffle_vector(parts[0], parts[1], even)


def _gather(emit, source, stride, mask):
    builder = emit.builder
    lane = ir.Constant(ir.VectorType(_I64, emit.lanes), [emit.itemsize * i for i in range(emit.lanes)])
    base = emit.splat(builder.ptrtoint(source, _I64), scalar=_I64)
    addresses = builder.add(base, builder.mul(lane, emit.splat(stride, scalar=_I64)))
    pointers = builder.inttoptr(addresses, ir.VectorType(source.type, emit.lanes))
    kind = "f" if isinstance(emit.element, types.Float) else "i"
    bits = emit.itemsize * 8
    name = f"llvm.masked.gather.v{emit.lanes}{kind}{bits}.v{emit.lanes}p0"
    function_type = ir.FunctionType(emit.vector, [pointers.type, _I32, ir.VectorType(_I1, emit.lanes), emit.vector])
    function = cgutils.get_or_insert_function(builder.module, function_type, name)
    return builder.call(function, [pointers, _I32(emit.itemsize), mask, emit.zero])


@intrinsic
def add_scaled(typingctx, target, source, factor, count):
    """target[i] += factor * source[i] for i < count, in vectors, the last one masked.

    On pointers, because slices of arrays are counted references: two atomic operations each, more than a short row
    costs.
    """
    signature = types.void(target, source, factor, types.intp)

    def codegen(context, builder, signature, args):
        target, source, factor, count = args
        emit = _Emitter(builder, signature.args[0].dtype)
        scale = emit.splat(factor)
        entry = builder.block
        body, end = builder.append_basic_block("add_scaled"), builder.append_basic_block("added")
        builder.cbranch(builder.icmp_signed(">", count, _I64(0)), body, end)
        builder.position_at_end(body)
        i = builder.phi(_I64)
        mask = emit.mask(_I64(0), builder.sub(count, i))
        total = emit.multiply_add(scale, emit.masked_load(source, i, mask), emit.masked_load(target, i, mask))
        emit.masked_store(total, target, i, mask)
        following = builder.add(i, _I64(emit.lanes))
        i.add_incoming(_I64(0), entry)
        i.add_incoming(following, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, count), body, end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def transpose_block(typingctx, rows, target, source, offsets, lows, highs, column, used_columns):
    """Pack up to one vector's length of steps k for `rows` rows whose elements run along k.

    target[k * rows + r] = source[offsets[r] + column + k] for r < rows, k < used_columns (at most one vector), where
    lows[r] <= column + k < highs[r], and zero elsewhere: padding costs nothing, and nothing outside the bounds is read.
    offsets, lows, highs: pointers to `rows` int64 each. rows: a literal.

        source, contiguous along k          target, contiguous along r
        row 0: a0 a1 a2 a3 ...              k 0: a0 b0 c0 d0
        row 1: b0 b1 b2 b3 ...     ->       k 1: a1 b1 c1 d1
        row 2: c0 c1 c2 c3 ...              k 2: a2 b2 c2 d2
    """
    count = _literal(rows)
    signature = types.void(rows, target, source, offsets, lows, highs, types.intp, types.intp)

    def codegen(context, builder, signature, args):
        _, target, source, offsets, lows, highs, column, used = args
        emit = _Emitter(builder, signature.args[1].dtype)
        for first in range(0, count, emit.lanes):
            height = min(emit.lanes, count - first)
            values = _load_rows(emit, source, offsets, lows, highs, column, first, height)
            _store_columns(emit, _transposed(emit, values), target, first, height, count, used)
        return context.get_dummy_value()

    return signature, codegen


def _load_rows(emit, source, offsets, lows, highs, column, first, height):
    builder = emit.builder
    values = []
    for r in range(emit.lanes):
        if r >= height:
            values.append(emit.zero)
            continue
        at = _I64(first + r)
        low, high = (builder.sub(builder.load(builder.gep(b, [at])), column) for b in (lows, highs))
        offset = builder.add(builder.load(builder.gep(offsets, [at])), column)
        values.append(emit.masked_load(source, offset, emit.mask(low, high)))
    return values


def _transposed(emit, values):
    """The transpose of a square of vectors.

    With element (r, c) numbered by the bits r, then c, interleaving vector i with vector i + half rotates the number by
    one bit; after log2(lanes) rounds the bits of r and c have changed places. With fewer rows, a power of two, as many
    rounds as r has bits bring r to the end: the numbers then count (c, r).
    """
    if len(values) == emit.lanes:
        return _transposed_square(emit, values)
    count, half = emit.lanes, emit.lanes // 2
    numbers = ir.VectorType(_I32, count)
    lower = ir.Constant(numbers, [i // 2 + (count if i % 2 else 0) for i in range(count)])
    upper = ir.Constant(numbers, [half + i // 2 + (count if i % 2 else 0) for i in range(count)])
    apart = len(values) // 2
    for _ in range(len(values).bit_length() - 1):
        pairs = [(values[i], values[i + apart]) for i in range(apart)]
        values = [emit.builder.shuffle_vector(a, b, order) for a, b in pairs for order in (lower, upper)]
    return values


def _transposed_square(emit, values):
    """The same for as many rows as lanes, where every shuffle is one instruction.

    x86 interleaves within 16 bytes: first runs of 1, 2, ... elements of two vectors there, then 16-byte parts and more.
    """
    count, part, run = emit.lanes, 16 // emit.itemsize, 1
    values, numbers = list(values), ir.VectorType(_I32, emit.lanes)
    while run < count:
        orders = []
        for which in range(2):  # the lower or the upper half of every part; every second run
            first = range(which * run, count, 2 * run)
            if run < part:
                first = [p + i for p in range(which * part // 2, count, part) for i in range(0, part // 2, run)]
            order = [place + i for at in first for place in (at, count + at) for i in range(run)]
            orders.append(ir.Constant(numbers, order))
        for i in range(count):
            if i & run == 0:
                pair = values[i], values[i + run]
                values[i], values[i + run] = (emit.builder.shuffle_vector(*pair, order) for order in orders)
        run *= 2
    # the interleaving leaves the columns of a part in the order of their numbers' bits reversed
    bits = part.bit_length() - 1
    turned = [sum((c >> i & 1) << (bits - 1 - i) for i in range(bits)) for c in range(part)]
    return [values[c // part * part + turned[c % part]] for c in range(count)]


def _store_columns(emit, columns, target, first, height, step, used):
    builder = emit.builder
    numbers = ir.VectorType(_I1, emit.lanes)
    within = ir.Constant(numbers, [int(i < height) for i in range(emit.lanes)])
    end = builder.append_basic_block("packed")
    for k, value in enumerate(columns):
        block = builder.append_basic_block("step")
        builder.cbranch(builder.icmp_signed("<", _I64(k), used), block, end)
        builder.position_at_end(block)
        emit.masked_store(value, target, _I64(k * step + first), within)
    builder.branch(end)
    builder.position_at_end(end)


@intrinsic
def copy_vector(typingctx, target, source):
    """One whole vector from source to target."""
    signature = types.void(target, source)

    def codegen(context, builder, signature, args):
        emit = _Emitter(builder, signature.args[0].dtype)
        emit.store(emit.load(args[1], _I64(0)), args[0], _I64(0))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def transpose_whole(typingctx, rows, target, target_step, source, source_step):
    """A block of `rows` (a literal) x one vector's length, all of it there: no masks on the way in.

    target[k * target_step + r] = source[r * source_step + k] for r < rows, k < lanes.
    """
    count = _literal(rows)
    signature = types.void(rows, target, types.intp, source, types.intp)

    def codegen(context, builder, signature, args):
        _, target, target_step, source, source_step = args
        emit = _Emitter(builder, signature.args[1].dtype)
        for first in range(0, count, emit.lanes):
            height = min(emit.lanes, count - first)
            values = [emit.load(source, builder.mul(source_step, _I64(first + r))) for r in range(height)]
            values = _transposed(emit, values + [emit.zero] * (emit.lanes - height))
            within = ir.Constant(ir.VectorType(_I1, emit.lanes), [int(i < height) for i in range(emit.lanes)])
            for k, value in enumerate(values):
                at = builder.add(builder.mul(target_step, _I64(k)), _I64(first))
                if height == emit.lanes:
                    emit.store(value, target, at)
                else:
                    emit.masked_store(value, target, at, within)
        return context.get_dummy_value()

    return signature, codegen


@emitted
def copy_rows(source, at, step, rows, columns, target, target_at, target_step):
    """A rows x columns block of one matrix to another; behind the last column, zeros up to a whole vector."""
    width = lanes(source)
    whole = columns // width * width
    for i in range(rows):
        start, place = at + i * step, target_at + i * target_step
        for j in range(0, whole, width):
            copy_vector(address(target, place + j), address(source, start + j))
        if whole < columns:
            copy_lanes(1, 0, address(target, place + whole), address(source, start + whole), 0, columns - whole, 1)


@intrinsic(prefer_literal=True)
def transpose_rows(typingctx, rows, target, source, row_step):
    """target[k * rows + r] = source[r * row_step + k] for r < rows and one vector's length of k, without masks.

    rows: a literal, a power of two.
    """
    count = _literal(rows)
    signature = types.void(rows, target, source, types.intp)

    def codegen(context, builder, signature, args):
        _, target, source, row_step = args
        emit = _Emitter(builder, signature.args[1].dtype)
        values = [emit.load(source, builder.mul(row_step, _I64(r))) for r in range(count)]
        for i, value in enumerate(_transposed(emit, values)):
            emit.store(value, target, _I64(i * emit.lanes))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def transpose_square_to(typingctx, target, places, source, row_step):
    """target[places[k] + r] = source[r * row_step + k] for a square, one vector's length of rows r and of columns k.

    places: pointer to int64.
    """
    signature = types.void(target, places, source, types.intp)

    def codegen(context, builder, signature, args):
        target, places, source, row_step = args
        emit = _Emitter(builder, signature.args[0].dtype)
        values = [emit.load(source, builder.mul(row_step, _I64(r))) for r in range(emit.lanes)]
        for k, value in enumerate(_transposed(emit, values)):
            emit.store(value, target, builder.load(builder.gep(places, [_I64(k)])))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def transpose_part(typingctx, target, target_step, source, source_step, rows, columns):
    """target[k * target_step + r] = source[r * source_step + k] for r < rows, k < columns, at most a vector's length
    of each; nothing else is read.

    Rows of a target without gaps (target_step = rows) are stored whole where the next ones overwrite what is too much:
    a masked store costs AVX2 12 cycles.
    """
    signature = types.void(target, types.intp, source, types.intp, types.intp, types.intp)

    def codegen(context, builder, signature, args):
        target, target_step, source, source_step, rows, columns = args
        emit = _Emitter(builder, signature.args[0].dtype)
        mask, last = emit.mask(_I64(0), columns), builder.sub(rows, _I64(1))
        values = []
        for r in range(emit.lanes):  # rows beyond the last: that one again
            row = builder.select(builder.icmp_signed("<", _I64(r), last), _I64(r), last)
            values.append(emit.masked_load(source, builder.mul(source_step, row), mask))
        joined, end = builder.icmp_signed("==", target_step, rows), builder.append_basic_block("turned")
        for k, value in enumerate(_transposed(emit, values)):
            block = builder.append_basic_block("row")
            builder.cbranch(builder.icmp_signed("<", _I64(k), columns), block, end)
            builder.position_at_end(block)
            reach = builder.select(joined, builder.mul(builder.sub(columns, _I64(k)), rows), rows)
            emit.masked_store(value, target, builder.mul(target_step, _I64(k)), emit.mask(_I64(0), reach))
        builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return signature, codegen


# Sums that run side by side in `add_rows`: an addition takes 4 cycles, and two may start in each.
_CHAINS = 8


@intrinsic
def add_rows(typingctx, target, source, step, count):
    """target[l] += sum over k < count of source[k * step + l] for one vector of lanes l, in a fixed order."""
    signature = types.void(target, source, types.intp, types.intp)

    def codegen(context, builder, signature, args):
        target, source, step, count = args
        emit = _Emitter(builder, signature.args[0].dtype)
        first = [emit.load(target, _I64(0))] + [emit.zero] * (_CHAINS - 1)
        whole = builder.and_(count, _I64(-_CHAINS))
        sums = _emit_sums(emit, first, source, step, _I64(0), whole, _CHAINS)
        while len(sums) > 1:
            sums = [emit.add(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
        (total,) = _emit_sums(emit, sums, source, step, whole, count, 1)
        emit.store(total, target, _I64(0))
        return context.get_dummy_value()

    return signature, codegen


def _emit_sums(emit, first, source, step, start, end, chains):
    """first[i] + the rows start + i, start + i + chains, ... below end."""
    builder = emit.builder
    entry = builder.block
    loop, done = builder.append_basic_block("rows"), builder.append_basic_block("summed")
    builder.cbranch(builder.icmp_signed("<", start, end), loop, done)
    builder.position_at_end(loop)
    k = builder.phi(_I64)
    sums = [builder.phi(emit.vector) for _ in first]
    rows = [emit.load(source, builder.mul(builder.add(k, _I64(i)), step)) for i in range(chains)]
    after = [emit.add(total, row) for total, row in zip(sums, rows, strict=True)]
    following = builder.add(k, _I64(chains))
    for phi, before, value in zip([k, *sums], [start, *first], [following, *after], strict=True):
        phi.add_incoming(before, entry)
        phi.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", following, end), loop, done)
    builder.position_at_end(done)
    totals = [builder.phi(emit.vector) for _ in first]
    for phi, before, value in zip(totals, first, after, strict=True):
        phi.add_incoming(before, entry)
        phi.add_incoming(value, loop)
    return totals


@intrinsic
def reverse_row(typingctx, target, source, count):
    """target[i] = source[count - 1 - i] for i < count, in vectors; nothing else is read or written."""
    signature = types.void(target, source, types.intp)

    def codegen(context, builder, signature, args):
        target, source, count = args
        emit = _Emitter(builder, signature.args[0].dtype)
        backwards = ir.Constant(ir.VectorType(_I32, emit.lanes), list(range(emit.lanes - 1, -1, -1)))
        entry = builder.block
        loop, done = builder.append_basic_block("reverse"), builder.append_basic_block("reversed")
        builder.cbranch(builder.icmp_signed(">", count, _I64(0)), loop, done)
        builder.position_at_end(loop)
        i = builder.phi(_I64)
        left = builder.sub(count, i)
        first = builder.sub(left, _I64(emit.lanes))
        value = emit.masked_load(source, first, emit.mask(builder.neg(first), _I64(emit.lanes)))
        value = builder.shuffle_vector(value, value, backwards)
        emit.masked_store(value, target, i, emit.mask(_I64(0), left))
        following = builder.add(i, _I64(emit.lanes))
        i.add_incoming(_I64(0), entry)
        i.add_incoming(following, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return signature, codegen
