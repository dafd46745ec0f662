"""A kernel's forms: which one a call takes, and the entries for repeated calls."""

import numpy as np
import pytest
from numba import prange

import tilewise
from tilewise.kernels.cpu import jit, threads


def _doubled(source, factor, result):
    for i in prange(result.size):
        result[i] = source[i] * factor


doubled = jit.kernel()(_doubled)
serial_only = jit.kernel(parallel=False)(_doubled)
long_chunks = jit.kernel(one_by_one=True)(_doubled)
SMALL, LARGE = threads.SERIAL_BELOW - 1, threads.SERIAL_BELOW
FORMS = [(doubled, SMALL), (doubled, LARGE), (serial_only, LARGE), (long_chunks, SMALL), (long_chunks, LARGE)]


@pytest.fixture
def launched(monkeypatch):
    """What was launched in parallel, as (kernel, one by one)."""
    calls = []
    launch = threads.launch
    monkeypatch.setattr(threads, "launch", lambda form, *a: (calls.append((form, *a[1:])), launch(form, *a))[1])
    return calls


@pytest.mark.parametrize(("kernel", "work"), FORMS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bound_sized_and_plain_calls_agree(rng, launched, kernel, work, dtype):
    source = rng.standard_normal(37).astype(dtype)
    bound = kernel.bound(work, source[:0], 3, source[:0])
    sized = kernel.sized(work)
    for call in (bound, sized, lambda *a: kernel(work, *a)):
        launched.clear()
        result = np.zeros_like(source)
        with tilewise.using(threads=2):
            call(source, 3, result)
        np.testing.assert_array_equal(result, source * dtype(3))
        assert bool(launched) == (work == LARGE and kernel.has_parallel)


def test_bound_goes_to_the_machine_code_where_work_is_small():
    """Without Numba's look at the arguments: the entry compiled for just these types, one for each dtype."""
    entries = []
    for dtype in (np.float32, np.float64, np.float32):
        like = np.empty(0, dtype)
        entries.append(doubled.bound(SMALL, like, 3, like))
        assert entries[-1] in [overload.entry_point for overload in doubled.serial.overloads.values()]
    assert entries[0] is entries[2]
    assert entries[0] is not entries[1]


def test_bound_to_large_work_stays_serial_where_threads_are_not_wanted(launched):
    like = np.ones(5, np.float32)
    with tilewise.using(threads=1):
        doubled.bound(LARGE, like, 3, like)(like, 3, np.empty_like(like))
    assert not launched


@pytest.mark.parametrize("kernel", [doubled, long_chunks])
def test_only_long_chunks_of_large_problems_are_handed_out_one_by_one(launched, kernel):
    source, result = np.ones(37), np.zeros(37)
    with tilewise.using(threads=2):
        for work in (LARGE, threads.ONE_BY_ONE_FROM - 1, threads.ONE_BY_ONE_FROM):
            kernel(work, source, 3, result)
    assert launched == [(kernel.parallel, False)] * 2 + [(kernel.parallel, kernel is long_chunks)]


def test_only_the_loops_that_we_mark_run_in_parallel(monkeypatch):
    """In each kernel of a process, and for each signature of one."""

    def shifted(result, steps):
        result[:] = 0.5
        for i in prange(steps.size):
            result[i] += steps[i]

    monkeypatch.setattr(jit, "_open_cache", lambda function: None)
    for _ in range(2):
        form = jit.compiled(shifted, jit.FASTMATH, parallel=True)
        for dtype in (np.float32, np.float64):
            result = np.empty(5)
            form(result, np.arange(3, dtype=dtype))
            np.testing.assert_array_equal(result, [0.5, 1.5, 2.5, 0.5, 0.5])
        for compiled in form.overloads.values():
            assert compiled.metadata["parfor_diagnostics"].count_parfors() == 1
