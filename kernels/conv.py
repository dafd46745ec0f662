"""Convolution and transposed convolution of images, forward and backward."""

from dataclasses import dataclass
from math import prod

from tilewise.kernels import shapes
from tilewise.kernels.arrays import common_dtype, required
from tilewise.kernels.dispatch import Operation, Problem

# What `algorithm=` may name; which of them a problem allows is for the backend to say.
ALGORITHMS = ("auto", "direct", "gemm", "winograd", "depthwise")


def conv2d(
    x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *,
    layout="NCHW", activation=None, algorithm="auto", out=None,
):  # fmt: skip
    """The convolution of images with a bank of filters (cross-correlation, as in every CNN).

    y[n, o, i, j] = activation(bias[o] + sum over c, p, q of
                               x[n, g C/groups + c, i S - P_top + p D, j S - P_left + q D] * weight[o, c, p, q])

    where g is o's group and x is 0 outside the image; OH = floor((H + P_top + P_bottom - D (KH - 1) - 1) / S) + 1, OW
    alike.

    Args:
        x: (N, C, H, W), or unbatched (C, H, W); float16, float16, float32 or float64, any strides.
        weight: (O, C/groups, KH, KW), in both layouts.
        bias: (O,), or None for none.
        stride, dilation: an int or a pair (height, width).
        padding: rows and columns of zeros around x: an int, a pair (height, width), two pairs ((top, bottom),
            (left, right)), "valid" (none), "same" (OH = ceil(H / S), an odd row or column goes after) or "same_lower"
            (before).
        groups: output channel o sees the C/groups input channels of its own group; groups = C is depthwise.
        layout: "NCHW", or "NHWC" for x and y (N, H, W, C).
        activation: None, "relu", "leaky_relu" (slope 0.01), "sigmoid" or "tanh", applied in the same pass.
        algorithm: "auto", or the one to use: "direct", "gemm", "winograd" (F(4x4, 3x3)) or "depthwise". The reference
            backend has one way and takes any of them.
        out: an array of exactly the result's shape and dtype that overlaps no operand; it is filled and returned.

    Returns:
        (N, O, OH, OW) in x's layout, kind and dtype; without N if x has none.

    Raises:
        TypeError: not arrays; dtypes that differ or are not supported; an option of the wrong kind.
        ValueError: shapes or options that do not fit together, a kernel larger than the padded x, no channels or no
            pixels, an algorithm that is unknown or does not apply, a wrong `out`.

    Source: V. Dumoulin, F. Visin: A guide to convolution arithmetic for deep learning, arXiv:1603.07285.
    """
    return _CONV2D.call((x, weight, bias), (stride, padding, dilation, groups, layout, activation, algorithm), out)


def conv2d_backward(
    grad, x, weight, stride=1, padding=0, dilation=1, groups=1, *, layout="NCHW", needs=("x", "weight", "bias")
):
    """The gradients of `conv2d` without its activation.

    grad_x[n, c, h, w] sums grad[n, o, i, j] * weight[o, c, p, q] over all (o, i, j, p, q) in which that pixel met that
    tap; grad_weight sums grad * x over the same pairs; grad_bias sums grad over images and pixels.

    Args:
        grad: (N, O, OH, OW) in the layout, the gradient of the convolution plus bias: what the activation's backward
            gave, if there is one. Unbatched if x is.
        x, weight: the operands of the forward call, with its stride, padding, dilation, groups and layout.
        needs: which gradients to compute, out of "x", "weight" and "bias".

    Returns:
        (grad_x, grad_weight, grad_bias) of the shapes of x, weight and (O,); None for one that is not needed.

    Raises:
        TypeError, ValueError: as `conv2d`; also a grad whose shape is not the result's, or an unknown name in `needs`.
    """
    return _CONV2D_BACKWARD.call((grad, x, weight), (stride, padding, dilation, groups, layout, needs))


def conv_transpose2d(
    x, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1, *, layout="NCHW"
):
    """The transposed convolution: `conv2d`'s gradient with respect to its input, as a forward operation.

    Every x[n, c, i, j] adds x[n, c, i, j] * weight[c, o, p, q] to y[n, o, i S - P_top + p D, j S - P_left + q D], if
    that pixel exists; then bias[o] is added. OH = (H - 1) S - P_top - P_bottom + D (KH - 1) + output_padding + 1, OW
    alike.

    Args:
        x: (N, C, H, W), or unbatched (C, H, W); float16, float16, float32 or float64, any strides.
        weight: (C, O/groups, KH, KW), in both layouts.
        bias: (O,), or None for none.
        stride, dilation: an int or a pair (height, width).
        padding: rows and columns cut off the result: an int, a pair, or two pairs ((top, bottom), (left, right)).
        output_padding: rows and columns added at the bottom and the right, an int or a pair, less than the larger of
            stride and dilation: it tells which of the sizes that conv2d maps to H is meant.
        groups: input channel c feeds the O/groups output channels of its own group.
        layout: "NCHW", or "NHWC" for x and y.

    Returns:
        (N, O, OH, OW) in x's layout, kind and dtype; without N if x has none.

    Raises:
        TypeError, ValueError, NotImplementedError: as `conv2d`; also a result without pixels.

    Source: V. Dumoulin, F. Visin: A guide to convolution arithmetic for deep learning, arXiv:1603.07285, chapter 4.
    """
    return _CONV_TRANSPOSE2D.call((x, weight, bias), (stride, padding, output_padding, groups, dilation, layout))


