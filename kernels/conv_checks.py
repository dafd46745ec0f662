"""What a convolution's operands and options must be: the shapes of a call, or the error that says what is wrong."""

from dataclasses import dataclass
from math import prod

import numpy as np

from tilewise.kernels import shapes
from tilewise.kernels.arrays import common_dtype, required
from tilewise.kernels.operation import Problem

# What `algorithm=` may name; which of them a problem allows is for the backend to say.
ALGORITHMS = ("auto", "direct", "gemm", "winograd", "depthwise")


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


def _forward_problem(function: str, geometry: _Geometry, dtype, x, weight, bias) -> Problem:
    shapes.check_bias(function, bias, geometry.channels)
    values = x.size + weight.size + (0 if bias is None else bias.size) + prod(geometry.output)
    return Problem(
        geometry.options,
        flops=2 * geometry.products,
        bytes=values * dtype.itemsize,
        unbatched=() if geometry.batched else (0,),
        out=(geometry.output, dtype),
    )


def _count_add(problem: Problem, function: str, add, place: int):
    """Check the array that is added to the result, and count its bytes; place: among the operands of the call."""
    if add is None:
        return
    assert problem.out is not None
    shape, dtype = problem.out
    if add.shape != shape:
        raise ValueError(f"{function}: add must have the result's shape {shape}, got {add.shape}")
    problem.bytes += prod(shape) * dtype.itemsize
    problem.unbatched += (place,) if problem.unbatched else ()


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


def _algorithm(function: str, algorithm):
    if algorithm not in ALGORITHMS:
        raise ValueError(f"{function}: algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    return algorithm


def check_conv2d(x, weight, bias, add, stride, padding, dilation, groups, layout, activation, algorithm) -> Problem:
    function = "conv2d"
    required(function, x=x, weight=weight)
    geometry = _conv_geometry(function, x, weight, stride, padding, dilation, groups, layout)
    algorithm = _algorithm(function, algorithm)
    geometry.options |= {"activation": shapes.activation(function, activation), "algorithm": algorithm}
    dtype = common_dtype(function, {"x": x, "weight": weight, "bias": bias, "add": add})
    problem = _forward_problem(function, geometry, dtype, x, weight, bias)
    _count_add(problem, function, add, 3)
    return problem


def check_prepared_conv2d(weight, bias, dtype, options: dict, x, add=None) -> Problem:
    """A call of a prepared convolution; weight and bias as they are kept, dtype as they were given."""
    function = "conv2d"
    required(function, x=x)
    given = common_dtype(function, {"x": x, "add": add})
    if given != dtype:
        raise TypeError(f"{function}: weight is {dtype} but x is {given}; the dtypes must match")
    window = {name: options[name] for name in ("stride", "padding", "dilation", "groups", "layout")}
    geometry = _conv_geometry(function, x, weight, **window)
    geometry.options |= {name: options[name] for name in ("activation", "algorithm")}
    problem = _forward_problem(function, geometry, dtype, x, weight, bias)
    _count_add(problem, function, add, 1)
    return problem


def check_preparation(
    function: str, weight, bias, statistics: dict, stride, padding, dilation, groups, layout, activation, algorithm
) -> tuple[np.dtype, dict]:
    """(dtype, options in normal form) of weights that are to be prepared.

    statistics: the arrays of the batch norm to fold, by name; empty for none.
    """
    if weight.ndim != 4:
        raise ValueError(f"{function}: weight must have 4 dimensions, got shape {weight.shape}")
    if 0 in weight.shape:
        raise ValueError(f"{function}: weight must have at least one of everything, got shape {weight.shape}")
    dtype = common_dtype(function, {"weight": weight, "bias": bias, **statistics})
    outputs, kernel = weight.shape[0], (weight.shape[2], weight.shape[3])
    shapes.check_bias(function, bias, outputs)
    for name, vector in statistics.items():
        if vector is not None and vector.shape != (outputs,):
            raise ValueError(f"{function}: {name} must have shape ({outputs},), got {vector.shape}")
    stride = shapes.pair(function, "stride", stride)
    dilation = shapes.pair(function, "dilation", dilation)
    if isinstance(padding, str):  # what it comes to depends on x
        shapes.padding_pairs(function, padding, (1, 1), kernel, stride, dilation)
    else:
        padding = shapes.explicit_padding(function, padding)
    groups = _check_groups(function, groups, "output channels of weight", outputs)
    shapes.image_shape(function, "x", (1, 1, 1), layout)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout}
    activation = shapes.activation(function, activation)
    return dtype, options | {"activation": activation, "algorithm": _algorithm(function, algorithm)}


def check_conv2d_backward(grad, x, weight, stride, padding, dilation, groups, layout, needs) -> Problem:
    function = "conv2d_backward"
    required(function, grad=grad, x=x, weight=weight)
    geometry = _conv_geometry(function, x, weight, stride, padding, dilation, groups, layout)
    return _backward_problem(function, geometry, grad, x, weight, needs)


def check_conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation, layout) -> Problem:
    function = "conv_transpose2d"
    required(function, x=x, weight=weight)
    geometry = _transpose_geometry(function, x, weight, stride, padding, output_padding, groups, dilation, layout)
    dtype = common_dtype(function, {"x": x, "weight": weight, "bias": bias})
    return _forward_problem(function, geometry, dtype, x, weight, bias)


def check_conv_transpose2d_backward(
    grad, x, weight, stride, padding, output_padding, groups, dilation, layout, needs
) -> Problem:
    function = "conv_transpose2d_backward"
    required(function, grad=grad, x=x, weight=weight)
    geometry = _transpose_geometry(function, x, weight, stride, padding, output_padding, groups, dilation, layout)
    return _backward_problem(function, geometry, grad, x, weight, needs)
