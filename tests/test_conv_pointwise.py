"""1x1 convolution in NCHW: panels, pixels left over as dot products, strided pixels, shares of the weights."""

import numpy as np
import pytest
from conv_cases import FLOATS, Case, reference
from tolerances import assert_close

from tilewise import kernels
from tilewise.kernels import operation
from tilewise.kernels.cpu import conv_pointwise
from tilewise.kernels.cpu.simd import CHANNEL_MR as MR
from tilewise.kernels.cpu.simd import CHANNEL_NV as NV
from tilewise.kernels.cpu.simd import lane_count

CHANNELS = conv_pointwise.DOTS_FROM


def planned(case, dtype):
    """(pixels, those in panels, parts of the outputs)"""
    stride = (case.stride, case.stride) if isinstance(case.stride, int) else case.stride
    sizes = case.groups, case.c // case.groups, (case.h, case.w), case.o // case.groups
    geometry, _ = conv_pointwise.plan(case.n, *sizes, stride, np.dtype(dtype).itemsize, 0)
    return geometry[3], geometry[8], geometry[6]


def check(rng, case, dtype, activation=None, with_add=False):
    x, weight, bias = case.arrays(rng, dtype)
    weight /= case.taps**0.5
    add = None
    if with_add:
        size = ((case.h - 1) // case.stride + 1, (case.w - 1) // case.stride + 1)
        add = rng.standard_normal((case.n, case.o, *size)).astype(dtype)
    options = case.options | {"activation": activation}
    wide = None if add is None else add.astype(np.float64)
    expected = reference(kernels.conv2d, x, weight, bias, **options, add=wide)
    y = kernels.conv2d(x, weight, bias, **options, add=add, algorithm="gemm")
    # a single result may happen to be nearly 0; the sums of absolute products are not
    assert_close(y, expected, reduction=case.taps, scale=max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", [None, "relu", "tanh"])
@pytest.mark.parametrize("with_add", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_pixels_left_over(rng, dtype, activation, with_add, stride):
    lane = lane_count(np.dtype(dtype).itemsize)
    for rest in range(1, 3 * lane // 8 + 1):
        case = Case(2, 2 * CHANNELS, 1, (3 * lane + rest) * stride, 4 * MR, (1, 1), stride, groups=2)
        pixels, whole, _ = planned(case, dtype)
        assert pixels - whole == rest
        check(rng, case, dtype, activation, with_add)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [1, CHANNELS - 1, CHANNELS, CHANNELS + 1, 97])
def test_pixels_and_outputs_around_every_edge(rng, dtype, channels):
    lane = lane_count(np.dtype(dtype).itemsize)
    for pixels in (1, lane - 1, lane, lane + 1, 2 * lane + 1, NV * lane, NV * lane + 1, 5 * NV * lane + 1):
        for outputs in (1, MR - 1, MR, MR + 1, 2 * MR):
            check(rng, Case(1, channels, 1, pixels, outputs, (1, 1)), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("stride", [2, 3, (2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 5), (29, 31), (56, 56), (5, 200)])
def test_strides(rng, dtype, stride, size):
    for n, channels, outputs, groups in ((1, 5, 9, 1), (3, 2 * CHANNELS, 18, 2)):
        check(rng, Case(n, channels, *size, outputs, (1, 1), stride, groups=groups), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_equal_shares_of_one_image(rng, dtype):
    """As many as two or four threads share, none of more panels than PANELS, most of them not the same."""
    lane = lane_count(np.dtype(dtype).itemsize)
    for panels in (2, 3, 5, 9, 38, 75, 16 * 21 + 6):
        pixels = panels * NV * lane - 3
        geometry, _ = conv_pointwise.plan(1, 1, 3, (1, pixels), 5, (1, 1), np.dtype(dtype).itemsize, 0)
        assert geometry[5] % 4 == 0 or geometry[5] == panels
        assert panels / 16 <= geometry[5] <= panels
        check(rng, Case(1, 3, 1, pixels, 5, (1, 1)), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_outputs_in_parts(rng, dtype, monkeypatch):
    monkeypatch.setattr(conv_pointwise, "WEIGHT_BYTES", 1 << 14)
    operation.forget_plans()
    for outputs in (8 * MR * 4, 8 * MR * 4 + 3, 8 * MR * 5 + MR):
        case = Case(9, 80, 7, 7, outputs, (1, 1))
        pixels, whole, parts = planned(case, dtype)
        assert parts > 1
        assert (pixels > whole) == (outputs % MR == 0)
        check(rng, case, dtype, "relu", True)
    operation.forget_plans()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("activation", "with_add"), [(None, True), ("relu6", False), ("tanh", True)])
@pytest.mark.parametrize("channels", [5, 3 * CHANNELS, 12 * CHANNELS])
def test_panels_that_pass_by_a_tile_together(rng, dtype, activation, with_add, channels):
    """Whole ones together, as many as PACKED_BYTES hold, or each alone; then the one that is not whole."""
    lane = lane_count(np.dtype(dtype).itemsize)
    for pixels in (5 * NV * lane, 5 * NV * lane + lane + 3):
        check(rng, Case(8, channels, 1, pixels, 2 * MR + 1, (1, 1)), dtype, activation, with_add)
