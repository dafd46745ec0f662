"""The transposed convolution, which is the gradient of a convolution with respect to x.

With stride 1 it is a convolution of grad with flipped weights. With a stride, the pixels of x fall into stride_h *
stride_w phases; in each, only every stride-th tap meets a pixel of grad, and those form a convolution of stride 1 by a
smaller kernel. No zeros are multiplied, and every pixel is written once.

Elsewhere one product is faster: by columns (conv_columns.py), or for 1x1 kernels in NHWC of the matrices as they are.
With 1x1 kernels and a stride, in NCHW, it is a dense image's, whose pixels are then set apart.
"""

from math import prod

import numpy as np

from tilewise.kernels.cpu import conv_columns, gemm
from tilewise.kernels.cpu.conv_choice import DIRECT_BELOW, estimate_times, why_not_winograd
from tilewise.kernels.cpu.conv_depthwise import Depthwise
from tilewise.kernels.cpu.conv_detours import BatchInParts, PointwiseSpread
from tilewise.kernels.cpu.conv_pass import image_size, prepare_pass
from tilewise.kernels.cpu.plane_moves import exchange_channels, turn_planes

# Bytes of both images from which on 1x1 kernels in NHWC go by the convolution. Measured with 32 MB of third-level
# cache, and the same with any: the algorithm decides the bits.
LARGE = 12 << 20


