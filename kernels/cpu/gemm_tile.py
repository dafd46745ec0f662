"""The register tiles of the matrix products: intrinsics that emit one tile's whole sum as LLVM vector IR.

- `multiply_tile` has vectors along the columns of the result: B is read by rows, A's elements are broadcast from
  wherever they lie (packed or in place, by rows or by columns).
- `multiply_packed_tile` does the same where both operands are packed.
- `dot_tile` has vectors along the sum: for operands that both run along it (x and a dense layer's weight), which would
  otherwise have to be transposed.

As in simd.py, addresses are not checked, and tile shapes are literals.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tilewise.kernels.cpu.simd import _I32, _I64, VECTOR_BYTES, _emit_tile_store, _Emitter, _literal

_I8 = ir.IntType(8)
DOT_AHEAD = 2048  # bytes
# While B comes from memory, its lines are asked for so many steps ahead: 16 * 14 cycles are 60 ns.
PREFETCHED_ROWS = 16
# Steps of the packed tile's loop in one round: with one, a quarter of the instructions would move pointers.
UNROLLED = 4


@intrinsic
def beyond(typingctx, pointer, offset):
    """The pointer to what lies `offset` elements further. A pointer is one argument; an array is seven."""

    def codegen(context, builder, signature, args):
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.intp), codegen


@intrinsic(prefer_literal=True)
def multiply_tile(
    typingctx, rows, vectors, masked, a, a_row, a_column, b, b_step, depth, c, c_step, used_rows, used_columns,
    accumulate,
):  # fmt: skip
    """C[:used_rows, :used_columns] (+)= A B for one register tile of `rows` x (`vectors` * lanes).

    a: element (i, k) at a[i * a_row + k * a_column]; all `rows` rows are read.
    b: row k at b[k * b_step]. masked: 0 reads vectors * lanes of it, 1 only used_columns.
    c: the tile's rows are c_step apart. accumulate: 0 overwrites C, else the product is added to it.
    """
    shape = _literal(rows), _literal(vectors), _literal(masked)
    signature = types.void(rows, vectors, masked, a, types.intp, types.intp, b, *[types.intp] * 2, c, *[types.intp] * 4)

    def codegen(context, builder, signature, args):
        _emit_multiply_tile(builder, signature.args[3].dtype, shape, args[3:])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def multiply_and_pack_tile(
    typingctx, rows, vectors, a, a_row, a_column, b, b_step, depth, c, c_step, accumulate, panel
):  # fmt: skip
    """The same for a whole tile, which also copies what it reads of B to `panel`, a row of the tile after another.

    So the way from memory is hidden behind the multiplications of the first tile that needs a panel.
    """
    shape = _literal(rows), _literal(vectors), 0
    signature = types.void(rows, vectors, a, types.intp, types.intp, b, *[types.intp] * 2, c, *[types.intp] * 2, panel)

    def codegen(context, builder, signature, args):
        *operands, accumulate, panel = args[2:]
        emit = _Emitter(builder, signature.args[2].dtype)
        whole = _I64(shape[0]), _I64(shape[1] * emit.lanes)
        _emit_multiply_tile(builder, emit.element, shape, (*operands, *whole, accumulate), panel)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def multiply_packed_tile(
    typingctx, rows, vectors, a, b, depth, wanted, wanted_step, c, c_step, used_rows, used_columns, accumulate
):  # fmt: skip
    """The same for panels that lie in the order in which the tile reads them: all addresses are one of two pointers.

    a, b: element (i, k) at a[k * rows + i], row k at b[k * vectors * lanes]. depth: a multiple of UNROLLED.
    wanted: every UNROLLED steps a line is asked for, from there on, wanted_step apart: what will be packed next.
    """
    shape = _literal(rows), _literal(vectors)
    signature = types.void(rows, vectors, a, b, types.intp, wanted, types.intp, c, *[types.intp] * 4)

    def codegen(context, builder, signature, args):
        a, b, depth, wanted, wanted_step, *target = args[2:]
        emit = _Emitter(builder, signature.args[2].dtype)
        _emit_tile_store(emit, _packed_sums(emit, shape, a, b, depth, wanted, wanted_step), *target)
        return context.get_dummy_value()

    return signature, codegen


def _packed_sums(emit, shape, a, b, depth, wanted, wanted_step):
    builder, (rows, vectors) = emit.builder, shape
    zeros = [[emit.zero] * vectors for _ in range(rows)]
    entry = builder.block
    loop, done = builder.append_basic_block("depth"), builder.append_basic_block("product")
    builder.cbranch(builder.icmp_signed(">", depth, _I64(0)), loop, done)
    builder.position_at_end(loop)
    k, a_now, b_now, wanted_now = (builder.phi(kind) for kind in (_I64, a.type, b.type, wanted.type))
    sums = [[builder.phi(emit.vector) for _ in range(vectors)] for _ in range(rows)]
    total = sums
    emit.prefetch(wanted_now, 2)
    for step in range(UNROLLED):
        rights = [emit.load(b_now, _I64((step * vectors + j) * emit.lanes)) for j in range(vectors)]
        lefts = (emit.splat(builder.load(builder.gep(a_now, [_I64(step * rows + i)]))) for i in range(rows))
        total = [
            [emit.multiply_add(left, right, value) for right, value in zip(rights, row, strict=True)]
            for left, row in zip(lefts, total, strict=True)
        ]
    following = builder.add(k, _I64(UNROLLED))
    a_next = builder.gep(a_now, [_I64(UNROLLED * rows)])
    b_next = builder.gep(b_now, [_I64(UNROLLED * vectors * emit.lanes)])
    wanted_next = builder.gep(wanted_now, [wanted_step])
    phis = (k, _I64(0), following), (a_now, a, a_next), (b_now, b, b_next), (wanted_now, wanted, wanted_next)
    for phi, start, value in phis:
        phi.add_incoming(start, entry)
        phi.add_incoming(value, loop)
    _close_sums(sums, zeros, total, entry, loop)
    builder.cbranch(builder.icmp_signed("<", following, depth), loop, done)
    builder.position_at_end(done)
    return _merged(builder, emit.vector, (zeros, entry), (total, loop))


@intrinsic(prefer_literal=True)
def prefetch_tile(typingctx, rows, vectors, c, c_step):
    """Ask for a tile of C before its sums are formed: into L2, as its rows may share a few places of L1."""
    shape = _literal(rows), _literal(vectors)
    signature = types.void(rows, vectors, c, types.intp)

    def codegen(context, builder, signature, args):
        c, c_step = args[2:]
        emit = _Emitter(builder, signature.args[2].dtype)
        for i in range(shape[0]):
            row = builder.gep(c, [builder.mul(c_step, _I64(i))])
            for j in range(shape[1]):
                emit.prefetch(builder.gep(row, [_I64(j * emit.lanes)]), 2)
        return context.get_dummy_value()

    return signature, codegen


class _Rows:
    """Where `count` rows, `step` elements apart, lie, in few registers: four rows share a pointer that moves on.

    row 4 g + r is at pointer g + r * step, r < 4: the addressing modes of x86 reach 1 and 2 steps, a register holds 3.
    With AVX2 the steps are hidden from the compiler, which would walk from row to row otherwise: a chain of additions
    that is as long as the multiply-adds of a step, so that no load could run ahead of them. (For AVX-512's 14 rows it
    then keeps 14 pointers, some of them in memory; not measured.)
    """

    def __init__(self, emit, base, step, count):
        builder = emit.builder
        self.emit, self.kind = emit, base.type
        step = builder.mul(step, _I64(emit.itemsize))
        hidden = emit.opaque if VECTOR_BYTES == 32 else lambda value: value
        one, three = hidden(step), hidden(builder.mul(step, _I64(3)))
        self.steps = [_I64(0), one, builder.mul(one, _I64(2)), three]
        base = builder.bitcast(base, _I8.as_pointer())
        four = builder.mul(step, _I64(4))
        self.bases = [base]
        for _ in range(4, count, 4):
            self.bases.append(hidden(builder.gep(self.bases[-1], [four])))
        self.now = self.bases

    def enter_loop(self, entry):
        builder = self.emit.builder
        self.now = [builder.phi(_I8.as_pointer()) for _ in self.bases]
        for phi, base in zip(self.now, self.bases, strict=True):
            phi.add_incoming(base, entry)

    def close_loop(self, stride, loop):
        """At the end of the loop's block: every pointer moves by `stride` bytes."""
        for phi in self.now:
            phi.add_incoming(self.emit.builder.gep(phi, [stride]), loop)

    def pointer(self, row, kind=None):
        builder = self.emit.builder
        place = builder.gep(self.now[row // 4], [self.steps[row % 4]])
        return place if kind is _I8 else builder.bitcast(place, self.kind)


def _emit_multiply_tile(builder, element, shape, args, panel=None):
    rows, vectors, masked = shape
    a, a_row, a_column, b, b_step, depth, c, c_step, used_rows, used_columns, accumulate = args
    emit = _Emitter(builder, element)
    masks = [emit.mask(_I64(0), builder.sub(used_columns, _I64(j * emit.lanes))) for j in range(vectors * masked)]
    places = _Rows(emit, a, a_row, rows)
    stride = builder.mul(a_column, _I64(emit.itemsize))
    entry = builder.block
    loop, done = builder.append_basic_block("depth"), builder.append_basic_block("product")
    builder.cbranch(builder.icmp_signed(">", depth, _I64(0)), loop, done)
    builder.position_at_end(loop)
    places.enter_loop(entry)
    k, b_now = builder.phi(_I64), builder.phi(b.type)
    sums = [[builder.phi(emit.vector) for _ in range(vectors)] for _ in range(rows)]
    offsets = [_I64(j * emit.lanes) for j in range(vectors)]
    if masked:
        b_values = [emit.masked_load(b_now, at, mask) for at, mask in zip(offsets, masks, strict=True)]
    else:
        b_values = [emit.load(b_now, at) for at in offsets]
    if panel is not None:
        ahead = builder.gep(b_now, [builder.mul(b_step, _I64(PREFETCHED_ROWS))])
        for at, value in zip(offsets, b_values, strict=True):
            emit.store(value, panel, builder.add(builder.mul(k, _I64(vectors * emit.lanes)), at))
            emit.prefetch(builder.gep(ahead, [at]), 2)
    products = []
    for i in range(rows):
        value = emit.splat(builder.load(places.pointer(i)))
        products.append([emit.multiply_add(value, b_values[j], sums[i][j]) for j in range(vectors)])
    k_next, b_next = builder.add(k, _I64(1)), builder.gep(b_now, [b_step])
    places.close_loop(stride, loop)
    for phi, start, following in ((k, _I64(0), k_next), (b_now, b, b_next)):
        phi.add_incoming(start, entry)
        phi.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", k_next, depth), loop, done)
    builder.position_at_end(done)
    zeros = [[emit.zero] * vectors for _ in range(rows)]
    _close_sums(sums, zeros, products, entry, loop)
    tile = _merged(builder, emit.vector, (zeros, entry), (products, loop))
    _emit_tile_store(emit, tile, c, c_step, used_rows, used_columns, accumulate)


@intrinsic(prefer_literal=True)
def dot_tile(typingctx, rows, columns, a, a_step, b, b_step, depth, c, c_step, accumulate):
    """C[i, j] (+)= the dot product of row i of a and row j of b, for i < `rows`, j < `columns` (literals).

    a, b: rows a_step and b_step apart, contiguous along the sum. c: element (i, j) at c[i * c_step + j].
    Every pair has a vector of partial sums; at the end a tree of shuffles and additions adds up the lanes of a whole
    vector's length of pairs at once. b's rows are prefetched a little ahead, into L2: past the end of a page, where the
    processor's own prefetcher stops. (Asking for the rows behind this tile instead makes 8 x 2048 times 1000 x 2048
    take 0.4 ms on Zen 4 instead of 0.31, and 0.7 or more in one process of three, for a reason that was not found.)
    """
    shape = _literal(rows), _literal(columns)
    signature = types.void(rows, columns, a, types.intp, b, *[types.intp] * 2, c, *[types.intp] * 2)

    def codegen(context, builder, signature, args):
        _emit_dot_tile(builder, signature.args[2].dtype, shape, args[2:])
        return context.get_dummy_value()

    return signature, codegen


def _emit_dot_tile(builder, element, shape, args):
    rows, columns = shape
    a, a_step, b, b_step, depth, c, c_step, accumulate = args
    emit = _Emitter(builder, element)
    left, right = _Rows(emit, a, a_step, rows), _Rows(emit, b, b_step, columns)
    whole = builder.and_(depth, _I64(-emit.lanes))
    sums = [[emit.zero] * columns for _ in range(rows)]

    entry = builder.block
    loop, rest = builder.append_basic_block("depth"), builder.append_basic_block("rest")
    builder.cbranch(builder.icmp_signed(">", whole, _I64(0)), loop, rest)
    builder.position_at_end(loop)
    left.enter_loop(entry)
    right.enter_loop(entry)
    k = builder.phi(_I64)
    before = [[builder.phi(emit.vector) for _ in range(columns)] for _ in range(rows)]
    for j in range(columns):
        emit.prefetch(builder.gep(right.pointer(j, _I8), [_I64(DOT_AHEAD)]), 2)
    after = _add_products(emit, left, right, before, lambda place: emit.load(place, _I64(0)))
    following = builder.add(k, _I64(emit.lanes))
    k.add_incoming(_I64(0), entry)
    k.add_incoming(following, loop)
    left.close_loop(_I64(emit.lanes * emit.itemsize), loop)
    right.close_loop(_I64(emit.lanes * emit.itemsize), loop)
    builder.cbranch(builder.icmp_signed("<", following, whole), loop, rest)
    _close_sums(before, sums, after, entry, loop)

    builder.position_at_end(rest)
    sums = _merged(builder, emit.vector, (sums, entry), (after, loop))
    masked, total = builder.append_basic_block("masked"), builder.append_basic_block("total")
    builder.cbranch(builder.icmp_signed("<", whole, depth), masked, total)
    builder.position_at_end(masked)
    mask = emit.mask(_I64(0), builder.sub(depth, whole))
    ends = _Rows(emit, builder.gep(a, [whole]), a_step, rows), _Rows(emit, builder.gep(b, [whole]), b_step, columns)
    with_rest = _add_products(emit, *ends, sums, lambda place: emit.masked_load(place, _I64(0), mask))
    masked = builder.block
    builder.branch(total)
    builder.position_at_end(total)
    sums = _merged(builder, emit.vector, (sums, rest), (with_rest, masked))
    _store_totals(emit, sums, c, c_step, accumulate)


def _add_products(emit, left, right, sums, load):
    rights = [load(right.pointer(j)) for j in range(len(sums[0]))]
    result = []
    for i, row in enumerate(sums):
        value = load(left.pointer(i))
        result.append([emit.multiply_add(value, other, sum_) for other, sum_ in zip(rights, row, strict=True)])
    return result


def _close_sums(phis, first, following, entry, loop):
    for row, before, after in zip(phis, first, following, strict=True):
        for phi, start, value in zip(row, before, after, strict=True):
            phi.add_incoming(start, entry)
            phi.add_incoming(value, loop)


def _merged(builder, kind, *ways):
    """Phis of the same grid of values as it comes from several blocks: (values, block) each."""
    grid = [[builder.phi(kind) for _ in row] for row in ways[0][0]]
    for values, block in ways:
        for phis, row in zip(grid, values, strict=True):
            for phi, value in zip(phis, row, strict=True):
                phi.add_incoming(value, block)
    return grid


def _store_totals(emit, sums, c, c_step, accumulate):
    builder = emit.builder
    rows, columns = len(sums), len(sums[0])
    flat = [value for row in sums for value in row]
    flat += [emit.zero] * (-len(flat) % emit.lanes)
    totals = [_lane_totals(emit, flat[i : i + emit.lanes]) for i in range(0, len(flat), emit.lanes)]
    # vectors of `columns` lanes: AVX2's masked store takes 12 cycles on Zen 3
    kind = ir.VectorType(emit.scalar, columns).as_pointer()
    places = [builder.bitcast(builder.gep(c, [builder.mul(c_step, _I64(i))]), kind) for i in range(rows)]
    adding, storing, end = (builder.append_basic_block(name) for name in ("add", "store", "stored"))
    builder.cbranch(builder.icmp_signed("!=", accumulate, _I64(0)), adding, storing)
    for block, add in ((adding, True), (storing, False)):
        builder.position_at_end(block)
        for i, place in enumerate(places):
            values = _picked(emit, totals, i * columns, columns)
            values = emit.add(values, builder.load(place, align=emit.itemsize)) if add else values
            builder.store(values, place, align=emit.itemsize)
        builder.branch(end)
    builder.position_at_end(end)


def _picked(emit, vectors, first, count):
    """Numbers first .. first + count of the concatenated vectors."""
    one = first // emit.lanes
    other = min(one + 1, len(vectors) - 1)
    order = [first - one * emit.lanes + i for i in range(count)]
    numbers = ir.Constant(ir.VectorType(_I32, count), order)
    return emit.builder.shuffle_vector(vectors[one], vectors[other], numbers)


def _lane_totals(emit, values):
    """The vector whose lane i is the sum of the lanes of values[i].

    Halving: two vectors a, b become one whose lanes alternate between a's and b's partial sums in runs of `run` lanes.
    """
    count, run = emit.lanes, 1
    numbers = ir.VectorType(_I32, count)
    while run < count:
        low = [(i if i & run == 0 else i - run + count) for i in range(count)]
        high = [(i + run if i & run == 0 else i + count) for i in range(count)]
        pairs = zip(values[::2], values[1::2], strict=True)
        shuffle = emit.builder.shuffle_vector
        values = [
            emit.add(shuffle(a, b, ir.Constant(numbers, low)), shuffle(a, b, ir.Constant(numbers, high)))
            for a, b in pairs
        ]
        run *= 2
    return values[0]