def conv_transpose2d_backward(
    grad, x, weight, stride=1, padding=0, output_padding=0, groups=1, dilation=1, *,
    layout="NCHW", needs=("x", "weight", "bias"),
):  # fmt: skip
    """The gradients of `conv_transpose2d`: grad_x is a `conv2d` of grad with the same weight.

    Args:
        grad: (N, O, OH, OW) in the layout, the gradient of the result. Unbatched if x is.
        x, weight: the operands of the forward call, with its options.
        needs: which gradients to compute, out of "x", "weight" and "bias".

    Returns:
        (grad_x, grad_weight, grad_bias) of the shapes of x, weight and (O,); None for one that is not needed.

    Raises:
        TypeError, ValueError: as `conv_transpose2d`; also a grad whose shape is not the result's, or an unknown name in
            `needs`.
    """
    options = (stride, padding, output_padding, groups, dilation, layout, needs)
    return _CONV_TRANSPOSE2D_BACKWARD.call((grad, x, weight), options)


@dataclass(slots=True)
class _Geometry:
    """A checked call's shapes: the options in normal form, the result's shape, the channels, the pairs multiplied."""

    options: dict
    batched: bool
    output: tuple[int, ...]  # as it lies in memory, without N where x has none
    channels: int  # O
    products: int  # multiplications of an x by a weight, padded taps included


def _images(function: str, x, weight, layout) -> tuple[int, int, int, int]:
    shape = shapes.image_shape(function, "x", x.shape, layout)
    if weight.ndim != 4:
        raise ValueError(f"{function}: weight must have 4 dimensions, got shape {weight.shape}")
    if 0 in weight.shape:
        raise ValueError(f"{function}: weight must have at least one of everything, got shape {weight.shape}")
    if shape[1] == 0:
        raise ValueError(f"{function}: x has no channels (shape {x.shape}, layout {layout})")
    if 0 in shape[2:]:
        raise ValueError(f"{function}: x has no pixels (shape {x.shape}, layout {layout})")
    return shape


def _check_groups(function: str, groups, what: str, channels: int) -> int:
    groups = shapes.integer(function, "groups", groups)
    if channels % groups:
        raise ValueError(f"{function}: groups={groups} does not divide the {channels} {what}")
    return groups


def _output_shape(x, n: int, channels: int, size: shapes.Pair, layout: str) -> tuple[int, ...]:
    shape = shapes.layout_shape(n, channels, *size, layout)
    return shape if x.ndim == 4 else shape[1:]


def _conv_geometry(function: str, x, weight, stride, padding, dilation, groups, layout) -> _Geometry:
    n, c, h, w = _images(function, x, weight, layout)
    o, depth, *taps = weight.shape
    kernel = (taps[0], taps[1])
    stride = shapes.pair(function, "stride", stride)
    dilation = shapes.pair(function, "dilation", dilation)
    groups = _check_groups(function, groups, "channels of x", c)
    _check_groups(function, groups, "output channels of weight", o)
    if depth != c // groups:
        raise ValueError(
            f"{function}: weight expects {depth} channels per group but x has {c // groups} "
            f"(x {x.shape}, weight {weight.shape}, groups={groups})"
        )
    padding = shapes.padding_pairs(function, padding, (h, w), kernel, stride, dilation)
    for axis, size, k, pads, d in zip(("rows", "columns"), (h, w), kernel, padding, dilation, strict=True):
        if d * (k - 1) + 1 > size + sum(pads):
            raise ValueError(
                f"{function}: the kernel spans {d * (k - 1) + 1} {axis} but x with its padding has {size + sum(pads)} "
                f"(x {x.shape}, weight {weight.shape}, padding={padding}, dilation={dilation})"
            )
    out_h, out_w = (
        shapes.output_size(size, k, s, pads, d)
        for size, k, s, pads, d in zip((h, w), kernel, stride, padding, dilation, strict=True)
    )
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout}
    output = _output_shape(x, n, o, (out_h, out_w), layout)
    return _Geometry(options, x.ndim == 4, output, o, prod(output) * depth * prod(kernel))


