"""The gradient with respect to x of a 1x1 convolution, and the transposed one, as one product of plain matrices.

    grad_x[pixel, c] = sum over o of grad[pixel, o] * weight[o, c] (+ bias[c])

In NHWC all three lie in memory as this product wants them. Small images in NCHW are turned around before and behind it:
their rows of pixels would leave many lanes of the vectors empty, and two passes over so few bytes cost little.
"""

from math import prod

import numpy as np

from tilewise.kernels.cpu import gemm
from tilewise.kernels.cpu.conv_pass import image_size, turn_planes

# Pixels of an NCHW image up to which it is turned around.
SMALL_IMAGE = 8 * 8


def applies(weight, size, grid, groups, layout):
    """Whether it is that product: one group, one tap, grad as large as x; in NCHW, and whether it is faster."""
    if groups > 1 or weight[2:] != (1, 1) or tuple(size) != tuple(grid):
        return False
    return layout == "NHWC" or (prod(size) <= SMALL_IMAGE and min(weight[:2]) >= 64)


class PointwiseInput:
    """result = grad times weight, plus bias, for arrays of these shapes where `applies` says so."""

    def __init__(self, grad, weight, layout, dtype):
        n, (outputs, channels), pixels = grad[0], weight[:2], prod(image_size(grad, layout))
        self.shapes = (n * pixels, outputs), (outputs, channels), (n * pixels, channels)
        self.grad_turn = self.x_turn = None
        if layout == "NCHW":
            work = 1.0 * n * pixels
            self.grad_turn = turn_planes.sized(work * outputs), (n, outputs, pixels)
            self.x_turn = turn_planes.sized(work * channels), (n, pixels, channels)

    def __call__(self, grad, weight, result, bias):
        last = result
        if self.grad_turn:
            turn, sizes = self.grad_turn
            turned = np.empty(grad.size, grad.dtype)
            turn(grad.ravel(), *sizes, turned)
            grad, last = turned, np.empty(result.size, result.dtype)
        a, b, c = (array.reshape(shape) for array, shape in zip((grad, weight, last), self.shapes, strict=True))
        gemm.linear(a, b.T, bias, activation=None, out=c)
        if self.x_turn:
            turn, sizes = self.x_turn
            turn(last.reshape(-1), *sizes, result.reshape(-1))
