"""Convolution on the CPU: the choice of algorithm, and every gradient as one of three kinds of pass.

- Forward: a matrix product that reads x in place (conv_nchw.py, conv_nhwc.py), Winograd's F(4x4, 3x3)
  (conv_winograd.py, conv_winograd_nhwc.py), depthwise in registers (conv_depthwise.py), or row by row (conv_direct.py);
  conv_pass.py puts them behind one call.
- Gradient with respect to x, and the transposed convolution, which is the same map: conv_transposed.py.
- Gradients with respect to the weights and the bias: conv_weight_gradient.py.

What follows from shapes and options alone is worked out once, by the `prepare_` functions, which the dispatcher calls
for a new signature and whose result it keeps: a call on a tiny input would otherwise spend most of its time in
Python.
"""

from math import prod
from typing import Any

import numpy as np

from tilewise.kernels.cpu.conv_choice import DIRECT_BELOW, estimate_times, tap_offsets, why_not_winograd
from tilewise.kernels.cpu.conv_depthwise import Depthwise
from tilewise.kernels.cpu.conv_pass import NO_BIAS, image_size, layout_shape, prepare_pass
from tilewise.kernels.cpu.conv_transposed import TransposedConvolution
from tilewise.kernels.cpu.conv_weight_gradient import bias_gradient, prepare_weight_gradient
from tilewise.kernels.cpu.epilogue import ACTIVATION_CODES
from tilewise.kernels.cpu.scratch import empty


def choose_conv2d(shapes, dtype, options, packed=False):
    """(algorithm, why not the others) for this problem; raises ValueError where the one asked for does not apply.

    packed: the weights are packed once, not in each call.
    """
    x, weight, *_ = shapes
    nhwc = options["layout"] == "NHWC"
    multiplier = weight[0] // options["groups"]
    oh, ow = _output_size(x, weight, options)
    why_not = {}
    reason = why_not_winograd(weight, dtype, options["stride"], options["dilation"], options["layout"])
    if reason:
        why_not["winograd"] = reason
    if weight[1] != 1 or options["groups"] == 1:
        why_not["depthwise"] = "needs several groups of one input channel each"
    elif nhwc and multiplier != 1:
        why_not["depthwise"] = "in NHWC, needs one output channel a group"
    wanted = options["algorithm"]
    if wanted != "auto":
        if wanted in why_not:
            raise ValueError(f"conv2d: algorithm {wanted!r} does not apply: {why_not[wanted]}")
        return wanted, why_not
    if "depthwise" not in why_not:
        return "depthwise", why_not | {"gemm": "a group is too thin for a register tile", "direct": "slower"}
    if 2 * x[0] * prod(weight) * oh * ow < DIRECT_BELOW:
        return "direct", why_not | {"gemm": f"fewer than {DIRECT_BELOW} FLOPs"}
    why_not["direct"] = f"{DIRECT_BELOW} FLOPs or more"
    if "winograd" in why_not:
        return "gemm", why_not
    estimates = estimate_times(x[0], options["groups"], weight, oh, ow, options["layout"], packed)
    best = min(estimates, key=estimates.__getitem__)
    for name, nanoseconds in estimates.items():
        if name != best:
            why_not[name] = f"estimated {nanoseconds / 1e3:.0f} us, {best} {estimates[best] / 1e3:.0f} us"
    return best, why_not


def describe_conv2d(shapes, dtype, options):
    """What `explain` says beside the algorithm: copies that are made on its way."""
    x, weight, *_ = shapes
    _, forward = _forward(x, weight, dtype, **options)
    return getattr(forward, "detour", "")


def _output_size(x, weight, options):
    sizes = zip(
        image_size(x, options["layout"]), options["padding"], options["dilation"], weight[2:], options["stride"],
        strict=True,
    )  # fmt: skip
    return [(n + p[0] + p[1] - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sizes]


def _forward(
    x, weight, dtype, *, stride, padding, dilation, groups, layout, activation, algorithm
) -> tuple[tuple[int, ...], Any]:
    """(the result's shape, the pass that fills it); no pass where it has no elements."""
    options = {"stride": stride, "padding": padding, "dilation": dilation, "layout": layout}
    oh, ow = _output_size(x, weight, options)
    shape = layout_shape(x[0], weight[0], oh, ow, layout)
    if prod(shape) == 0:
        return shape, None
    taps = tap_offsets(weight[2:], dilation, padding)
    code = ACTIVATION_CODES[activation]
    if algorithm == "depthwise":
        axes = [[(np.arange(offsets.size), offsets)] for offsets in taps]
        return shape, Depthwise(x, weight, shape, axes, stride, layout, dtype, code)
    grid = (0, 0, 1, 1, oh, ow)
    return shape, prepare_pass(x, weight, shape, dtype, taps, stride, grid, groups, layout, algorithm, code)


def prepare_conv2d(shapes, dtype, **options):
    x, weight, *_ = shapes
    shape, forward = _forward(x, weight, dtype, **options)
    nothing = NO_BIAS[dtype]
    if forward is None:
        return lambda x, weight, bias, add, *, out=None: np.empty(shape, dtype) if out is None else out

    def run(x, weight, bias, add, *, out=None):
        if out is None:
            out = empty(shape, dtype)
        bias, add = nothing if bias is None else bias, nothing if add is None else add.ravel()
        forward(x, weight, out, bias, add, nothing)
        return out

    return run


def bind_conv2d(shapes, dtype, arrays, packs, **options):
    """conv2d with weight and bias, in `arrays`, given once: run(x, add=None, *, out=None).

    packs: packing -> packed weights, for all calls with these weights; what is missing is added.
    """
    weight, bias = arrays["weight"], arrays["bias"]
    shape, forward = _forward(shapes[0], weight.shape, dtype, **options)
    nothing = NO_BIAS[dtype]
    if forward is None:
        return lambda x, add=None, *, out=None: np.empty(shape, dtype) if out is None else out
    packed = nothing
    if forward.packing is not None:
        if forward.packing not in packs:
            packs[forward.packing] = forward.pack(weight)
        packed = packs[forward.packing]
    bias = nothing if bias is None else bias

    def run(x, add=None, *, out=None):
        if out is None:
            out = empty(shape, dtype)
        forward(x, weight, out, bias, nothing if add is None else add.ravel(), packed)
        return out

    return run


def conv2d(x, weight, bias, add, *, stride, padding, dilation, groups, layout, activation, algorithm, out=None):
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout}
    run = prepare_conv2d((x.shape, weight.shape), x.dtype, activation=activation, algorithm=algorithm, **options)
    return run(x, weight, bias, add, out=out)


