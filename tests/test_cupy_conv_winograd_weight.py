"""Winograd's weight gradient in CUDA C++: its error, its parts, and what is not finite."""

import numpy as np
import pytest
from conv_cases import LAYOUTS, Case, check, reference
from test_cuda_conv import backward, operands
from test_cuda_conv_winograd import SHORT_WINOGRAD, WINOGRAD_GROWTH
from test_cupy_conv_winograd import NORMWISE, launched, split

import tilewise
from tilewise import kernels
from tilewise.kernels import conv_winograd_plan
from tilewise.kernels.cupy import conv_winograd_weight

GPU_BACKENDS = ("cupy",)
NEEDS = {"needs": ("weight",)}
__all__ = ["split"]


@pytest.fixture
def pays(monkeypatch):
    monkeypatch.setattr(conv_winograd_plan, "_LEAST_CHANNELS", 0)
    monkeypatch.setattr(conv_winograd_plan, "_LEAST_TILES", 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("room", "together"), [(1 << 28, 32), (1, 5)])  # parts begin within images
def test_weight_gradient(gpu, rng, pays, monkeypatch, room, together, layout):
    monkeypatch.setattr(conv_winograd_plan, "_ROOM", room)
    monkeypatch.setattr(conv_winograd_plan, "_TOGETHER", together)
    for case in SHORT_WINOGRAD[1:]:
        gpu.launched.clear()
        backward(rng, case, np.float32, layout, WINOGRAD_GROWTH)
        assert launched(gpu, "conv_winograd_taps") == (case.c > 1), case


def test_what_needs_too_much_memory_goes_another_way(gpu, rng, pays, monkeypatch):
    """Of 9 x 11 pixels in parts of five tiles, each part leaves 36 matrices of 8 x 8."""
    case, of_a_part = Case(2, 6, 9, 11, 7, (3, 3), 1, 1), 36 * 8 * 8 * 4
    monkeypatch.setattr(conv_winograd_plan, "_ROOM", 1)
    monkeypatch.setattr(conv_winograd_plan, "_TOGETHER", 5)
    for room, taken in ((4 * of_a_part, True), (4 * of_a_part - 1, False)):
        monkeypatch.setattr(conv_winograd_weight, "_MOST_SUMS", room)
        gpu.launched.clear()
        backward(rng, case, np.float32, "NCHW", WINOGRAD_GROWTH)
        assert launched(gpu, "conv_winograd_taps") == taken


@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_by_three_products(gpu, rng, split, pays, layout):
    case = Case(1, 68, 29, 32, 66, (3, 3), 1, 1)
    x, weight, _, grad = operands(rng, case, np.float32, layout)
    gpu.launched.clear()
    _, gradient, _ = kernels.conv2d_backward(grad, x, weight, padding=1, layout=layout, **NEEDS)
    assert launched(gpu, "SplitMath")
    assert launched(gpu, "conv_winograd_taps")
    _, exact, _ = reference(kernels.conv2d_backward, grad, x, weight, padding=1, layout=layout, **NEEDS)
    assert 1e-8 < np.linalg.norm(gradient - exact) / np.linalg.norm(exact) <= NORMWISE


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_finite_stays_where_it_belongs(gpu, rng, pays, layout, value):
    """A pixel of x in a corner meets four taps; an infinite cotangent meets padding, and 0 * inf is NaN."""
    case = Case(2, 6, 9, 10, 7, (3, 3), 1, 1)
    x, weight, _, grad = operands(rng, case, np.float32, layout)
    x.flat[0] = value
    gpu.launched.clear()
    for grads in (grad, np.where(np.arange(grad.size).reshape(grad.shape) == 3, np.float32(value), grad)):
        _, gradient, _ = kernels.conv2d_backward(grads, x, weight, padding=1, layout=layout, **NEEDS)
        assert launched(gpu, "conv_winograd_taps")
        _, expected, _ = reference(kernels.conv2d_backward, grads, x, weight, padding=1, layout=layout, **NEEDS)
        check(gradient, expected, grad.size // case.o, layout, np.float32, WINOGRAD_GROWTH)


def test_never_by_one_product_of_tf32(gpu, rng, split):
    case = Case(1, 64, 45, 45, 64, (3, 3), 1, 1)
    x, weight, _, grad = operands(rng, case, np.float32, "NHWC")
    gpu.launched.clear()
    with tilewise.using(tf32=True):
        kernels.conv2d_backward(grad, x, weight, padding=1, layout="NHWC", **NEEDS)
    assert launched(gpu, "Tf32Math")
    assert not launched(gpu, "winograd")
