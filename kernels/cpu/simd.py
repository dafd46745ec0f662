"""Vector instructions: intrinsics that emit LLVM vector IR of the host's width, among them the GEMM micro-kernel.

Each intrinsic lives at module level and takes its tile shape as literal integers: an intrinsic made in a closure would
be a new object in every process, and no compiled kernel would ever be found in the cache. Pointers carry the element
type; the vector width in lanes follows from it and from the host's features, which are also part of Numba's cache key.

Addresses are not checked: the callers' index arithmetic is, by the tests around every tile edge.
"""

from functools import lru_cache

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import RequireLiteralValue, TypingError
from numba.core.imputils import impl_ret_borrowed
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

_I1, _I32, _I64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)


@lru_cache(maxsize=1)
def features() -> tuple[str, ...]:
    """The features Numba compiles for, e.g. "avx2", "avx512f", "neon"; respects NUMBA_CPU_FEATURES."""
    _, _, text = cpu_target.target_context.codegen().magic_tuple()  # pyright: ignore
    return tuple(part[1:] for part in text.split(",") if part.startswith("+"))


def _vector_bytes() -> int:
    if "avx512f" in features():
        return 64
    return 32 if "avx2" in features() else 16


VECTOR_BYTES = _vector_bytes()
# The register tile MR rows x NV vectors: MR * NV accumulators, NV vectors of B and one broadcast of A must fit in the
# vector registers. AVX-512 has 32 of them (14 * 2 + 2 + 1 = 31), AVX2 16 (6 * 2 + 2 + 1 = 15), NEON 32 (8 * 3 + 3 + 1).
MR, NV = {64: (14, 2), 32: (6, 2), 16: (8, 3)}[VECTOR_BYTES]
# The tile where the rows are output channels, which come in multiples of 8: 14 rows would waste 9 % of 64 channels.
CHANNEL_MR, CHANNEL_NV = {64: (8, 3), 32: (4, 3), 16: (8, 3)}[VECTOR_BYTES]


def lane_count(itemsize: int) -> int:
    return VECTOR_BYTES // itemsize


def _vector(element: types.Type) -> tuple[ir.Type, ir.Type, int]:
    """(LLVM element type, LLVM vector type, lanes) for a Numba scalar type."""
    bits = element.bitwidth  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(element, types.Float):
        scalar = ir.FloatType() if bits == 32 else ir.DoubleType()
    else:
        scalar = ir.IntType(bits)
    lanes = VECTOR_BYTES * 8 // bits
    return scalar, ir.VectorType(scalar, lanes), lanes


def _suffix(element: types.Type, lanes: int) -> str:
    kind = "f" if isinstance(element, types.Float) else "i"
    return f"v{lanes}{kind}{element.bitwidth}"  # pyright: ignore[reportAttributeAccessIssue]


def _literal(value) -> int:
    if not isinstance(value, types.IntegerLiteral):
        raise RequireLiteralValue("tile shapes must be literal integers")
    return value.literal_value


@intrinsic
def address(typingctx, array, offset):
    """A pointer to element `offset` of an array's memory (counted flat from its start)."""
    signature = types.CPointer(array.dtype)(array, types.intp)

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.gep(data, [args[1]])

    return signature, codegen


@intrinsic
def flat(typingctx, array):
    """The elements of a contiguous array in one dimension; where Numba compiles `reshape` anew, this is emitted.

    Numba does not know that it is the same array: in a kernel, hand it on, and store nothing into it.
    """
    if array.layout != "C":
        raise TypingError(f"{array} is not contiguous")
    result = types.Array(array.dtype, 1, "C")

    def codegen(context, builder, signature, args):
        old = context.make_array(signature.args[0])(context, builder, args[0])
        new = context.make_array(result)(context, builder)
        shape, strides = (cgutils.pack_array(builder, [length]) for length in (old.nitems, old.itemsize))
        populate_array(new, old.data, shape, strides, old.itemsize, old.meminfo, old.parent)
        return impl_ret_borrowed(context, builder, result, new._getvalue())

    return result(array), codegen


@intrinsic
def lanes(typingctx, array):
    """The number of elements of the array's dtype in one vector; a constant in the compiled code."""
    count = _vector(array.dtype)[2]

    def codegen(context, builder, signature, args):
        return ir.Constant(_I64, count)

    return types.intp(array), codegen


