"""Arrays turned around or set apart for a pass, around the edges of vectors, with nothing written beside them."""

import numpy as np
import pytest
from conv_cases import FLOATS

from tilewise.kernels.cpu.plane_moves import spread_pixels, turn_planes
from tilewise.kernels.cpu.simd import lane_count

GUARD = 64  # elements on either side


def guarded(shape, dtype):
    """(an array of NaN, all of the memory that it lies in)."""
    memory = np.full(np.prod(shape) + 2 * GUARD, np.nan, dtype)
    return memory[GUARD:-GUARD].reshape(shape), memory


def assert_guards_are_left(memory):
    assert np.isnan(memory[:GUARD]).all()
    assert np.isnan(memory[-GUARD:]).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("parallel", [False, True])
def test_turned_planes(rng, dtype, parallel):
    lane = lane_count(np.dtype(dtype).itemsize)
    sizes = (1, 2, lane - 1, lane, lane + 1, 2 * lane, 3 * lane + 1)
    for n in (1, 3):
        for rows in sizes:
            for columns in sizes:
                source = rng.standard_normal((n, rows, columns)).astype(dtype)
                target, memory = guarded((n, columns, rows), dtype)
                turn_planes(1e9 if parallel else 0, source.ravel(), n, rows, columns, target.reshape(-1))
                np.testing.assert_array_equal(target, source.swapaxes(1, 2), f"{n} x {rows} x {columns}")
                assert_guards_are_left(memory)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("stride", [(2, 2), (1, 2), (2, 1), (3, 3), (1, 4)])
def test_pixels_set_apart(rng, dtype, with_bias, stride, parallel):
    for grid in ((1, 1), (3, 5), (2, 8), (5, 33)):
        for rest in ((0, 0), (stride[0] - 1, stride[1] - 1)):
            size = tuple((g - 1) * s + 1 + r for g, s, r in zip(grid, stride, rest, strict=True))
            source = rng.standard_normal((2, 3, *grid)).astype(dtype)
            bias = rng.standard_normal(3 if with_bias else 0).astype(dtype)
            target, memory = guarded((2, 3, *size), dtype)
            spread_pixels(1e9 if parallel else 0, source.ravel(), 6, 3, grid, size, stride, bias, target.reshape(-1))
            expected = np.empty_like(target)
            expected[...] = bias[:, None, None] if with_bias else 0
            expected[:, :, :: stride[0], :: stride[1]] = source
            np.testing.assert_array_equal(target, expected, f"{grid} to {size}")
            assert_guards_are_left(memory)
