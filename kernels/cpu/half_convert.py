"""float16 to float32 and back, in vectors.

Numba has no float16, so arrays come as their 16-bit patterns. Processors convert a whole vector in one instruction
(F16C and AVX-512 on x86, NEON); elsewhere LLVM would call a C function that Numba does not have, and integer arithmetic
gives the same bits: round to nearest, ties to even, with subnormals, infinities and NaN.
"""

from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from tilewise.kernels.cpu.jit import kernel
from tilewise.kernels.cpu.simd import VECTOR_BYTES, address, features

HARDWARE = any(name in features() for name in ("f16c", "avx512f", "neon"))
CHUNK = 16384  # elements converted by one chunk: 64 kB of float32
LANES = VECTOR_BYTES // 4


def _of(scalar, width: int):
    return ir.VectorType(scalar, width) if width > 1 else scalar


def _integer(value: int, width: int):
    return ir.Constant(_of(ir.IntType(32), width), [value] * width if width > 1 else value)


def widen_vector(builder, bits, width):
    """float32 from the bits of float16."""
    single = _of(ir.FloatType(), width)
    if HARDWARE:
        return builder.fpext(builder.bitcast(bits, _of(ir.HalfType(), width)), single)
    wide = builder.zext(bits, _of(ir.IntType(32), width))
    size = builder.and_(wide, _integer(0x7FFF, width))
    sign = builder.shl(builder.and_(wide, _integer(0x8000, width)), _integer(16, width))
    shifted = builder.shl(size, _integer(13, width))
    normal = builder.add(shifted, _integer(112 << 23, width))  # the exponents' biases: 127 - 15
    quiet = builder.select(
        builder.icmp_signed(">", size, _integer(0x7C00, width)), _integer(0x400000, width), _integer(0, width)
    )
    special = builder.or_(builder.or_(shifted, _integer(0x7F800000, width)), quiet)
    unit = ir.Constant(single, [2.0**-24] * width if width > 1 else 2.0**-24)
    subnormal = builder.bitcast(builder.fmul(builder.sitofp(size, single), unit), wide.type)
    result = builder.select(builder.icmp_signed(">=", size, _integer(0x7C00, width)), special, normal)
    result = builder.select(builder.icmp_signed("<", size, _integer(0x400, width)), subnormal, result)
    return builder.bitcast(builder.or_(result, sign), single)


def narrow_vector(builder, value, width):
    """The bits of the nearest float16, of two equally near the even one."""
    half = _of(ir.IntType(16), width)
    if HARDWARE:
        return builder.bitcast(builder.fptrunc(value, _of(ir.HalfType(), width)), half)
    bits = builder.bitcast(value, _of(ir.IntType(32), width))
    size = builder.and_(bits, _integer(0x7FFFFFFF, width))
    sign = builder.and_(builder.lshr(bits, _integer(16, width)), _integer(0x8000, width))
    # Normal numbers: add just less than half of the last kept bit, and one more where that bit is odd.
    rebiased = builder.sub(size, _integer(112 << 23, width))
    odd = builder.and_(builder.lshr(rebiased, _integer(13, width)), _integer(1, width))
    normal = builder.lshr(builder.add(builder.add(rebiased, _integer(0xFFF, width)), odd), _integer(13, width))
    # Subnormal ones: the last place of 0.5 in float32 is 2^-24, the last place wanted, so that an addition rounds.
    point = ir.Constant(value.type, [0.5] * width if width > 1 else 0.5)
    sum_ = builder.bitcast(builder.fadd(builder.bitcast(size, value.type), point), bits.type)
    subnormal = builder.sub(sum_, _integer(0x3F000000, width))
    payload = builder.and_(builder.lshr(size, _integer(13, width)), _integer(0x3FF, width))
    nan = builder.or_(payload, _integer(0x7E00, width))
    result = builder.select(builder.icmp_signed("<", size, _integer(0x38800000, width)), subnormal, normal)
    # from 65520 on, half a step beyond the largest float16, infinity
    infinite = builder.icmp_signed(">=", size, _integer(0x477FF000, width))
    result = builder.select(infinite, _integer(0x7C00, width), result)
    result = builder.select(builder.icmp_signed(">", size, _integer(0x7F800000, width)), nan, result)
    return builder.trunc(builder.or_(result, sign), half)


def _run(target, source, convert):
    """An intrinsic's body: target[i] = convert(source[i]) for i < count, in whole vectors, then one by one."""
    signature = types.void(target, source, types.intp)

    def codegen(context, builder, signature, args):
        target, source, count = args
        word = ir.IntType(64)
        whole = builder.and_(count, word(-LANES))
        for first, last, width in ((word(0), whole, LANES), (whole, count, 1)):
            entry = builder.block
            body, end = builder.append_basic_block("convert"), builder.append_basic_block("converted")
            builder.cbranch(builder.icmp_signed("<", first, last), body, end)
            builder.position_at_end(body)
            i = builder.phi(word)
            read, write = (
                builder.bitcast(builder.gep(pointer, [i]), _of(pointer.type.pointee, width).as_pointer())
                for pointer in (source, target)
            )
            value = builder.load(read, align=2)
            builder.store(convert(builder, value, width), write, align=2)
            following = builder.add(i, word(width))
            i.add_incoming(first, entry)
            i.add_incoming(following, body)
            builder.cbranch(builder.icmp_signed("<", following, last), body, end)
            builder.position_at_end(end)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _convert_run(typingctx, target, source, count):
    """Which way follows from the types: bits are float16."""
    return _run(target, source, widen_vector if source.dtype == types.uint16 else narrow_vector)


@kernel()
def convert(source, source_start, source_step, target, target_start, target_step, rows, length):
    """Rows of `length` elements, each array's from its `start` on and `step` apart: float16 bits to float32, or back.

    A chunk owns some blocks, of at most CHUNK elements of one row.
    """
    blocks = (length + CHUNK - 1) // CHUNK
    group = CHUNK // length + 1
    for chunk in prange((rows * blocks + group - 1) // group):
        for unit in range(chunk * group, min(chunk * group + group, rows * blocks)):
            row = unit // blocks
            first = (unit - row * blocks) * CHUNK
            count = min(CHUNK, length - first)
            written = address(target, target_start + row * target_step + first)
            _convert_run(written, address(source, source_start + row * source_step + first), count)
