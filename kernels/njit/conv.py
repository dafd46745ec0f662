"""Convolution inside @njit: native, by the algorithms and plans of the Python call.

- NCHW: 1x1 kernels, the implicit product on planes, Winograd, and row by row; depthwise layers go row by row, too.
- NHWC: the implicit product, and one output after the other where groups are thin (slow).

What Python has beside it (depthwise kernels in registers, small images by way of the other layout, Winograd in NHWC)
is not here.
"""

from typing import Any

import numpy as np
from numba.core import types
from numba.core.errors import TypingError
from numba.extending import register_jitable

from tilewise.kernels.cpu import conv_choice, conv_nchw_plan, conv_nhwc, conv_pointwise, conv_winograd_nhwc, simd
from tilewise.kernels.cpu.epilogue import ACTIVATION_CODES
from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.njit.arguments import (
    WrongShape,
    as_padding,
    as_pair,
    check_arrays,
    check_integer,
    check_padding,
    check_pairs,
    check_unsupported,
    is_absent,
    literal,
)
from tilewise.kernels.njit.images import batch, check_images, check_options, plane, settled_padding, unbatch
from tilewise.kernels.njit.linking import call_kernel, contiguous, optional, shaped
from tilewise.kernels.shapes import EPILOGUES

for function in (
    simd.lane_count, conv_winograd_nhwc.count_tiles, conv_winograd_nhwc.shares_outputs,
    conv_choice.product_and_winograd, conv_pointwise.whole_pixels, conv_pointwise.plan,
    conv_nchw_plan.plan, conv_nchw_plan._shared_padding, conv_nchw_plan._split, conv_nchw_plan._used_phases,
    conv_nchw_plan._phase_table, conv_nchw_plan._offsets, conv_nchw_plan._phase, conv_nchw_plan._blocks,
    conv_nchw_plan._vectors, conv_nchw_plan._panels_a_line, conv_nchw_plan._run_on, conv_nchw_plan._pays_to_spread,
    conv_nchw_plan._spread_rows, conv_nchw_plan._sum_bytes,
    conv_nhwc.plan, conv_nhwc._blocks, conv_nhwc._parts,
):  # fmt: skip
    register_jitable(error_model="numpy")(function)
plan_planes, plan_pixels, plan_pointwise = conv_nchw_plan.plan, conv_nhwc.plan, conv_pointwise.plan
shares_outputs, product_and_winograd = conv_winograd_nhwc.shares_outputs, conv_choice.product_and_winograd
DIRECT_BELOW = conv_choice.DIRECT_BELOW
ALGORITHMS = "auto", "direct", "gemm", "winograd"
DIRECT, PRODUCT, POINTWISE, WINOGRAD = range(4)


@kernel(parallel=False)
def checked(x, weight, bias, add, stride, name, padding, dilation, groups, nhwc):
    """(rows, columns) of the result and the padding in numbers, of shapes and options that fit together.

    x, weight: shapes. bias: elements, or -1. add: elements of it, or -1.
    """
    check_options("conv2d", (1, 1), stride, padding, dilation)
    c = x[3] if nhwc else x[1]
    size, kernel = plane(x, nhwc), (weight[2], weight[3])
    if min(weight[0], weight[1], weight[2], weight[3]) == 0:
        raise WrongShape("conv2d: weight must have at least one of everything, got shape {}", weight)
    if c == 0 or size[0] == 0 or size[1] == 0:
        raise WrongShape("conv2d: x has no channels or no pixels (shape {})", x)
    if groups < 1:
        raise WrongShape("conv2d: groups must be at least 1, got {}", groups)
    if c % groups:
        raise WrongShape("conv2d: groups={} does not divide the {} channels of x", groups, c)
    if weight[0] % groups:
        raise WrongShape("conv2d: groups={} does not divide the {} output channels of weight", groups, weight[0])
    if weight[1] != c // groups:
        raise WrongShape(
            "conv2d: weight expects {} channels per group but x has {} (x {}, weight {}, groups={})",
            weight[1], c // groups, x, weight, groups,
        )  # fmt: skip
    sides = settled_padding(name, padding, size, kernel, stride, dilation)
    spans = dilation[0] * (kernel[0] - 1) + 1, dilation[1] * (kernel[1] - 1) + 1
    padded = size[0] + sides[0][0] + sides[0][1], size[1] + sides[1][0] + sides[1][1]
    if spans[0] > padded[0] or spans[1] > padded[1]:
        raise WrongShape(
            "conv2d: the kernel spans {} but x with its padding has {} (x {}, weight {}, padding={}, dilation={})",
            spans, padded, x, weight, sides, dilation,
        )  # fmt: skip
    oh, ow = (padded[0] - spans[0]) // stride[0] + 1, (padded[1] - spans[1]) // stride[1] + 1
    if bias >= 0 and bias != weight[0]:
        raise WrongShape("conv2d: bias must have shape ({},), one value per output channel, got ({},)", weight[0], bias)
    if add >= 0 and add != x[0] * weight[0] * oh * ow:
        raise WrongShape("conv2d: add must have as many elements as the result, {}", x[0] * weight[0] * oh * ow)
    return (oh, ow), sides


