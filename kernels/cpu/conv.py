"""Convolution on the CPU: the choice of algorithm, and every gradient as one of three kernels.

- Forward: a matrix product over implicitly gathered columns (conv_nchw.py, conv_nhwc.py), the depthwise kernels, or the
  definition itself (conv_direct.py).
- Gradient with respect to x, and the transposed convolution, which is the same map: with stride 1 a convolution of grad
  with flipped weights. With a stride, the pixels of x fall into stride_h * stride_w phases; in each, only every
  stride-th tap meets a pixel of grad, and those form a convolution of stride 1 by a smaller kernel. No zeros are
  multiplied, and every pixel is written once.
- Gradient with respect to the weights: a product that sums over pixels (conv_weight.py).
"""

import numpy as np

from tilewise.kernels.cpu import conv_direct, conv_nchw, conv_nhwc, conv_weight
from tilewise.kernels.cpu.epilogue import ACTIVATION_CODES
from tilewise.kernels.cpu.gemm import column_sums
from tilewise.kernels.cpu.jit import kernel

_NO_BIAS = {np.dtype(t): np.empty(0, t) for t in (np.float32, np.float64)}
# Below this many FLOPs the definition is faster than setting up panels.
DIRECT_BELOW = 20_000
# Estimated serial nanoseconds per FLOP, for the decision to split over threads.
_COST = {"gemm": 0.015, "depthwise": 0.15, "direct": 1.0}


def _flops(x, weight, oh, ow):
    return 2 * x.shape[0] * weight.size * oh * ow


def choose_conv2d(shapes, options):
    """(algorithm, why not the others) for this problem; raises ValueError where the one asked for does not apply."""
    x, weight, _ = shapes
    nhwc = options["layout"] == "NHWC"
    groups = options["groups"]
    channels = x[3] if nhwc else x[1]
    multiplier = weight[0] // groups
    why_not = {"winograd": "not in this version"}
    if not (groups > 1 and groups == channels):
        why_not["depthwise"] = "needs one input channel a group"
    elif nhwc and multiplier != 1:
        why_not["depthwise"] = "in NHWC, needs one output channel a group"
    wanted = options["algorithm"]
    if wanted != "auto":
        if wanted in why_not:
            raise ValueError(f"conv2d: algorithm {wanted!r} does not apply: {why_not[wanted]}")
        return wanted, why_not
    oh, ow = _output_size(x, weight, options)
    flops = 2 * x[0] * int(np.prod(weight)) * oh * ow
    if flops < DIRECT_BELOW:
        return "direct", why_not | {"gemm": f"fewer than {DIRECT_BELOW} FLOPs"}
    if "depthwise" not in why_not:
        return "depthwise", why_not | {"gemm": "a group is too thin for a register tile", "direct": "slower"}
    return "gemm", why_not | {"direct": f"{DIRECT_BELOW} FLOPs or more"}


