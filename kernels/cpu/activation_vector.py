"""Elementwise activations that are a comparison or two, and all gradients, in explicit vectors (vector_pass.py).

They wait for memory, so what counts is how results are written: in whole aligned vectors, and a result that no cache
holds until it is read past the caches, so that its memory is not read first.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tilewise.kernels.cpu.simd import _I64
from tilewise.kernels.cpu.vector_pass import emitted

RELU, LEAKY_RELU, SIGMOID, TANH, STEP, SIGN = range(1, 7)


def _ordered(emit, sign, x):
    return emit.builder.fcmp_ordered(sign, x, emit.zero)


def _numbers(emit, value):
    return ir.Constant(emit.vector, [value] * emit.lanes)


def _threshold(emit, x, _):
    select = emit.builder.select
    return select(_ordered(emit, ">", x), _numbers(emit, 1.0), select(_ordered(emit, "<=", x), emit.zero, x))


def _sign(emit, x, _):
    select = emit.builder.select
    return select(_ordered(emit, ">", x), _numbers(emit, 1.0), select(_ordered(emit, "<", x), _numbers(emit, -1.0), x))


# code -> (emitter, x, slope) -> y. A NaN stays one: it is neither above nor below zero.
_FORWARD = {
    RELU: lambda emit, x, _: emit.builder.select(_ordered(emit, "<", x), emit.zero, x),
    LEAKY_RELU: lambda emit, x, slope: emit.builder.select(_ordered(emit, ">", x), x, emit.builder.fmul(x, slope)),
    STEP: _threshold,
    SIGN: _sign,
}


def _slope_of_sigmoid(emit, grad, y, _):
    return emit.builder.fmul(emit.builder.fmul(grad, y), emit.builder.fsub(_numbers(emit, 1.0), y))


def _slope_of_tanh(emit, grad, y, _):
    return emit.builder.fmul(grad, emit.multiply_add(emit.builder.fneg(y), y, _numbers(emit, 1.0)))


# code -> (emitter, grad, y, slope) -> the gradient
_BACKWARD = {
    RELU: lambda emit, grad, y, _: emit.builder.select(_ordered(emit, "<=", y), emit.zero, grad),
    LEAKY_RELU: lambda emit, grad, y, slope: emit.builder.select(
        _ordered(emit, ">", y), grad, emit.builder.fmul(grad, slope)
    ),
    SIGMOID: _slope_of_sigmoid,
    TANH: _slope_of_tanh,
}


def _emit_runs(emit, functions, operands, result, count, code, slope, past):
    """result = the function of `code` of the operands, over a run."""
    builder, factor = emit.builder, emit.splat(slope)
    for known, function in functions.items():
        chosen = builder.icmp_signed("==", code, _I64(known))
        for streamed in (0, 1):
            with builder.if_then(builder.and_(chosen, builder.icmp_signed("==", past, _I64(streamed)))):
                _emit_run(emit, function, operands, result, count, factor, bool(streamed))


def _emit_run(emit, function, operands, result, count, factor, streamed):
    def write(at, _, mask):
        values = [emit.read(operand, at, mask) for operand in operands]
        emit.write(function(emit, *values, factor), result, at, mask, streamed)
        return []

    emit.over_run(count, 0, write, result)


@intrinsic
def forward_run(typingctx, x, y, count, code, slope, past):
    """y[:count] = f(x[:count]), f one of RELU, LEAKY_RELU, STEP and SIGN; y is not x.

    past: 1 writes past the caches, for which the run must be whole, aligned vectors of y, and settle_stores() follow.
    """

    def emission(emit, args):
        x, y, count, code, slope, past = args
        _emit_runs(emit, _FORWARD, (x,), y, count, code, slope, past)

    return emitted(types.void(x, y, types.intp, types.intp, x.dtype, types.intp), emission)


@intrinsic
def backward_run(typingctx, grad, y, result, count, code, slope, past):
    """result[:count] = the gradient, from grad[:count] and the forward's y[:count]; past: as in `forward_run`."""

    def emission(emit, args):
        grad, y, result, count, code, slope, past = args
        _emit_runs(emit, _BACKWARD, (grad, y), result, count, code, slope, past)

    return emitted(types.void(grad, y, result, types.intp, types.intp, grad.dtype, types.intp), emission)
