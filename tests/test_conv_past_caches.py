"""Large results of NHWC convolutions that are written past the caches: when they are, and that they are the same."""

import numpy as np
import pytest
from conv_cases import FLOATS, Case, laid, nchw

from tilewise import kernels, using
from tilewise.kernels import operation
from tilewise.kernels.cpu import conv_nhwc, conv_pass, conv_transposed, recycling, scratch
from tilewise.kernels.cpu.simd import NV, VECTOR_BYTES

PANELS_END_WITH_LINES = NV * VECTOR_BYTES % 64 == 0  # not those of NEON
# one panel and a half of outputs; rows of padded x; groups; the phases of grad_x, whose rows lie apart. With each, the
# passes of grad_x.
PAST = [
    (Case(3, 64, 9, 9, 48, (1, 1)), 1),
    (Case(2, 5, 9, 8, 32, (3, 3), 2, 1), 0),  # 5 channels do not fill a cache line
    (Case(2, 64, 7, 7, 64, (3, 3), 2, 1, 1, 2), 4),
]


@pytest.mark.skipif(not recycling.AVAILABLE, reason="no memory is known to have been used")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("case", "passes"), PAST)
def test_results_written_past_the_caches_are_the_same(rng, monkeypatch, case, passes, dtype):
    x, weight, bias = case.arrays(rng, dtype, "NHWC")
    options = case.options | {"layout": "NHWC", "algorithm": "gemm"}
    y = kernels.conv2d(x, weight, bias, **options)
    add = laid(rng.standard_normal(nchw(y, "NHWC").shape), "NHWC").astype(dtype)

    calls = [
        lambda: kernels.conv2d(x, weight, bias, activation="relu", **options),
        lambda: kernels.conv2d(x, weight, bias, add=add, **options),
        lambda: kernels.conv2d_backward(add, x, weight, needs=("x",), **case.options, layout="NHWC")[0],
    ]

    def results():
        """(The results, how many passes of each call wrote past the caches.)"""
        arrays, counts = [], []
        for call in calls:
            used.clear()
            arrays.append(call().copy())  # the original's memory is free again
            counts.append(used.count(True))
        return arrays, counts

    def recorded(array):
        used.append(recycling.is_used(array))
        return used[-1]

    with using(backend="cpu"):
        used = []
        monkeypatch.setattr(conv_transposed, "LARGE", 0)  # the same algorithm in both
        operation.forget_plans()
        kept, _ = results()
        monkeypatch.setattr(scratch, "ALIGNED_FROM", 1 << 10)
        monkeypatch.setattr(recycling, "FROM", 1 << 10)
        monkeypatch.setattr(conv_pass, "memory_from", lambda: 1 << 10)
        monkeypatch.setattr(conv_pass, "is_used", recorded)
        operation.forget_plans()
        results()
        past, counts = results()
        operation.forget_plans()
    assert counts == [PANELS_END_WITH_LINES * count for count in (1, 1, passes)]
    for ours, wanted in zip(past, kept, strict=True):
        np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize(
    ("outputs", "itemsize", "activation", "past"),
    [(16, 4, 0, True), (8, 8, 0, True), (8, 4, 0, False), (24, 4, 0, False), (12, 8, 0, False), (16, 4, 9, False)],
)
def test_only_whole_cache_lines_are_written_past_the_caches(outputs, itemsize, activation, past):
    grid = [np.zeros(1, np.int64)] * 2
    steps = (0, 9 * outputs, 3 * outputs, outputs)
    geometry = conv_nhwc.plan((2, 3, 3, 20), outputs, grid, (1, 1), (3, 3), steps, 1, activation)[0]
    assert (conv_nhwc.past_caches(geometry, itemsize) is not None) == (past and PANELS_END_WITH_LINES)


@pytest.mark.skipif(not recycling.AVAILABLE, reason="no memory is known to have been used")
def test_what_begins_elsewhere_is_not_written_past_the_caches(monkeypatch):
    monkeypatch.setattr(recycling, "FROM", 1 << 10)
    recycling.empty((1 << 12,), np.dtype(np.float32), 1 << 14)
    array, used = recycling.empty((1 << 12,), np.dtype(np.float32), 1 << 14)
    assert used
    assert recycling.is_used(array)
    assert recycling.is_used(array.reshape(4, -1))
    assert not recycling.is_used(array[1:])
    assert not recycling.is_used(np.empty(4, np.float32))