@intrinsic
def fused(typingctx, a, b, c):
    """a * b + c in one rounding, for floats; the compiler neither splits nor reorders it, whatever surrounds it."""
    signature = a(a, a, a)

    def codegen(context, builder, signature, args):
        return builder.fma(*args)

    return signature, codegen


@intrinsic
def square_root(typingctx, x):
    """The root of a float, which vectorises."""

    def codegen(context, builder, signature, args):
        return builder.call(builder.module.declare_intrinsic("llvm.sqrt", [args[0].type]), args)

    return x(x), codegen


def emit_prefetch(builder, pointer, locality: int = 3, write: bool = False):
    """Ask for the cache line there, which need not exist. locality: 3 for L1, 2 for L2."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.bitcast(pointer, byte), _I32(int(write)), _I32(locality), _I32(1)])


class _Emitter:
    """Vector loads, stores and arithmetic for one element type at the builder's current position."""

    def __init__(self, builder, element: types.Type):
        self.builder, self.element = builder, element
        self.scalar, self.vector, self.lanes = _vector(element)
        self.itemsize = element.bitwidth // 8  # pyright: ignore[reportAttributeAccessIssue]
        self.zero = ir.Constant(self.vector, None)

    def at(self, pointer, offset):
        """The address `offset` elements on, as a pointer to a vector."""
        return self.builder.bitcast(self.builder.gep(pointer, [offset]), self.vector.as_pointer())

    def load(self, pointer, offset):
        value = self.builder.load(self.at(pointer, offset))
        value.align = self.itemsize
        return value

    def store(self, value, pointer, offset):
        self.builder.store(value, self.at(pointer, offset)).align = self.itemsize

    def store_past(self, value, pointer, offset):
        """Past the caches; to an aligned place."""
        store = self.builder.store(value, self.at(pointer, offset))
        store.align = self.lanes * self.itemsize
        store.set_metadata("nontemporal", self.builder.module.add_metadata([_I32(1)]))

    def splat(self, value, count: int | None = None, scalar=None):
        vector = ir.VectorType(scalar or self.scalar, count or self.lanes)
        undefined = ir.Constant(vector, ir.Undefined)
        first = self.builder.insert_element(undefined, value, _I32(0))
        zeros = ir.Constant(ir.VectorType(_I32, vector.count), [0] * vector.count)
        return self.builder.shuffle_vector(first, undefined, zeros)

    def opaque(self, value):
        """The same integer or pointer, of which the compiler knows nothing any more."""
        kind = ir.FunctionType(value.type, [value.type])
        return self.builder.asm(kind, "", "=r,0", [value], side_effect=False)

    def multiply_add(self, a, b, c):
        """a * b + c in one rounding; for integers in two instructions."""
        if not isinstance(self.element, types.Float):
            return self.builder.add(self.builder.mul(a, b), c)
        name = f"llvm.fma.{_suffix(self.element, self.lanes)}"
        fma = cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(self.vector, [self.vector] * 3), name)
        return self.builder.call(fma, [a, b, c])

    def add(self, a, b):
        return self.builder.fadd(a, b) if isinstance(self.element, types.Float) else self.builder.add(a, b)

    def maximum(self, a, b):
        """a where a > b, else b, so that a NaN in b stays: one instruction on x86."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def minimum(self, a, b):
        """a where a < b, else b, so that a NaN in b stays."""
        return self.builder.select(self.builder.fcmp_ordered("<", a, b), a, b)

    def mask(self, low, high):
        """Lanes i with low <= i < high."""
        numbers = ir.VectorType(_I32, self.lanes)
        index = ir.Constant(numbers, list(range(self.lanes)))
        builder = self.builder
        # clamped first, so that bounds beyond 2**31 survive the narrowing
        low = builder.select(builder.icmp_signed(">", low, _I64(0)), low, _I64(0))
        high = builder.select(builder.icmp_signed("<", high, _I64(self.lanes)), high, _I64(self.lanes))
        low = builder.select(builder.icmp_signed("<", low, _I64(self.lanes)), low, _I64(self.lanes))
        high = builder.select(builder.icmp_signed(">", high, _I64(0)), high, _I64(0))
        lower = self.splat(builder.trunc(low, _I32), scalar=_I32)
        upper = self.splat(builder.trunc(high, _I32), scalar=_I32)
        return builder.and_(builder.icmp_signed(">=", index, lower), builder.icmp_signed("<", index, upper))

    def masked_load(self, pointer, offset, mask):
        """The lanes of the mask from memory, zero elsewhere; lanes outside the mask are not touched, nor can fault."""
        where = self.at(pointer, offset)
        name = f"llvm.masked.load.{_suffix(self.element, self.lanes)}.p0"
        kind = ir.FunctionType(self.vector, [where.type, _I32, ir.VectorType(_I1, self.lanes), self.vector])
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, [where, _I32(self.itemsize), mask, self.zero])

    def masked_store(self, value, pointer, offset, mask):
        """The lanes of the mask to memory. Ends in a new block where vectors are narrower than AVX-512's.

        There a whole vector goes without its mask: AVX2's masked store takes 12 cycles on Zen 3, a plain one takes 1.
        """
        if VECTOR_BYTES == 64:
            self._store_under(mask, value, pointer, offset)
            return
        bits = ir.IntType(self.lanes)
        whole = self.builder.icmp_signed("==", self.builder.bitcast(mask, bits), bits(-1))
        with self.builder.if_else(whole) as (then, otherwise):
            with then:
                self.store(value, pointer, offset)
            with otherwise:
                self._store_under(mask, value, pointer, offset)

    def _store_under(self, mask, value, pointer, offset):
        where = self.at(pointer, offset)
        name = f"llvm.masked.store.{_suffix(self.element, self.lanes)}.p0"
        kind = ir.FunctionType(ir.VoidType(), [self.vector, where.type, _I32, ir.VectorType(_I1, self.lanes)])
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        self.builder.call(function, [value, where, _I32(self.itemsize), mask])

    def masked_loads_if(self, condition, pointer, masks):
        """The neighbouring vectors from there on, each under its mask; zeros, unread, where not `condition`."""
        builder = self.builder
        before = builder.block
        with builder.if_then(condition):
            values = [self.masked_load(pointer, _I64(j * self.lanes), mask) for j, mask in enumerate(masks)]
            inside = builder.block
        results = [builder.phi(self.vector) for _ in masks]
        for result, value in zip(results, values, strict=True):
            result.add_incoming(self.zero, before)
            result.add_incoming(value, inside)
        return results

    def prefetch(self, pointer, locality: int, write: bool = False):
        emit_prefetch(self.builder, pointer, locality, write)


@intrinsic(prefer_literal=True)
def micro_kernel(typingctx, rows, vectors, a, a_step, b, b_step, depth, c, c_step, used_rows, used_columns, accumulate):
    """C[:used_rows, :used_columns] (+)= A B for one register tile of `rows` x (`vectors` * lanes).

    a: A's panel: element (i, k) at a[k * a_step + i]. Packed: a_step = rows.
    b: B's panel: row k at b[k * b_step], vectors * lanes long. Packed: b_step = that length.
    c: C's tile, its rows c_step apart. accumulate: 0 overwrites C, else the product is added to it.

    The accumulators stay in registers over the whole loop: per step `vectors` loads of B and `rows` broadcasts of A
    feed rows * vectors multiply-adds. A panel shorter than `rows` is padded by the packing; only the used part of the
    tile is stored.
    """
    shape = _literal(rows), _literal(vectors)
    signature = types.void(
        rows, vectors, a, types.intp, b, types.intp, types.intp, c, types.intp, types.intp, types.intp, types.intp
    )

    def codegen(context, builder, signature, args):
        _emit_micro_kernel(builder, signature.args[2].dtype, shape, args[2:])
        return context.get_dummy_value()

    return signature, codegen


def _emit_micro_kernel(builder, element, shape, args):
    rows, vectors = shape
    a, a_step, b, b_step, depth, c, c_step, used_rows, used_columns, accumulate = args
    emit = _Emitter(builder, element)
    entry = builder.block
    loop, done = builder.append_basic_block("depth"), builder.append_basic_block("product")
    builder.cbranch(builder.icmp_signed(">", depth, _I64(0)), loop, done)
    builder.position_at_end(loop)
    k = builder.phi(_I64)
    a_now, b_now = builder.phi(a.type), builder.phi(b.type)
    sums = [[builder.phi(emit.vector) for _ in range(vectors)] for _ in range(rows)]
    b_values = [emit.load(b_now, _I64(j * emit.lanes)) for j in range(vectors)]
    products = []
    for i in range(rows):
        value = emit.splat(builder.load(builder.gep(a_now, [_I64(i)])))
        products.append([emit.multiply_add(value, b_values[j], sums[i][j]) for j in range(vectors)])
    k_next = builder.add(k, _I64(1))
    a_next, b_next = builder.gep(a_now, [a_step]), builder.gep(b_now, [b_step])
    for phi, start, following in ((k, _I64(0), k_next), (a_now, a, a_next), (b_now, b, b_next)):
        phi.add_incoming(start, entry)
        phi.add_incoming(following, loop)
    for i in range(rows):
        for j in range(vectors):
            sums[i][j].add_incoming(emit.zero, entry)
            sums[i][j].add_incoming(products[i][j], loop)
    builder.cbranch(builder.icmp_signed("<", k_next, depth), loop, done)
    builder.position_at_end(done)
    tile = [[builder.phi(emit.vector) for _ in range(vectors)] for _ in range(rows)]
    for i in range(rows):
        for j in range(vectors):
            tile[i][j].add_incoming(emit.zero, entry)
            tile[i][j].add_incoming(products[i][j], loop)
    _emit_tile_store(emit, tile, c, c_step, used_rows, used_columns, accumulate)


def _emit_tile_store(emit, tile, c, c_step, used_rows, used_columns, accumulate):
    """Write the accumulators: whole tiles in straight-line code, edge tiles row by row under a mask."""
    builder = emit.builder
    rows, vectors = len(tile), len(tile[0])
    end = builder.append_basic_block("stored")
    whole_rows = builder.icmp_signed(">=", used_rows, _I64(rows))
    whole_columns = builder.icmp_signed(">=", used_columns, _I64(vectors * emit.lanes))
    whole, edge = builder.append_basic_block("whole"), builder.append_basic_block("edge")
    builder.cbranch(builder.and_(whole_rows, whole_columns), whole, edge)

    builder.position_at_end(whole)
    adding, storing = builder.append_basic_block("add"), builder.append_basic_block("store")
    builder.cbranch(builder.icmp_signed("!=", accumulate, _I64(0)), adding, storing)
    for block, add in ((adding, True), (storing, False)):
        builder.position_at_end(block)
        for i in range(rows):
            start = builder.mul(c_step, _I64(i))
            for j in range(vectors):
                offset = builder.add(start, _I64(j * emit.lanes))
                value = emit.add(tile[i][j], emit.load(c, offset)) if add else tile[i][j]
                emit.store(value, c, offset)
        builder.branch(end)

    builder.position_at_end(edge)
    masks = [emit.mask(_I64(0), builder.sub(used_columns, _I64(j * emit.lanes))) for j in range(vectors)]
    adding_mask = emit.splat(builder.icmp_signed("!=", accumulate, _I64(0)), scalar=_I1)
    for i in range(rows):
        row = builder.append_basic_block("edge_row")
        builder.cbranch(builder.icmp_signed("<", _I64(i), used_rows), row, end)
        builder.position_at_end(row)
        start = builder.mul(c_step, _I64(i))
        for j in range(vectors):
            offset = builder.add(start, _I64(j * emit.lanes))
            before = emit.masked_load(c, offset, builder.and_(masks[j], adding_mask))
            total = builder.select(adding_mask, emit.add(tile[i][j], before), tile[i][j])
            emit.masked_store(total, c, offset, masks[j])
    builder.branch(end)
    builder.position_at_end(end)


@intrinsic
def prefetch(typingctx, pointer):
    """Ask for the cache line there, which need not exist, into L2."""

    def codegen(context, builder, signature, args):
        emit_prefetch(builder, args[0], 2)
        return context.get_dummy_value()

    return types.void(pointer), codegen


@intrinsic
def settle_stores(typingctx):
    """Make stores that went past the caches visible to other threads."""

    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen
