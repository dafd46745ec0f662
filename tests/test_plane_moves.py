"""Arrays turned around for a pass, around the edges of vectors, with nothing written beside them."""

import numpy as np
import pytest
from conv_cases import FLOATS

from tilewise.kernels.cpu.plane_moves import turn_planes
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
