"""Pooling in CUDA C++ with indices of 64 bits, on images that do not need them; and when they are taken."""

import pytest
from test_cuda_pool import FLOATS, INTEGERS, check_average, check_maximum
from test_pool import DILATED, LAYOUTS, WINDOWS, laid, tied

from tilewise import kernels
from tilewise.kernels.cupy import pool_windows
from tilewise.kernels.pool_plan import Pool

GPU_BACKENDS = ("cupy",)


@pytest.fixture
def wide(gpu, planned_anew):
    planned_anew(pool_windows, "NARROW_BELOW", 0)
    return gpu


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", [WINDOWS[0], *WINDOWS[4:7], *DILATED], ids=str)
def test_indices_of_64_bits(wide, rng, options, dtype, layout):
    for size in ((2, 3, 8, 9), (1, 8, 9, 7)):
        x = laid(tied(rng, size, dtype), layout)
        check_maximum(x, rng, options, layout)
        if "dilation" not in options:
            check_average(x, rng, options, layout)
    y = kernels.adaptive_avg_pool2d(x, (3, 4), layout=layout)
    kernels.adaptive_avg_pool2d_backward(y, x.shape, layout=layout)
    assert any("long long" in name for name, _ in wide.launched)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_indices_of_64_bits_for_integers(wide, rng, dtype, layout):
    for size in ((2, 3, 7, 8), (1, 16, 5, 6)):
        check_maximum(laid(tied(rng, size, dtype), layout), rng, {"kernel_size": 3, "stride": 2, "padding": 1}, layout)


WINDOW = {"kernel": (2, 2), "stride": (2, 2)}


@pytest.mark.parametrize(
    ("pool", "index"),
    [
        (Pool(64, (112, 112), (56, 56), 1, 1, **WINDOW), "int"),
        (Pool(1 << 14, (256, 511), (128, 255), 1, 1, **WINDOW), "int"),
        (Pool(1 << 14, (256, 512), (128, 256), 1, 1, **WINDOW), "long long"),  # 2**31 elements
        (Pool(1 << 10, (256, 512), (128, 256), 4, 4, **WINDOW), "long long"),  # in units of four
        (Pool(1, (1, 50_000), (1, 49_999), 1, 1), "long long"),  # bins: a product of the two
        (Pool(1, (1, 40_000), (1, 40_000), 1, 1), "int"),
        (Pool(1, (1, 100), (1, 2), 1, 1, kernel=(1, 2), stride=(1, 1 << 30)), "long long"),
    ],
)
def test_when_indices_have_64_bits(pool, index):
    assert pool_windows.index_type(pool) == index
