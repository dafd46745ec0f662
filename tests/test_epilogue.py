"""What kernels share inside: the activations of whole rows, and the arrays that a kernel makes."""

import numpy as np
import pytest

from tilewise.kernels.cpu import jit
from tilewise.kernels.cpu.epilogue import ACTIVATION_CODES, activate_row, apply_activation
from tilewise.kernels.cpu.scratch import ALIGNMENT, integer_table, integers, progression, scratch, zeros
from tilewise.kernels.cpu.simd import lane_count

CODES = list(ACTIVATION_CODES.values())


@jit.kernel(parallel=False, fastmath=jit.EXACT_ORDER)
def rows_and_numbers(row, numbers, start, count, code):
    activate_row(row, start, count, code)
    for i in range(start, start + count):
        numbers[i] = apply_activation(numbers[i], code)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("code", CODES)
def test_a_row_is_activated_as_its_numbers_are_and_nothing_beside_it(rng, dtype, code):
    lane = lane_count(np.dtype(dtype).itemsize)
    for count in (0, 1, lane - 1, lane, lane + 1, 5 * lane + 3):
        values = (20 * rng.standard_normal(count + 2)).astype(dtype)
        values[1:-1:4] = rng.choice([np.nan, np.inf, -np.inf, 0, 6, 88.6, -88.6, 709.5, -709.5], values[1:-1:4].size)
        row, numbers = values.copy(), values.copy()
        rows_and_numbers(0, row, numbers, 1, count, code)
        assert row[[0, -1]].tobytes() == values[[0, -1]].tobytes()
        np.testing.assert_array_equal(row, numbers)


@jit.kernel(parallel=False)
def arrays_of_a_kernel(count, like, places):
    memory, cleared = scratch(count, like), zeros(count, like)
    steps, whole, table = progression(3, count), integers(count), integer_table(count, 5)
    for i in range(memory.size):
        memory[i] = 1
    for i in range(count):
        whole[i] = -i
        for j in range(5):
            table[i, j] = 5 * i + j
    places[0], places[1] = memory.ctypes.data, table.ctypes.data
    return memory, cleared, steps, whole, table


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
@pytest.mark.parametrize("count", [0, 1, 37])
def test_arrays_made_in_a_kernel(dtype, count):
    places = np.empty(2, np.int64)
    memory, cleared, steps, whole, table = arrays_of_a_kernel(0, count, np.empty(0, dtype), places)
    assert not (places % ALIGNMENT).any()
    assert memory.dtype == dtype
    np.testing.assert_array_equal(memory, np.ones(count + ALIGNMENT // np.dtype(dtype).itemsize))
    np.testing.assert_array_equal(cleared, np.zeros(count, dtype))
    np.testing.assert_array_equal(steps, 3 * np.arange(count))
    np.testing.assert_array_equal(whole, -np.arange(count))
    np.testing.assert_array_equal(table, np.arange(5 * count).reshape(count, 5))