@kernel(parallel=False)
def choice(x, weight, oh, ow, stride, padding, dilation, groups, nhwc, may_winograd):
    """Which algorithm: as conv.choose_conv2d."""
    outputs, channels = weight[0] // groups, weight[1]
    if (groups > 1 and channels == 1) or 2 * x[0] * weight[0] * channels * weight[2] * weight[
        3
    ] * oh * ow < DIRECT_BELOW:
        return DIRECT
    if nhwc:
        return PRODUCT
    if weight[2] == 1 and weight[3] == 1 and padding == ((0, 0), (0, 0)):
        return POINTWISE
    if may_winograd and weight[2] == 3 and weight[3] == 3 and stride == (1, 1) and dilation == (1, 1):
        few = min(outputs, channels) >= 32 and shares_outputs(x[0], channels, outputs, oh, ow)
        product, winograd = product_and_winograd(x[0], groups, outputs, channels, oh, ow, False, False, False)
        if winograd < product and not few:
            return WINOGRAD
    return PRODUCT


@device(allocates=True)
def _taps(weight, padding, dilation):
    """Where the taps of pixel (0, 0) lie in x: rows, and columns."""
    rows, columns = np.arange(weight.shape[2]), np.arange(weight.shape[3])
    return rows * dilation[0] - padding[0][0], columns * dilation[1] - padding[1][0]


@kernel(parallel=False)
def direct(x, weight, y, bias, extra, stride, padding, dilation, groups, code):
    (n, c, h, w), (oh, ow), (rows, columns) = x.shape, y.shape[2:], _taps(weight, padding, dilation)
    flat = shaped(x, (x.size,)), n, groups, c // groups, h, w, shaped(weight, (weight.size,))
    middle = weight.shape[0] // groups, rows, columns, stride[0], stride[1], oh, ow
    tail = shaped(y, (y.size,)), 0, oh * ow, ow, 1, bias, extra, code
    call_kernel("cpu.conv_direct.rows_nchw", (*flat, *middle, *tail))


@kernel(parallel=False)
def direct_nhwc(x, weight, y, bias, extra, stride, padding, dilation, groups, code):
    (n, h, w, c), (oh, ow), (rows, columns) = x.shape, y.shape[1:3], _taps(weight, padding, dilation)
    o = weight.shape[0]
    flat = shaped(x, (x.size,)), n, groups, c // groups, h, w, shaped(weight, (weight.size,))
    middle = o // groups, rows, columns, stride[0], stride[1], oh, ow
    tail = shaped(y, (y.size,)), 0, oh * ow * o, ow * o, o, bias, extra, code
    call_kernel("cpu.conv_direct.definition_nhwc", (*flat, *middle, *tail))


