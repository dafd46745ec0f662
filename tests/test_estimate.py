"""The estimate that sends host arrays to a GPU by itself: fixed, from a problem's FLOPs and bytes and nominal rates."""

import numpy as np
import pytest

import tilewise
from tilewise.kernels import estimate, machine, operation

H100 = estimate.GpuRates(flops=67e12, bytes=3.35e12, double=0.5, memory=80 << 30)
LAPTOP = estimate.GpuRates(flops=5e12, bytes=0.2e12, double=1 / 64, memory=4 << 30)


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(estimate.os, "cpu_count", lambda: 2)


def square(n, itemsize=4):
    """FLOPs, bytes and itemsize of an n x n product."""
    return 2 * n**3, 3 * n * n * itemsize, itemsize


def test_large_products_are_worth_it_and_small_ones_are_not(two_cores):
    assert estimate.why_not(*square(4096), H100) is None
    assert "twice as fast would do" in estimate.why_not(*square(64), H100)
    assert estimate.seconds_here(*square(1000)) == pytest.approx(2e9 / 200e9)
    there = 50e-6 + 12e6 / 10e9 + max(2e9 / 67e12, 12e6 / 3.35e12) / 0.6
    assert estimate.seconds_there(*square(1000), H100) == pytest.approx(there)


def test_what_moves_as_much_as_it_computes_never_is(two_cores):
    for count in (1000, 10**9):
        assert estimate.why_not(count, 8 * count, 4, H100)


def test_float64_counts_what_the_device_has(two_cores):
    assert estimate.why_not(*square(8192, 8), H100) is None
    assert estimate.why_not(*square(8192, 8), LAPTOP)


def test_more_cores_keep_more_here(monkeypatch):
    monkeypatch.setattr(estimate.os, "cpu_count", lambda: 128)
    assert estimate.why_not(*square(2048), H100)


def test_what_does_not_fit_stays(two_cores):
    assert "do not fit" in estimate.why_not(10**18, 40 << 30, 4, H100)


@pytest.fixture
def with_rates(gpu, monkeypatch):
    """An emulated GPU, chosen by the estimate; the pin of the fixture `gpu` is taken back."""
    if gpu.schedule == "real":
        pytest.skip("its rates are not the emulator's")
    monkeypatch.setattr(machine, "gpu_rates", lambda: H100)
    gpu.launched.clear()
    operation.forget_plans()
    token = operation.settings_module.current.set(operation.settings_module.intern("auto", None, None))
    yield gpu
    operation.settings_module.current.reset(token)
    operation.forget_plans()


def test_host_arrays_are_sent_where_that_is_worth_it(with_rates, monkeypatch, rng):
    x = rng.standard_normal((3, 5)).astype(np.float32)
    decision = tilewise.explain(tilewise.relu, x)
    assert (decision.device, decision.backend) == ("cpu", "cpu")
    assert "twice as fast would do" in decision.rejected["cuda"]
    np.testing.assert_array_equal(tilewise.relu(x), np.maximum(x, 0))
    assert not with_rates.launched

    monkeypatch.setattr(estimate, "AHEAD", 0.0)
    operation.forget_plans()
    decision = tilewise.explain(tilewise.relu, x)
    assert (decision.device, decision.backend) == ("gpu", "cuda")
    assert "more than twice as long" in decision.rejected["cpu"]
    np.testing.assert_array_equal(tilewise.relu(x), np.maximum(x, 0))
    assert with_rates.launched
    with_rates.launched.clear()
    for choice in ({"device": "cpu"}, {"backend": "cpu"}, {"backend": "reference"}):
        with tilewise.using(**choice):
            tilewise.relu(x)
    assert not with_rates.launched, "what is pinned is not estimated"


def test_driver_that_tells_no_rates(with_rates, monkeypatch):
    monkeypatch.setattr(machine, "gpu_rates", lambda: None)
    decision = tilewise.explain(tilewise.relu, np.ones(3))
    assert decision.rejected["cuda"] == "the driver does not tell the GPU's rates"
