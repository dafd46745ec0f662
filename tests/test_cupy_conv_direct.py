"""Convolution of few channels in CUDA C++: how its threads share the outputs, and blocks that go on to more pixels; and
the bias's gradient."""

import numpy as np
import pytest
from conv_cases import LAYOUTS, Case, check, reference, wide
from test_cuda_conv import operands

from tilewise import kernels
from tilewise.kernels import conv_plan

GPU_BACKENDS = ("cupy",)
# 1, 2 and 4 lanes for the outputs of a pixel (float64: twice as many); whole vectors of pixels and outputs, and not
FEW = [
    Case(1, 3, 34, 40, 16, (3, 3), 1, 1),
    Case(3, 1, 19, 21, 20, (5, 5), 2, 2),
    Case(2, 4, 26, 24, 70, (3, 3), 1, 1),
    Case(2, 3, 30, 30, 64, (7, 7), 2, 3),
    Case(1, 6, 23, 33, 50, (2, 3), 1, ((1, 0), (0, 2)), 2, 2),
]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_go_on(gpu, rng, one_multiprocessor, layout, dtype):
    for case in FEW:
        x, weight, bias, add = operands(rng, case, dtype, layout)
        for activation, summand in ((None, None), ("relu", None), ("tanh", add)):
            options = case.options | {"layout": layout, "activation": activation}
            gpu.launched.clear()
            y = kernels.conv2d(x, weight, bias, add=summand, **options)
            assert [name for name, _ in gpu.launched] == ["cupy conv_direct_few<T>"]
            expected = reference(kernels.conv2d, x, weight, bias, add=wide(summand), **options)
            check(y, expected, case.taps, (case, layout, activation), dtype)


def test_more_taps_than_there_is_room_for(gpu, rng, one_multiprocessor):
    case = Case(2, 3, 24, 27, 64, (8, 8), 1, 3)
    x, weight, bias, _ = operands(rng, case, np.float32, "NCHW")
    y = kernels.conv2d(x, weight, bias, **case.options, algorithm="direct")
    check(y, reference(kernels.conv2d, x, weight, bias, **case.options), case.taps, case, np.float32)


@pytest.mark.parametrize("size", [(64, 52), (29, 35)])  # planes of whole vectors, and not
def test_bias_gradient_of_many_pixels(gpu, rng, monkeypatch, size):
    """A thread has several vectors, or elements, of a part under way."""
    monkeypatch.setattr(conv_plan, "_ENOUGH_BLOCKS", 1)
    grad, x = (rng.standard_normal((2, channels, *size)).astype(np.float32) for channels in (3, 1))
    bias = kernels.conv2d_backward(grad, x, np.ones((3, 1, 1, 1), np.float32), needs=("bias",))[2]
    check(bias, grad.astype(np.float64).sum((0, 2, 3)), grad.size // 3, size, np.float32)
