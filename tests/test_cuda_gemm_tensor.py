"""Products on tensor cores, executed on the CPU by an emulation that cuts sums off as they do."""

import numpy as np
import pytest
from test_cuda_gemm import ORDERS, product, random, wide
from tolerances import assert_close, tolerance

import tilewise

GPU_BACKENDS = ("cuda", "cupy")
# around the tiles' edges, and the steps of the depth
TENSOR = [(16, 16, 8), (128, 128, 32), (136, 120, 40), (120, 136, 200), (16, 264, 136)]


@pytest.fixture
def ampere(gpu, monkeypatch):
    """A device before Hopper's tensor cores, which test_cupy_gemm.py takes."""
    monkeypatch.setattr(gpu, "capability", (8, 0))


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_float16_on_tensor_cores(gpu, ampere, rng, one_multiprocessor, order, eager):
    gpu.eager_copies = eager
    for m, n, depth in TENSOR:
        a, b = random(rng, np.float16, m, depth), random(rng, np.float16, depth, n)
        assert_close(product(gpu, a, b, order), np.matmul(*wide(a, b)), reduction=depth)


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_tf32_where_it_is_allowed(gpu, ampere, rng, one_multiprocessor, order, eager):
    gpu.eager_copies = eager
    for m, n, depth in TENSOR:
        a, b = random(rng, np.float32, m, depth), random(rng, np.float32, depth, n)
        with tilewise.using(tf32=True):
            y = product(gpu, a, b, order)
        assert_tf32(y, a, b)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_sums_of_tensor_cores_are_cut_off_but_close(gpu, ampere, rng, one_multiprocessor, dtype):
    """They lose up to 6 units of the last place with every 4 (float16: 8) products; all of one sign here, the worst."""
    depth, together = 512, 4 if dtype == np.float32 else 8
    a, b = (to_tf32(rng.random(s, np.float32)).astype(dtype) for s in ((16, depth), (depth, 16)))
    with tilewise.using(tf32=True):
        y = product(gpu, a, b, (True, False)).astype(np.float64)
    exact = np.matmul(*wide(a, b))
    stored = float(np.finfo(dtype).eps)  # the parts are added, and stored, to nearest
    assert (y <= exact * (1 + stored)).all()
    assert (y >= exact * (1 - stored - depth / together * (together + 2) * 2.0**-23)).all()


def assert_tf32(y, a, b):
    """The product of operands that were rounded, to nearest."""
    depth = a.shape[1]
    assert_close(y, np.matmul(*wide(to_tf32(a), to_tf32(b))), reduction=depth)
    if depth > 8:
        error = np.abs(y - np.matmul(*wide(a, b))).max()
        assert error > tolerance(np.float32, depth), "it did not round: this was not TF32"


def to_tf32(x):
    words = x.view(np.uint32)
    return ((words + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