def _phase(first, stride, padding, dilation, kernel_size):
    """The taps that meet pixels `first`, `first + stride`, ... of x, and their offsets in grad, ascending."""
    taps = [k for k in reversed(range(kernel_size)) if (first + padding - dilation * k) % stride == 0]
    offsets = [(first + padding - dilation * k) // stride for k in taps]
    return np.array(taps, np.int64), np.array(offsets, np.int64)


def _choose_transposed(grad, weight, size, dtype, stride, dilation, groups, layout):
    """The algorithm of the convolutions that make up a transposed one."""
    outputs, channels = weight[0] // groups, weight[1]
    if groups > 1 and outputs == channels == 1:
        return "depthwise"
    if 2 * prod(grad) * prod(weight[1:]) < DIRECT_BELOW:
        return "direct"
    if why_not_winograd(weight, dtype, stride, dilation, layout):
        return "gemm"
    estimates = estimate_times(grad[0], groups, (channels * groups, outputs, 3, 3), *size, layout)
    return min(estimates, key=estimates.__getitem__)


def _is_product(weight, size, grid, groups, layout, count):
    """Whether every pixel of NHWC is a row of a plain product; the caller knows that there is no padding.

    count: bytes of both images. Large ones go by the convolution, which neither packs the pixels nor, where it can,
    reads the result's lines.
    """
    rows = layout == "NHWC" and groups == 1 and weight[2:] == (1, 1) and tuple(size) == tuple(grid)
    return rows and count < LARGE


class _Product:
    """result[pixel, c] = sum over o of grad[pixel, o] * weight[o, c] (+ bias[c]), all three as they lie in memory."""

    def __init__(self, grad, weight):
        self.shapes = (prod(grad[:3]), weight[0]), weight[:2], (prod(grad[:3]), weight[1])

    def __call__(self, grad, weight, result, bias):
        a, b, c = (array.reshape(shape) for array, shape in zip((grad, weight, result), self.shapes, strict=True))
        gemm.linear(a, b.T, bias, activation=None, out=c)


def _set_apart(grad, weight, result, dtype, taps, stride, groups):
    """The pass by 1x1 kernels with a stride: a dense image, then its pixels set apart."""

    def prepare(n):
        x, y = ((n, *shape[1:]) for shape in (grad, result))
        dense, grid = (*y[:2], *x[2:]), (0, 0, 1, 1, *x[2:])
        move = prepare_pass(x, weight, dense, dtype, taps, (1, 1), grid, groups, "NCHW", "gemm")
        return PointwiseSpread(x, y, stride, move)

    return BatchInParts.where_large(grad, result, dtype, prepare)


class TransposedConvolution:
    """result (+ bias) = the transpose of the convolution by `weight`, applied to grad; fills every pixel of result."""

    def __init__(self, grad, weight, result, dtype, *, stride, padding, dilation, groups, layout):
        outputs, channels, kh, kw = weight[0] // groups, weight[1], *weight[2:]
        size = image_size(result, layout)
        self.sizes = (groups, outputs, channels, kh * kw)
        self.channels_last = layout == "NHWC"
        algorithm = _choose_transposed(grad, weight, size, dtype, stride, dilation, groups, layout)
        self.phases = []
        self.whole = None  # one call instead
        spread = False
        if prod(grad) and prod(result):
            axes = [
                [_phase(i, s, p[0], d, k) for i in range(min(s, n))]
                for s, p, d, k, n in zip(stride, padding, dilation, (kh, kw), size, strict=True)
            ]
            if algorithm == "depthwise":
                self.whole = Depthwise(grad, weight, result, axes, (1, 1), layout, dtype)
                return
            if algorithm != "direct" and conv_columns.applies(weight, stride, groups, layout):
                if conv_columns.JoinedColumns.applies(grad, weight, layout):
                    geometry = stride, padding, dilation
                    self.whole = conv_columns.JoinedColumns(grad, weight, result, dtype, *geometry)
                else:
                    self.whole = conv_columns.Columns(grad, weight, result, dtype, stride, padding, dilation, layout)
                return
            unpadded = [tuple(int(offset[0]) for _, offset in axis if offset.size) for axis in axes] == [(0,), (0,)]
            count = (prod(grad) + prod(result)) * dtype.itemsize
            if unpadded and _is_product(weight, size, image_size(grad, layout), groups, layout, count):
                self.whole = _Product(grad, weight)
                return
            spread = unpadded and layout == "NCHW" and (kh, kw) == (1, 1) and prod(stride) > 1 and algorithm == "gemm"
            # padding below or to the right leaves pixels of grad that have none of result
            reach = zip(image_size(grad, layout), stride, size, strict=True)
            spread = spread and all((pixels - 1) * step < most for pixels, step, most in reach)
            for i, (rows, row_offsets) in enumerate(axes[0]):
                for j, (columns, column_offsets) in enumerate(axes[1]):
                    if rows.size == 0 or columns.size == 0:
                        continue
                    shape = (groups * channels, outputs, rows.size, columns.size)
                    grid = (i, j, *stride, -(-(size[0] - i) // stride[0]), -(-(size[1] - j) // stride[1]))
                    taps = (row_offsets, column_offsets)
                    if spread:
                        move = _set_apart(grad, shape, result, dtype, taps, stride, groups)
                    else:
                        move = prepare_pass(grad, shape, result, dtype, taps, (1, 1), grid, groups, layout, algorithm)
                    wanted = (rows[:, None] * kw + columns).ravel()
                    self.phases.append((shape, self._prepare_exchange(shape, wanted, kh * kw), move))
        # pixels that no tap meets keep the bias alone
        self.fill_first = not spread and len(self.phases) < min(stride[0], size[0]) * min(stride[1], size[1])

    def _prepare_exchange(self, shape, wanted, taps):
        """The weights of a phase: outputs and channels change places, and the taps `wanted` their order."""
        groups, outputs, channels = self.sizes[:3]
        if taps == 1:
            return turn_planes.sized(1.0 * prod(shape)), (groups, outputs, channels)
        return exchange_channels.sized(2.0 * prod(shape)), (*self.sizes, wanted)

    def __call__(self, grad, weight, result, bias):
        if self.whole:
            self.whole(grad, weight, result, bias)
            return
        if self.fill_first:
            result[...] = 0
            if bias.size:
                result += bias if self.channels_last else bias[:, None, None]
        for shape, (exchange, sizes), move in self.phases:
            phase = np.empty(shape, weight.dtype)
            exchange(weight.ravel(), *sizes, phase.ravel())
            move(grad, phase, result, bias)