def _transpose_geometry(
    function: str, x, weight, stride, padding, output_padding, groups, dilation, layout
) -> _Geometry:
    n, c, h, w = _images(function, x, weight, layout)
    inputs, depth, *kernel = weight.shape
    stride = shapes.pair(function, "stride", stride)
    dilation = shapes.pair(function, "dilation", dilation)
    output_padding = shapes.pair(function, "output_padding", output_padding, 0)
    padding = shapes.explicit_padding(function, padding)
    groups = _check_groups(function, groups, "channels of x", c)
    if inputs != c:
        raise ValueError(
            f"{function}: weight expects {inputs} channels but x has {c} (x {x.shape}, weight {weight.shape})"
        )
    for extra, s, d in zip(output_padding, stride, dilation, strict=True):
        if extra >= max(s, d):
            raise ValueError(
                f"{function}: output_padding must be less than the larger of stride and dilation, "
                f"got output_padding={output_padding}, stride={stride}, dilation={dilation}"
            )
    out_h, out_w = (
        (size - 1) * s - sum(pads) + d * (k - 1) + extra + 1
        for size, k, s, pads, extra, d in zip((h, w), kernel, stride, padding, output_padding, dilation, strict=True)
    )
    if out_h < 1 or out_w < 1:
        raise ValueError(
            f"{function}: the result would have {out_h} x {out_w} pixels "
            f"(x {x.shape}, weight {weight.shape}, stride={stride}, padding={padding})"
        )
    options = {"stride": stride, "padding": padding, "output_padding": output_padding}
    options |= {"groups": groups, "dilation": dilation, "layout": layout}
    output = _output_shape(x, n, depth * groups, (out_h, out_w), layout)
    return _Geometry(options, x.ndim == 4, output, depth * groups, n * c * h * w * depth * prod(kernel))


def _forward_problem(function: str, geometry: _Geometry, x, weight, bias) -> Problem:
    dtype = common_dtype(function, {"x": x, "weight": weight, "bias": bias})
    shapes.check_bias(function, bias, geometry.channels)
    values = x.size + weight.size + (0 if bias is None else bias.size) + prod(geometry.output)
    return Problem(
        geometry.options,
        flops=2 * geometry.products,
        bytes=values * dtype.itemsize,
        unbatched=() if geometry.batched else (0,),
        out=(geometry.output, dtype),
    )


def _backward_problem(function: str, geometry: _Geometry, grad, x, weight, needs) -> Problem:
    dtype = common_dtype(function, {"grad": grad, "x": x, "weight": weight})
    if grad.shape != geometry.output:
        raise ValueError(
            f"{function}: grad must have shape {geometry.output}, got {grad.shape} (x {x.shape}, weight {weight.shape})"
        )
    needs = shapes.needs(function, needs, ("x", "weight", "bias"))
    sizes = {"x": x.size, "weight": weight.size, "bias": geometry.channels}
    values = grad.size + x.size + weight.size + sum(sizes[name] for name in needs)
    return Problem(
        geometry.options | {"needs": needs},
        flops=2 * geometry.products * (("x" in needs) + ("weight" in needs)),
        bytes=values * dtype.itemsize,
        unbatched=() if geometry.batched else (0, 1),
    )


def _check_conv2d(x, weight, bias, stride, padding, dilation, groups, layout, activation, algorithm) -> Problem:
    required("conv2d", x=x, weight=weight)
    geometry = _conv_geometry("conv2d", x, weight, stride, padding, dilation, groups, layout)
    if algorithm not in ALGORITHMS:
        raise ValueError(f"conv2d: algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    geometry.options |= {"activation": shapes.activation("conv2d", activation), "algorithm": algorithm}
    return _forward_problem("conv2d", geometry, x, weight, bias)


def _check_conv2d_backward(grad, x, weight, stride, padding, dilation, groups, layout, needs) -> Problem:
    function = "conv2d_backward"
    required(function, grad=grad, x=x, weight=weight)
    geometry = _conv_geometry(function, x, weight, stride, padding, dilation, groups, layout)
    return _backward_problem(function, geometry, grad, x, weight, needs)


def _check_conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation, layout) -> Problem:
    function = "conv_transpose2d"
    required(function, x=x, weight=weight)
    geometry = _transpose_geometry(function, x, weight, stride, padding, output_padding, groups, dilation, layout)
    return _forward_problem(function, geometry, x, weight, bias)


def _check_conv_transpose2d_backward(
    grad, x, weight, stride, padding, output_padding, groups, dilation, layout, needs
) -> Problem:
    function = "conv_transpose2d_backward"
    required(function, grad=grad, x=x, weight=weight)
    geometry = _transpose_geometry(function, x, weight, stride, padding, output_padding, groups, dilation, layout)
    return _backward_problem(function, geometry, grad, x, weight, needs)


_CONV2D = Operation("conv", "conv2d", ("x", "weight", "bias"), _check_conv2d)
_CONV2D_BACKWARD = Operation("conv", "conv2d_backward", ("grad", "x", "weight"), _check_conv2d_backward)
_CONV_TRANSPOSE2D = Operation("conv", "conv_transpose2d", ("x", "weight", "bias"), _check_conv_transpose2d)
_CONV_TRANSPOSE2D_BACKWARD = Operation(
    "conv", "conv_transpose2d_backward", ("grad", "x", "weight"), _check_conv_transpose2d_backward
)
