"""A vector times a large matrix: memory is what takes the time, so B is read once, in the longest runs there are.

STREAMS rows of B pass side by side, whole up to COLUMNS, which the prefetchers follow; C stays in L1. On Zen 3 that
reads 27 GB/s, with runs of 4 KB 21, and with the register tile, which goes to the next row, pages away, after a line or
two, 13. Threads share the sum, not the columns: parts of it are summed apart and added up in order.
"""

from numba import prange, types
from numba.extending import intrinsic

from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.cpu.scratch import scratch
from tilewise.kernels.cpu.simd import _I64, _Emitter, _literal, address, lanes
from tilewise.kernels.cpu.vector_move import add_rows, copy_lanes

STREAMS = 8
# Columns of a chunk: 32 KB of C in float32.
COLUMNS = 8192
# Parts of the sum, and the fewest steps of one.
PARTS, FEWEST_STEPS = 4, 16 * STREAMS


@intrinsic(prefer_literal=True)
def add_scaled_rows(typingctx, rows, a, a_step, b, b_step, c, columns, accumulate):
    """C[j] (+)= sum over r < `rows` (a literal) of a[r * a_step] * b[r * b_step + j] for j < columns."""
    count = _literal(rows)
    signature = types.void(rows, a, types.intp, b, types.intp, c, *[types.intp] * 2)

    def codegen(context, builder, signature, args):
        _emit_scaled_rows(_Emitter(builder, signature.args[1].dtype), count, *args[1:])
        return context.get_dummy_value()

    return signature, codegen


def _emit_scaled_rows(emit, rows, a, a_step, b, b_step, c, columns, accumulate):
    builder = emit.builder
    factors = [emit.splat(builder.load(builder.gep(a, [builder.mul(a_step, _I64(r))]))) for r in range(rows)]
    starts = [emit.opaque(builder.gep(b, [builder.mul(b_step, _I64(r))])) for r in range(rows)]
    adding = builder.icmp_signed("!=", accumulate, _I64(0))
    whole = builder.and_(columns, _I64(-emit.lanes))

    def total(j, load):
        value = builder.select(adding, load(c, j), emit.zero)
        for factor, start in zip(factors, starts, strict=True):
            value = emit.multiply_add(factor, load(start, j), value)
        return value

    entry, loop, rest, masked, end = (
        builder.block, *(builder.append_basic_block(name) for name in ("columns", "rest", "masked", "added"))
    )  # fmt: skip
    builder.cbranch(builder.icmp_signed(">", whole, _I64(0)), loop, rest)
    builder.position_at_end(loop)
    j = builder.phi(_I64)
    emit.store(total(j, emit.load), c, j)
    following = builder.add(j, _I64(emit.lanes))
    j.add_incoming(_I64(0), entry)
    j.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, whole), loop, rest)
    builder.position_at_end(rest)
    builder.cbranch(builder.icmp_signed("<", whole, columns), masked, end)
    builder.position_at_end(masked)
    mask = emit.mask(_I64(0), builder.sub(columns, whole))
    emit.masked_store(total(whole, lambda pointer, at: emit.masked_load(pointer, at, mask)), c, whole, mask)
    builder.branch(end)
    builder.position_at_end(end)


@device()
def _stream(a, a_at, b, b_at, b_step, depth, c, c_at, columns):
    """C[:columns] = a[:depth] B."""
    whole = depth // STREAMS * STREAMS
    for k in range(0, whole, STREAMS):
        add_scaled_rows(
            STREAMS, address(a, a_at + k), 1, address(b, b_at + k * b_step), b_step, address(c, c_at), columns, k
        )  # fmt: skip
    for k in range(whole, depth):
        add_scaled_rows(1, address(a, a_at + k), 1, address(b, b_at + k * b_step), b_step, address(c, c_at), columns, k)


@kernel()
def multiply_vector(a, b, c, geometry):
    """C = a B for one row a, the sum in parts of `part` steps; called as `multiply_in_place`."""
    n, depth, chunk_columns, part = geometry[0], geometry[1], geometry[2], geometry[3]
    flat = c.reshape(c.size)
    across, count, width = (n + chunk_columns - 1) // chunk_columns, (depth + part - 1) // part, lanes(flat)
    step = (n + width - 1) // width * width  # rows of whole vectors
    sums = scratch(count * step, flat)
    for task in prange(across * count):
        j0, k0 = task % across * chunk_columns, task // across * part
        columns = min(chunk_columns, n - j0)
        _stream(a, k0, b, k0 * n + j0, n, min(part, depth - k0), sums, task // across * step + j0, columns)
    for j in range(0, n, width):
        add_rows(address(sums, j), address(sums, step + j), step, count - 1)
        copy_lanes(1, 1, address(flat, j), address(sums, j), 0, n - j, 1)
