"""Arrays that kernels make: their contents, and that their memory is given back however they are used."""

import numpy as np
import pytest
from numba import prange

from tilewise.kernels.cpu import jit
from tilewise.kernels.cpu.scratch import (
    ALIGNMENT,
    double_zeros,
    integer_table,
    integers,
    keep,
    progression,
    scratch,
    zeros,
)


@jit.device(allocates=True)
def _scratch_of(like, count):
    return scratch(count, like)


def _fill(like, chunks, result):
    """Every kind of array in a loop that may be split, replaced, returned by a device function, and held by views."""
    for chunk in prange(chunks):
        count = np.int64(chunk) + 3
        held = _scratch_of(like, count)
        for _ in range(3):
            held = _scratch_of(like, count)
            held[:] = 1
        view = held[1:]
        table, steps, numbers = integer_table(2, count), progression(5, count), integers(count)
        table[:] = chunk
        numbers[:] = 7
        doubles = double_zeros(count)
        doubles[2] += 1 / 3
        result[chunk] = zeros(count, like).sum() + doubles.sum() * 3 - 1
        result[chunk] += view[:count].sum() + table[1].sum() + steps[2] + numbers[1]
        result[chunk] += held.ctypes.data % ALIGNMENT
        keep(held)


fill = jit.kernel()(_fill)


@pytest.mark.parametrize("form", ["serial", "parallel"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arrays_of_kernels_are_freed_once(allocations, form, dtype):
    chunks = 9
    like, result = np.empty(0, dtype), np.zeros(chunks)
    call = getattr(fill, form)
    call(like, chunks, result)
    before = allocations()
    call(like, chunks, result)
    allocated, freed = (after - earlier for after, earlier in zip(allocations(), before, strict=True))
    i = np.arange(chunks)
    np.testing.assert_array_equal(result, (i + 3) + i * (i + 3) + 10 + 7)
    assert allocated == freed >= chunks * 9  # the parallel form has some of its own
