"""Winograd's convolution in CUDA C++: the error of its products by float32 and by three of TF32, never by one."""

import numpy as np
import pytest
from conv_cases import LAYOUTS, Case, reference
from test_cupy_gemm import need

import tilewise
from tilewise import kernels
from tilewise.kernels import gemm_plan as batches
from tilewise.kernels.cupy import gemm_plan, gemm_tensor

GPU_BACKENDS = ("cupy",)
NORMWISE = 1e-5  # |y - exact| / |exact|, in the 2-norm
# (channels, outputs) and tiles that a tile of three products takes; and too few channels for it
LARGE, LITTLE = Case(2, 68, 22, 25, 66, (3, 3), 1, 1), Case(2, 20, 22, 25, 66, (3, 3), 1, 1)


@pytest.fixture
def split(gpu, monkeypatch, one_multiprocessor):
    """A device where float32 is split, whichever it is."""
    need(gpu, gemm_tensor.MATMULS["split", gemm_tensor.MEDIUM][True, True])
    monkeypatch.setattr(gemm_plan, "SPLIT_ON", (gpu.capability,))


def launched(gpu, part: str) -> bool:
    return any(part in name for name, _ in gpu.launched)


def error(gpu, rng, case, layout, shift=0.0) -> float:
    x, weight, bias = case.arrays(rng, np.float32, layout)
    x += np.float32(shift)
    gpu.launched.clear()
    y = kernels.conv2d(x, weight, bias, algorithm="winograd", **case.options, layout=layout)
    assert launched(gpu, "conv_winograd_output")
    exact = reference(kernels.conv2d, x, weight, bias, **case.options, layout=layout)
    return float(np.linalg.norm(y - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_error(gpu, rng, split, monkeypatch, layout):
    """By three products of TF32 it is at most twice that of float32's; both are stated in kernels/cupy."""
    by_three = error(gpu, rng, LARGE, layout)
    assert launched(gpu, "SplitMath")
    monkeypatch.setattr(gemm_plan, "SPLIT_ON", ())
    plain = error(gpu, rng, LARGE, layout)
    assert launched(gpu, "matmul<T")
    assert not launched(gpu, "tensor")
    assert 1e-8 < plain <= NORMWISE
    assert 1e-8 < by_three <= min(NORMWISE, 2 * plain)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_of_what_does_not_sum_to_zero(gpu, rng, split, layout):
    assert error(gpu, rng, LITTLE, layout, shift=3.0) <= NORMWISE
    assert not launched(gpu, "tensor")


def test_never_by_one_product_of_tf32(gpu, rng, split):
    """`using(tf32=True)` chooses another algorithm; where this one is asked for, its products stay exact."""
    x, weight, _ = LARGE.arrays(rng, np.float32)
    with tilewise.using(tf32=True):
        assert tilewise.explain(kernels.conv2d, x, weight, padding=1).rejected["winograd"] == "tensor cores are faster"
        assert error(gpu, rng, LARGE, "NCHW") <= NORMWISE
    assert launched(gpu, "SplitMath")
    assert not launched(gpu, "Tf32Math")


@pytest.mark.parametrize(("channels", "algorithm"), [(64, "gemm"), (96, "winograd")])
def test_with_tf32_allowed(gpu, split, channels, algorithm):
    """Of many channels Winograd's exact products are faster than one product of TF32."""
    x, weight = (np.empty(shape, np.float32) for shape in ((2, channels, 32, 33), (96, channels, 3, 3)))
    with tilewise.using(tf32=True):
        assert tilewise.explain(kernels.conv2d, x, weight, padding=1).algorithm == algorithm


@pytest.mark.parametrize("layout", LAYOUTS)
def test_explain_tells_of_the_products(gpu, rng, split, monkeypatch, layout):
    for ways, part, note in (
        ((gpu.capability,), "SplitMath", "36 products: mma in 3xTF32, tiles of 128 x 128"),
        ((), "matmul<T, Big", "36 products: tiles of 128 x 128"),
    ):
        monkeypatch.setattr(gemm_plan, "SPLIT_ON", ways)
        x, weight, _ = LARGE.arrays(rng, np.float32, layout)
        options = LARGE.options | {"layout": layout, "algorithm": "winograd"}
        told = tilewise.explain(kernels.conv2d, x, weight, **options).note
        assert told.replace("wgmma", "mma") == note
        gpu.launched.clear()
        kernels.conv2d(x, weight, **options)
        assert launched(gpu, part)
        assert launched(gpu, "wgmma") == ("wgmma" in told)


def test_more_groups_than_a_grid_has_room_for(gpu, rng, monkeypatch):
    x, weight = np.empty((1, 3642, 8, 8), np.float32), np.empty((3642, 2, 3, 3), np.float32)
    options = {"groups": 1821, "padding": 1, "algorithm": "winograd"}  # 36 products of each group
    assert tilewise.explain(kernels.conv2d, x, weight, **options).algorithm == "winograd"
    monkeypatch.setattr(batches, "MOST_MATRICES", 50)
    assert error(gpu, rng, Case(2, 6, 9, 10, 8, (3, 3), 1, 1, 1, 2), "NCHW") <= NORMWISE