@kernel(parallel=False)
def planes(x, weight, y, bias, extra, stride, padding, dilation, groups, code):
    (n, c, h, w), (oh, ow), o = x.shape, y.shape[2:], weight.shape[0]
    geometry, offsets, phases = plan_planes(
        (n, c // groups, h, w), o // groups, _taps(weight, padding, dilation), stride, (oh, ow), (0, oh * ow, ow, 1),
        groups, x.itemsize, code, None,
    )  # fmt: skip
    flat = shaped(x, (x.size,)), shaped(weight, (weight.size,)), shaped(y, (y.size,)), bias, extra
    call_kernel("cpu.conv_nchw.convolve", (*flat, geometry, offsets, phases))


@kernel(parallel=False)
def pixels(x, weight, y, bias, extra, stride, padding, dilation, groups, code):
    (n, h, w, c), (oh, ow), o = x.shape, y.shape[1:3], weight.shape[0]
    geometry, starts, parts, order = plan_pixels(
        (n, h, w, c // groups), o // groups, _taps(weight, padding, dilation), stride, (oh, ow),
        (0, oh * ow * o, ow * o, o), groups, code,
    )  # fmt: skip
    flat = shaped(x, (x.size,)), shaped(weight, (weight.size,)), np.empty(0, x.dtype), shaped(y, (y.size,))
    call_kernel("cpu.conv_nhwc.convolve", (*flat, bias, extra, geometry, starts, parts, order))


@kernel(parallel=False)
def pointwise(x, weight, y, bias, extra, stride, groups, code):
    (n, c, h, w), o = x.shape, weight.shape[0]
    geometry, phase = plan_pointwise(n, groups, c // groups, (h, w), o // groups, stride, x.itemsize, code)
    flat = shaped(x, (x.size,)), shaped(weight, (weight.size,)), shaped(y, (y.size,)), bias, extra
    call_kernel("cpu.conv_pointwise.convolve", (*flat, geometry, phase))


@kernel(parallel=False)
def winograd(x, weight, y, bias, extra, padding, groups, code):
    (n, c, h, w), (oh, ow), o = x.shape, y.shape[2:], weight.shape[0]
    head = shaped(x, (x.size,)), n, groups, c // groups, h, w, shaped(weight, (weight.size,)), np.empty(0, x.dtype)
    middle = o // groups, -padding[0][0], -padding[1][0], oh, ow
    call_kernel("cpu.conv_winograd.convolve", (*head, *middle, shaped(y, (y.size,)), bias, extra, code))


def conv2d(
    x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, layout="NCHW", activation=None, algorithm="auto",
    add: Any = None, out=None,
):  # fmt: skip
    layout = literal("conv2d", "layout", layout, "NCHW", "NHWC")
    dtype = check_arrays("conv2d", {"weight": (4,), "bias": (1,)}, x=x, weight=weight, bias_=bias, add_=add)
    check_images("conv2d", layout, x=x)
    check_unsupported("conv2d", out=out)
    check_pairs("conv2d", stride=stride, dilation=dilation)
    check_integer("conv2d", groups=groups)
    name = check_padding("conv2d", padding, named=True)
    code = ACTIVATION_CODES[literal("conv2d", "activation", activation, *EPILOGUES)]
    if literal("conv2d", "algorithm", algorithm, *ALGORITHMS, "depthwise") == "depthwise":
        raise TypingError("conv2d: algorithm 'depthwise' is not supported inside @njit; 'auto' goes row by row there")
    wanted = literal("conv2d", "algorithm", algorithm, *ALGORITHMS)
    if not is_absent(add) and add.ndim != x.ndim:
        raise TypingError(f"conv2d: add must have the result's {x.ndim} dimensions, got {add.ndim}")
    if wanted == "winograd" and (layout == "NHWC" or dtype != types.float32):
        raise TypingError("conv2d: inside @njit, algorithm 'winograd' needs float32 and the layout NCHW")
    may_winograd = dtype == types.float32 and all(_may_be_one(option) for option in (stride, dilation))
    run = _run_nhwc(wanted) if layout == "NHWC" else _run_nchw(wanted, may_winograd)
    nhwc, has_bias, has_add = layout == "NHWC", not is_absent(bias), not is_absent(add)

    def implementation(
        x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, layout="NCHW", activation=None,
        algorithm="auto", add=None, out=None,
    ):  # fmt: skip
        images, filters, shift = batch(x), contiguous(weight), optional(bias, x)
        more = optional(add, x)
        steps, holes, parts = as_pair(stride), as_pair(dilation), np.int64(groups)
        size, sides = call_kernel(
            "njit.conv.checked",
            (
                images.shape, weight.shape, shift.size if has_bias else -1, more.size if has_add else -1, steps, name,
                as_padding(padding), holes, parts, nhwc,
            ),
        )  # fmt: skip
        n, o = images.shape[0], weight.shape[0]
        y = np.empty((n, size[0], size[1], o) if nhwc else (n, o, size[0], size[1]), x.dtype)
        if y.size > 0:
            run(images, filters, y, shift, shaped(more, (more.size,)), steps, sides, holes, parts, code)
        return unbatch(y, x)

    return implementation


def _may_be_one(option) -> bool:
    """Whether a stride or dilation may turn out to be 1."""
    value = getattr(option, "literal_value", getattr(option, "value", option))
    return not isinstance(value, int) or value == 1


def _run_nhwc(wanted: str):
    """What fills y, by the algorithm wanted."""

    def run(x, weight, y, bias, extra, stride, padding, dilation, groups, code):
        operands = x, weight, y, bias, extra, stride, padding, dilation, groups, code
        which = DIRECT if wanted == "direct" else PRODUCT
        if wanted == "auto":
            which = call_kernel(
                "njit.conv.choice",
                (x.shape, weight.shape, y.shape[1], y.shape[2], stride, padding, dilation, groups, True, False),
            )
        if which == DIRECT:
            call_kernel("njit.conv.direct_nhwc", operands)
        else:
            call_kernel("njit.conv.pixels", operands)

    return register_jitable(run)


def _run_nchw(wanted: str, may_winograd: bool):
    def by_product(x, weight, y, bias, extra, stride, padding, dilation, groups, code):
        if weight.shape[2] == 1 and weight.shape[3] == 1 and padding == ((0, 0), (0, 0)):
            call_kernel("njit.conv.pointwise", (x, weight, y, bias, extra, stride, groups, code))
        else:
            call_kernel("njit.conv.planes", (x, weight, y, bias, extra, stride, padding, dilation, groups, code))

    def by_rows(x, weight, y, bias, extra, stride, padding, dilation, groups, code):
        call_kernel("njit.conv.direct", (x, weight, y, bias, extra, stride, padding, dilation, groups, code))

    def by_winograd(x, weight, y, bias, extra, stride, padding, dilation, groups, code):
        if weight.shape[2] != 3 or weight.shape[3] != 3 or stride != (1, 1) or dilation != (1, 1):
            raise WrongShape(
                "conv2d: algorithm 'winograd' does not apply: it needs 3x3 kernels, stride and dilation 1 (weight {})",
                weight.shape,
            )  # fmt: skip
        call_kernel("njit.conv.winograd", (x, weight, y, bias, extra, padding, groups, code))

    product, rows, tiles = map(register_jitable, (by_product, by_rows, by_winograd))

    def choose(x, weight, y, stride, padding, dilation, groups):
        return call_kernel(
            "njit.conv.choice",
            (x.shape, weight.shape, y.shape[2], y.shape[3], stride, padding, dilation, groups, False, may_winograd),
        )

    chosen = register_jitable(choose)

    def auto_with_winograd(x, weight, y, bias, extra, stride, padding, dilation, groups, code):
        which = chosen(x, weight, y, stride, padding, dilation, groups)
        if which == DIRECT:
            rows(x, weight, y, bias, extra, stride, padding, dilation, groups, code)
        elif which == WINOGRAD:
            tiles(x, weight, y, bias, extra, stride, padding, dilation, groups, code)
        else:
            product(x, weight, y, bias, extra, stride, padding, dilation, groups, code)

    def auto(x, weight, y, bias, extra, stride, padding, dilation, groups, code):
        if chosen(x, weight, y, stride, padding, dilation, groups) == DIRECT:
            rows(x, weight, y, bias, extra, stride, padding, dilation, groups, code)
        else:
            product(x, weight, y, bias, extra, stride, padding, dilation, groups, code)

    if wanted != "auto":
        return {"direct": rows, "gemm": product, "winograd": tiles}[wanted]
    return register_jitable(auto_with_winograd if may_winograd else auto)
