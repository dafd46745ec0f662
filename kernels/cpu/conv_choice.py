"""When which algorithm of convolution applies, and what it costs."""

import numpy as np

from tilewise.kernels.cpu import conv_winograd_nhwc
from tilewise.kernels.cpu.conv_pass import few_tiles
from tilewise.kernels.cpu.conv_winograd import TILES
from tilewise.kernels.cpu.simd import MR

# Below this many FLOPs, walking the rows is faster than setting up panels.
DIRECT_BELOW = 4_000


def tap_offsets(kernel_size, dilation, padding):
    """Where the taps of pixel (0, 0) lie in x: rows, and columns."""
    return [np.arange(k) * d - p[0] for k, d, p in zip(kernel_size, dilation, padding, strict=True)]


def why_not_winograd(weight, dtype, stride, dilation, layout):
    """Why F(4x4, 3x3) does not apply; None where it does."""
    if weight[2:] != (3, 3) or stride != (1, 1) or dilation != (1, 1):
        return "needs a 3x3 kernel with stride and dilation 1"
    if dtype != np.float32:
        return "float32 only: its error is not small beside the rounding of float64"
    return None


def estimate_times(n, groups, weight, oh, ow, layout, packed=False):
    """Nanoseconds on one thread, fitted to ResNet-50's and VGG-16's 3x3 layers on two AVX-512 machines, and scaled to
    115 GFLOP/s for the implicit product: only the proportions matter.

    Winograd: 36 products of a block of tiles, the transforms of its inputs and outputs, and the transform of the
    weights, whose 36 numbers each are written and read once and cost more where they do not fit a cache. Packed weights
    are only read, but those of Winograd are four times as many.
    """
    few, nhwc = few_tiles(n, groups, weight, oh, ow), layout == "NHWC"
    gemm, winograd = product_and_winograd(n, groups, weight[0] // groups, weight[1], oh, ow, nhwc, few, packed)
    return {"gemm": gemm, "winograd": winograd}


def product_and_winograd(n, groups, outputs, channels, oh, ow, nhwc, few, packed):
    """The two estimates; Python for Numba, too (njit/conv.py)."""
    gemm = 2 * 9 * channels * outputs * oh * ow * n / 115
    tiles = n * conv_winograd_nhwc.count_tiles(oh, ow)
    weights = 36 * channels * outputs
    if few or nhwc:
        tiles, cost = -(-tiles // MR) * MR, 0.15 if few else 1.2 if weights < 1 << 22 else 3
    else:
        tiles, cost = -(-tiles // TILES) * TILES, 1.2 if weights < 1 << 22 else 3
    cost = 0.1 if packed else cost
    products = 36 * channels * outputs * tiles * 2 / 125
    transforms = (12 if few else 24) * tiles * (channels + outputs)
    return groups * gemm, groups * (products + transforms + weights * cost)