def prepare_conv2d_backward(shapes, dtype, *, stride, padding, dilation, groups, layout, needs):
    grad, x, weight = shapes
    no_bias = NO_BIAS[dtype]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout}
    to_x = TransposedConvolution(grad, weight, x, dtype, **options) if "x" in needs else None
    wants = "weight" in needs, "bias" in needs
    to_weight = prepare_weight_gradient(grad, x, weight, dtype, **options) if any(wants) else None

    def run(grad, x, weight):
        grad_x = None
        if to_x:
            grad_x = empty(x.shape, dtype)
            to_x(grad, weight, grad_x, no_bias)
        return grad_x, *(to_weight(grad, x, *wants) if to_weight else (None, None))

    return run


def conv2d_backward(grad, x, weight, *, stride, padding, dilation, groups, layout, needs):
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout}
    shapes = (grad.shape, x.shape, weight.shape)
    return prepare_conv2d_backward(shapes, x.dtype, needs=needs, **options)(grad, x, weight)


def prepare_conv_transpose2d(shapes, dtype, *, stride, padding, output_padding, groups, dilation, layout):
    x, weight, _ = shapes
    sizes = zip(image_size(x, layout), stride, padding, dilation, weight[2:], output_padding, strict=True)
    size = [(n - 1) * s - p[0] - p[1] + d * (k - 1) + extra + 1 for n, s, p, d, k, extra in sizes]
    shape = layout_shape(x[0], weight[1] * groups, *size, layout)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout}
    transposed = TransposedConvolution(x, weight, shape, dtype, **options)
    no_bias = NO_BIAS[dtype]

    def run(x, weight, bias):
        result = empty(shape, dtype)
        transposed(x, weight, result, no_bias if bias is None else bias)
        return result

    return run


def conv_transpose2d(x, weight, bias, *, stride, padding, output_padding, groups, dilation, layout):
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout}
    shapes = (x.shape, weight.shape, None)
    return prepare_conv_transpose2d(shapes, x.dtype, output_padding=output_padding, **options)(x, weight, bias)


def prepare_conv_transpose2d_backward(
    shapes, dtype, *, stride, padding, output_padding, groups, dilation, layout, needs
):
    grad, x, weight = shapes
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout}
    to_x = _prepare_input_gradient(grad, x, weight, dtype, **options) if "x" in needs else None
    to_weight = prepare_weight_gradient(x, grad, weight, dtype, **options) if "weight" in needs else None
    to_bias = bias_gradient if "bias" in needs else None

    def run(grad, x, weight):
        return (
            to_x(grad, weight) if to_x else None,
            to_weight(x, grad, True, False)[0] if to_weight else None,
            to_bias(grad, layout) if to_bias else None,
        )

    return run


def _prepare_input_gradient(grad, x, weight, dtype, *, stride, padding, dilation, groups, layout):
    """grad_x of a transposed convolution: the convolution of grad, as large as x."""
    if prod(x) == 0:
        return lambda grad, weight: np.empty(x, dtype)
    algorithm = "direct" if 2 * prod(x) * prod(weight[1:]) < DIRECT_BELOW else "gemm"
    grid = (0, 0, 1, 1, *image_size(x, layout))
    taps, no_bias = tap_offsets(weight[2:], dilation, padding), NO_BIAS[dtype]
    if groups > 1 and weight[0] == groups and weight[1] == 1:
        move = Depthwise(grad, weight, x, [[(np.arange(t.size), t)] for t in taps], stride, layout, dtype)
    else:
        move = prepare_pass(grad, weight, x, dtype, taps, stride, grid, groups, layout, algorithm)

    def run(grad, weight):
        result = empty(x, dtype)
        move(grad, weight, result, no_bias)
        return result

    return run


def conv_transpose2d_backward(grad, x, weight, *, stride, padding, output_padding, groups, dilation, layout, needs):
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout}
    shapes = (grad.shape, x.shape, weight.shape)
    run = prepare_conv_transpose2d_backward(shapes, x.dtype, output_padding=output_padding, needs=needs, **options)
    return run(grad, x, weight)
