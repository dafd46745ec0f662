"""Elementary functions and activations that vectorise, for kernels to inline into their last pass over a result.

libm's exp is an opaque call for LLVM: a loop around it stays scalar. Here exp is written in operations that exist for
whole vectors (fused multiply-add, a shift, selections), so that every loop over it becomes vector code:

    exp(x) = 2^n e^r,   n = round(x / ln 2),   r = x - n ln 2  in [-0.347, 0.347]

- n comes from adding 1.5 * 2^23 (float64: 2^52), which leaves round(x / ln 2) in the low bits of the sum; with the
  exponent's bias added to the constant, a shift of the sum's bits gives 2^n.
- ln 2 is split into a short head, whose products with n are exact, and a tail (Cody and Waite 1980).
- e^r - 1 is a polynomial, long enough that the remainder is far below half a unit in the last place. For float32 it is
  r + r^2 P(r), the P of degree 4 with the smallest error relative to e^r, 3e-9 (Taylor's needs degree 5 for 5e-9); its
  terms are paired (Estrin 1960), as the chain of operations, not their number, is what these loops wait for: a
  processor's schedulers hold two or three vectors' worth. For float64, Taylor's: 0.347^14 / 14! = 4e-18.

These functions are compiled without reassociation, which would cancel the additions above.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import float32, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from tilewise.kernels.cpu.emitted import emitted
from tilewise.kernels.cpu.epilogue_vector import ACTIVATION_CODES as ACTIVATION_CODES
from tilewise.kernels.cpu.epilogue_vector import (
    BOUNDED,
    DOUBLE,
    DOUBLE_RANGE,
    LEAKY_SLOPE,
    SINGLE,
    SINGLE_RANGE,
    activate_run,
)
from tilewise.kernels.cpu.jit import EXACT_ORDER, device
from tilewise.kernels.cpu.simd import address


def _prefer_widest_vectors(typing_context):
    """Let the loops of the function that calls this use 512-bit vectors where the processor has them.

    LLVM keeps to 256 bits otherwise, because the first AVX-512 processors lowered their clock for more. That is right
    for loops that wait for memory; a loop over exp gains a fifth to a half from the full width. The attribute has to
    be on the function that contains the loop: Numba optimises each function before it inlines it.
    """

    def generate(context, builder, signature, arguments):
        # llvmlite refuses attributes that it does not know; its own set prints any.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), generate


prefer_widest_vectors: Any = intrinsic(_prefer_widest_vectors)


def _shift_into_exponent(typing_context, x):
    """The float whose sign and exponent are x's lowest bits and whose mantissa is 0: a shift of the bits."""
    integer, shift = (ir.IntType(32), 23) if x == float32 else (ir.IntType(64), 52)

    def generate(context, builder, signature, arguments):
        bits = builder.bitcast(arguments[0], integer)
        return builder.bitcast(builder.shl(bits, integer(shift)), arguments[0].type)

    return x(x), generate


_low_bits_as_exponent: Any = intrinsic(_shift_into_exponent)


def _emit_maximum(typing_context, a, b):
    """The larger of two floats of one type, NaN if either is: the form of which LLVM vectorises a running maximum."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(arguments[0].type, [arguments[0].type] * 2)
        name = f"llvm.maximum.f{signature.return_type.bitwidth}"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(function, arguments, fastmath=("nsz",))

    return a(a, a), generate


maximum: Any = intrinsic(_emit_maximum)


def _expm1_parts(x) -> Any:
    """(e^r - 1, 2^n) of an x whose exponential is a normal number; a NaN stays in the first part."""
    raise NotImplementedError("for compiled code only")


def _single():
    (biased, per_ln2, head, tail), (c2, c3, c4, c5, c6) = (map(np.float32, numbers) for numbers in SINGLE)

    def parts(x):
        shifted = x * per_ln2 + biased
        n = shifted - biased
        r = (x - n * head) - n * tail
        square = r * r
        q = ((c6 * square) + (c5 * r + c4)) * square + (c3 * r + c2)
        return q * square + r, _low_bits_as_exponent(shifted)

    return parts


def _double():
    (biased, per_ln2, head, tail), (c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13) = DOUBLE

    def parts(x):
        shifted = x * per_ln2 + biased
        n = shifted - biased
        r = (x - n * head) - n * tail
        q = (((((c13 * r + c12) * r + c11) * r + c10) * r + c9) * r + c8) * r + c7
        q = ((((q * r + c6) * r + c5) * r + c4) * r + c3) * r + c2
        return q * r * r + r, _low_bits_as_exponent(shifted)

    return parts


@overload(_expm1_parts, jit_options={"fastmath": set(EXACT_ORDER), "error_model": "numpy"})
def _overload_expm1_parts(x):
    return _single() if x == float32 else _double()


@device(fastmath=EXACT_ORDER)
def exp(x):
    """e^x in float32 or float64 to about 1 unit in the last place; NaN stays NaN.

    0 where the result would lie below the normal range, inf from 2^127.5 (float64: 2^1023.5) on.
    """
    lowest, highest = _exp_range(x)
    x = lowest if x < lowest else x
    x = highest if x > highest else x
    q, scale = _expm1_parts(x)
    return (q + type(x)(1)) * scale


def _exp_range(x) -> Any:
    """Arguments at which the exponential is already 0 and already infinite."""
    raise NotImplementedError("for compiled code only")


@overload(_exp_range)
def _overload_exp_range(x):
    lowest, highest = (map(np.float32, SINGLE_RANGE)) if x == float32 else DOUBLE_RANGE
    limits = lowest, highest
    return lambda x: limits


@device(fastmath=EXACT_ORDER)
def sigmoid(x):
    """1 / (1 + e^-x), to 2.5 units in the last place; an e^-x that overflows gives 0, as it should.

    By e^-|x| and a selection, and with e^r in Taylor's chain, a loop took 1.27 times as long (tanh: 1.2 times).
    """
    one = type(x)(1)
    return one / (one + exp(-x))


@device(fastmath=EXACT_ORDER)
def tanh(x):
    """(e^2x - 1) / (e^2x + 1), to 2.5 units in the last place: the numerator is computed without cancellation."""
    one, two = type(x)(1), type(x)(2)
    far = type(x)(20)  # e^-40 is nothing beside 1
    x = -far if x < -far else x
    x = far if x > far else x
    q, scale = _expm1_parts(two * x)
    expm1 = q * scale + (scale - one)
    return expm1 / (two + expm1)


@device()
def relu(x):
    """max(x, 0); NaN stays NaN."""
    return type(x)(0) if x < 0 else x


@device()
def relu6(x):
    """min(max(x, 0), 6); NaN stays NaN."""
    return type(x)(6) if x > 6 else relu(x)


@device()
def leaky_relu(x, slope):
    """x where positive, else slope * x."""
    return x if x > 0 else x * type(x)(slope)


@device()
def apply_activation(value, code):
    """The activation with this code of ACTIVATION_CODES, of one number; for a whole row, see `activate_row`."""
    if code == 1:
        return relu(value)
    if code == 2:
        return relu6(value)
    if code == 3:
        return leaky_relu(value, LEAKY_SLOPE)
    if code == 4:
        return sigmoid(value)
    if code == 5:
        return tanh(value)
    return value


@emitted
def bounds_of(code):
    """What `register_tile.Bounds` knows of an activation."""
    return code if code <= BOUNDED else 0


@device(fastmath=EXACT_ORDER)
def activate_row(flat, start, count, code):
    """Apply an activation in place to flat[start : start + count] of a contiguous 1-D array."""
    activate_run(address(flat, start), count, code)