def _output_size(x, weight, options):
    h, w = x[1:3] if options["layout"] == "NHWC" else x[2:4]
    sizes = []
    for axis, n in enumerate((h, w)):
        low, high = options["padding"][axis]
        span = n + low + high - options["dilation"][axis] * (weight[2 + axis] - 1) - 1
        sizes.append(span // options["stride"][axis] + 1)
    return sizes


def conv2d(x, weight, bias, *, stride, padding, dilation, groups, layout, activation, algorithm, out=None):
    oh, ow = (
        (n + p[0] + p[1] - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(
            x.shape[1:3] if layout == "NHWC" else x.shape[2:4], padding, dilation, weight.shape[2:], stride, strict=True
        )
    )
    outputs = weight.shape[0]
    if out is None:
        shape = (x.shape[0], oh, ow, outputs) if layout == "NHWC" else (x.shape[0], outputs, oh, ow)
        out = np.empty(shape, x.dtype)
    if out.size == 0:
        return out
    tap_rows = np.arange(weight.shape[2]) * dilation[0] - padding[0][0]
    tap_columns = np.arange(weight.shape[3]) * dilation[1] - padding[1][0]
    bias = _NO_BIAS[x.dtype] if bias is None else bias
    code = ACTIVATION_CODES[activation]
    grid = _Grid(0, 0, 1, 1, oh, ow)
    _convolve(x, weight, tap_rows, tap_columns, stride, grid, groups, layout, algorithm, out, bias, code)
    return out


class _Grid:
    """Which pixels of an image a convolution writes: first row and column, their steps, and how many of each."""

    __slots__ = ("columns", "first_column", "first_row", "row_step", "rows", "column_step")

    def __init__(self, first_row, first_column, row_step, column_step, rows, columns):
        self.first_row, self.first_column = first_row, first_column
        self.row_step, self.column_step = row_step, column_step
        self.rows, self.columns = rows, columns


def _convolve(x, weight, tap_rows, tap_columns, stride, grid, groups, layout, algorithm, y, bias, activation):
    """Run one algorithm; the taps are offsets into x, the grid says where in y the pixels go."""
    stride_h, stride_w = stride
    work = _flops(x, weight, grid.rows, grid.columns) * _COST[algorithm]
    flat_x, flat_weight, flat_y = x.reshape(-1), weight.reshape(-1), y.reshape(-1)
    outputs = weight.shape[0] // groups
    if layout == "NHWC":
        n, h, w, c = x.shape
        _, height, width, all_outputs = y.shape
        steps = (height * width * all_outputs, 1, width * all_outputs, all_outputs)
    else:
        n, c, h, w = x.shape
        _, all_outputs, height, width = y.shape
        steps = (all_outputs * height * width, height * width, width, 1)
    start = grid.first_row * steps[2] + grid.first_column * steps[3]
    row_step, column_step = grid.row_step * steps[2], grid.column_step * steps[3]
    oh, ow = grid.rows, grid.columns
    if algorithm == "direct":
        x_steps = (h * w * c, 1, w * c, c) if layout == "NHWC" else (c * h * w, h * w, w, 1)
        y_steps = (steps[0], steps[1], row_step, column_step)
        conv_direct.convolve(
            work, flat_x, n, groups, c // groups, h, w, x_steps, flat_weight, outputs, tap_rows, tap_columns,
            stride_h, stride_w, oh, ow, flat_y[start:], y_steps, bias, activation,
        )  # fmt: skip
    elif layout == "NHWC" and algorithm == "depthwise":
        by_tap = np.ascontiguousarray(weight.reshape(groups, -1).T).reshape(-1)
        conv_direct.depthwise_nhwc(
            work, flat_x, n, groups, h, w, by_tap, tap_rows, tap_columns, stride_h, stride_w, oh, ow,
            flat_y, start, steps[0], row_step, column_step, bias, activation,
        )  # fmt: skip
    elif algorithm == "depthwise":
        conv_direct.depthwise_nchw(
            work, flat_x, n, groups, h, w, flat_weight, outputs, tap_rows, tap_columns, stride_h, stride_w, oh, ow,
            flat_y, start, steps[1], row_step, column_step, bias, activation,
        )  # fmt: skip
    elif layout == "NHWC":
        conv_nhwc.convolve(
            work, flat_x, n, groups, c // groups, h, w, flat_weight, outputs, tap_rows, tap_columns, stride_h, stride_w,
            oh, ow, flat_y, start, steps[0], row_step, column_step, bias, activation,
        )  # fmt: skip
    else:
        conv_nchw.convolve(
            work, flat_x, n, groups, c // groups, h, w, flat_weight, outputs, tap_rows, tap_columns, stride_h, stride_w,
            oh, ow, flat_y, start, steps[1], row_step, column_step, bias, activation,
        )  # fmt: skip


@kernel(parallel=False)
def exchange_channels(weight, groups, outputs, channels, kh, kw, rows, columns, result):
    """result[g, c, o, r, s] = weight[g, o, c, rows[r], columns[s]]: a phase's taps, as weights from outputs to channels."""
    at = 0
    for g in range(groups):
        for c in range(channels):
            for o in range(outputs):
                start = ((g * outputs + o) * channels + c) * kh
                for r in range(rows.size):
                    for s in range(columns.size):
                        result[at] = weight[(start + rows[r]) * kw + columns[s]]
                        at += 1


def _phase(first, stride, padding, dilation, kernel_size):
    """The taps that meet pixels `first`, `first + stride`, ... of x, and their offsets in grad."""
    taps = [k for k in range(kernel_size) if (first + padding - dilation * k) % stride == 0]
    offsets = [(first + padding - dilation * k) // stride for k in taps]
    return np.array(taps, np.int64), np.array(offsets, np.int64)


def _transposed_convolution(grad, weight, result, *, stride, padding, dilation, groups, layout, bias=None):
    """result (+ bias) = the transpose of the convolution by `weight`, applied to grad; fills every pixel of result."""
    all_outputs, channels, kh, kw = weight.shape
    outputs = all_outputs // groups
    height, width = result.shape[1:3] if layout == "NHWC" else result.shape[2:4]
    bias = _NO_BIAS[grad.dtype] if bias is None else bias
    if grad.size == 0 or not _every_phase_has_taps(stride, dilation, (kh, kw)):
        result[...] = 0
        if bias.size:
            result += bias if layout == "NHWC" else bias[:, None, None]
    if grad.size == 0 or result.size == 0:
        return
    depthwise = groups > 1 and outputs == 1 and channels == 1
    for i in range(min(stride[0], height)):
        rows, row_offsets = _phase(i, stride[0], padding[0][0], dilation[0], kh)
        for j in range(min(stride[1], width)):
            columns, column_offsets = _phase(j, stride[1], padding[1][0], dilation[1], kw)
            if not (rows.size and columns.size):
                continue
            phase = np.empty((groups * channels, outputs, rows.size, columns.size), weight.dtype)
            exchange_channels(
                0, weight.reshape(-1), groups, outputs, channels, kh, kw, rows, columns, phase.reshape(-1)
            )
            grid = _Grid(i, j, *stride, -(-(height - i) // stride[0]), -(-(width - j) // stride[1]))
            algorithm = "depthwise" if depthwise else "gemm"
            _convolve(
                grad, phase, row_offsets, column_offsets, (1, 1), grid, groups, layout, algorithm, result, bias, 0
            )


def _every_phase_has_taps(stride, dilation, kernel_size):
    return all(
        len({d * k % s for k in range(size)}) == s for s, d, size in zip(stride, dilation, kernel_size, strict=True)
    )


def conv2d_backward(grad, x, weight, *, stride, padding, dilation, groups, layout, needs):
    grad_x = grad_weight = grad_bias = None
    if "x" in needs:
        grad_x = np.empty(x.shape, x.dtype)
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout}
        _transposed_convolution(grad, weight, grad_x, **options)
    if "weight" in needs:
        grad_weight = _weight_gradient(grad, x, weight.shape, stride, padding, dilation, groups, layout)
    if "bias" in needs:
        grad_bias = _bias_gradient(grad, layout)
    return grad_x, grad_weight, grad_bias


def _weight_gradient(grad, x, shape, stride, padding, dilation, groups, layout):
    all_outputs, channels, kh, kw = shape
    if grad.size == 0:
        return np.zeros(shape, x.dtype)
    outputs = all_outputs // groups
    tap_rows = np.arange(kh) * dilation[0] - padding[0][0]
    tap_columns = np.arange(kw) * dilation[1] - padding[1][0]
    result = np.empty(shape, x.dtype)
    if layout == "NHWC":
        n, h, w, _ = x.shape
        _, oh, ow, _ = grad.shape
        by_tap = np.empty((all_outputs, kh * kw, channels), x.dtype)
        conv_weight.weight_gradient_nhwc(
            2 * grad.size * channels * kh * kw * _COST["gemm"], x.reshape(-1), grad.reshape(-1), n, groups, channels,
            h, w, outputs, tap_rows, tap_columns, *stride, oh, ow, by_tap.reshape(-1),
        )  # fmt: skip
        return np.ascontiguousarray(by_tap.swapaxes(1, 2)).reshape(shape)
    n, _, h, w = x.shape
    _, _, oh, ow = grad.shape
    if groups > 1 and channels == 1:
        conv_direct.depthwise_weight_gradient_nchw(
            2 * grad.size * kh * kw * _COST["depthwise"], x.reshape(-1), grad.reshape(-1), n, groups, h, w, outputs,
            tap_rows, tap_columns, *stride, oh, ow, result.reshape(-1),
        )  # fmt: skip
        return result
    conv_weight.weight_gradient_nchw(
        2 * grad.size * channels * kh * kw * _COST["gemm"], x.reshape(-1), grad.reshape(-1), n, groups, channels, h, w,
        outputs, tap_rows, tap_columns, *stride, oh, ow, result.reshape(-1),
    )  # fmt: skip
    return result


def _bias_gradient(grad, layout):
    if layout == "NHWC":
        n, h, w, outputs = grad.shape
        sums = np.empty(outputs, grad.dtype)
        column_sums(0.3 * grad.size, grad.reshape(n * h * w, outputs), sums)
        return sums
    n, outputs, h, w = grad.shape
    sums = np.empty(outputs, grad.dtype)
    conv_weight.channel_sums(0.3 * grad.size, grad.reshape(-1), n, outputs, h * w, sums)
    return sums


def conv_transpose2d(x, weight, bias, *, stride, padding, output_padding, groups, dilation, layout):
    n, h, w = x.shape[:3] if layout == "NHWC" else (x.shape[0], *x.shape[2:])
    height, width = (
        (size - 1) * s - p[0] - p[1] + d * (k - 1) + extra + 1
        for size, s, p, d, k, extra in zip(
            (h, w), stride, padding, dilation, weight.shape[2:], output_padding, strict=True
        )
    )
    channels = weight.shape[1] * groups
    result = np.empty((n, height, width, channels) if layout == "NHWC" else (n, channels, height, width), x.dtype)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout}
    _transposed_convolution(x, weight, result, **options, bias=bias)
    return result


def conv_transpose2d_backward(
    grad, x, weight, *, stride, padding, output_padding, groups, dilation, layout, needs
):
    grad_x = grad_weight = grad_bias = None
    if "x" in needs:
        grad_x = np.empty(x.shape, x.dtype)
        if grad_x.size:
            h, w = x.shape[1:3] if layout == "NHWC" else x.shape[2:4]
            tap_rows = np.arange(weight.shape[2]) * dilation[0] - padding[0][0]
            tap_columns = np.arange(weight.shape[3]) * dilation[1] - padding[1][0]
            grid, bias = _Grid(0, 0, 1, 1, h, w), _NO_BIAS[x.dtype]
            _convolve(grad, weight, tap_rows, tap_columns, stride, grid, groups, layout, "gemm", grad_x, bias, 0)
    if "weight" in needs:
        grad_weight = _weight_gradient(x, grad, weight.shape, stride, padding, dilation, groups, layout)
    if "bias" in needs:
        grad_bias = _bias_gradient(grad, layout)
    return grad_x, grad_weight, grad_bias
