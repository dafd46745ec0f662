"""Planted bugs are caught, and right kernels are not: the emulator's reason to be."""

import re

import numpy as np
import pytest
from simt import emulator as simt

if simt.why_not():
    pytest.skip(simt.why_not(), allow_module_level=True)

from numba import cuda
from numba.cuda import types
from simt.emulator import SCHEDULES, EmulatedFault, Emulator
from simt.mutation import mutated, without_ordering
from simt.small import small_kernel

from tilewise.kernels.cuda.launch import ELEMENTS, INT32, INT64
from tilewise.kernels.cuda.memory import at, lanes, load_vector, registers, shared, store_vector
from tilewise.kernels.cuda.ptx import commit_copies, copy_async, wait_copies
from tilewise.kernels.device_arrays import HostPlace

SINGLE = np.dtype(np.float32)


def reversed_blocks(x: ELEMENTS, y: ELEMENTS, n: INT32):
    """y = x, reversed in blocks of 64, by way of shared memory."""
    t, first = cuda.threadIdx.x, cuda.blockIdx.x * 64
    room = shared(x, 64)
    room[t] = x[first + t]
    cuda.syncthreads()
    y[first + t] = room[63 - t]


def sums_of_warps(x: ELEMENTS, y: ELEMENTS, n: INT32):
    """y[b] = sum of block b of 64, with shuffles in a warp and shared memory between the two."""
    t, b = cuda.threadIdx.x, cuda.blockIdx.x
    partial = shared(x, 2)
    value = x[64 * b + t]
    step = 16
    while step:
        value += cuda.shfl_xor_sync(0xFFFFFFFF, value, step)
        step //= 2
    if t % 32 == 0:
        partial[t // 32] = value
    cuda.syncthreads()
    if t == 0:
        y[b] = partial[0] + partial[1]


def pipelined(x: ELEMENTS, y: ELEMENTS, n: INT32):
    """y[t] = sum over k of 1 + k times x[64 k + 63 - t], k < n: tiles of 64 copied one ahead into two buffers."""
    t = cuda.threadIdx.x
    room = shared(x, 128)
    copy_async(4, at(room, t), at(x, t), 4)
    commit_copies()
    total = registers(x, 1)
    total[0] = x[0] - x[0]
    for k in range(n):
        if k + 1 < n:
            copy_async(4, at(room, 64 * ((k + 1) % 2) + t), at(x, 64 * (k + 1) + t), 4)
        commit_copies()
        wait_copies(1)
        cuda.syncthreads()
        total[0] += (1 + k) * room[64 * (k % 2) + 63 - t]
        cuda.syncthreads()
    wait_copies(0)
    y[t] = total[0]


def in_a_warp(x: ELEMENTS, y: ELEMENTS, n: INT32):
    """y = x, each 32 reversed, without a barrier for the block."""
    t = cuda.blockIdx.x * 64 + cuda.threadIdx.x
    room = shared(x, 64)
    room[cuda.threadIdx.x] = x[t]
    cuda.syncwarp()
    y[t] = room[cuda.threadIdx.x // 32 * 32 + 31 - cuda.threadIdx.x % 32]


def local_sum(x: ELEMENTS, y: ELEMENTS, n: INT32):
    i = cuda.blockIdx.x * 64 + cuda.threadIdx.x
    if i < n:
        y[i] = x[i] + x[i + 1]


N = 5
X = np.random.default_rng(7).integers(1, 9, (N, 64)).astype(SINGLE)
# kernel -> (grid, n, what it makes of X)
RIGHT = {
    reversed_blocks: (N, N, X[:, ::-1]),
    sums_of_warps: (N, N, X.sum(1)),
    pipelined: (1, N, (X[:, ::-1] * np.arange(1, N + 1)[:, None]).sum(0)),
    in_a_warp: (N, N, X.reshape(-1, 32)[:, ::-1]),
    local_sum: (N, X.size - 1, X.ravel()[:-1] + X.ravel()[1:]),
}
WRONG = {
    "missing barrier": (reversed_blocks, "cuda.syncthreads()", "pass", "race in shared memory"),
    "missing barrier after shuffles": (sums_of_warps, "cuda.syncthreads()", "pass", "race in shared memory"),
    "barrier that some threads skip": (
        reversed_blocks, "    cuda.syncthreads()", "    if t < 40:\n        cuda.syncthreads()",
        "race in shared memory",
    ),
    "barrier in two branches": (
        reversed_blocks, "    cuda.syncthreads()",
        "    if t < 40:\n        cuda.syncthreads()\n        room[t] += 0\n    else:\n        cuda.syncthreads()",
        "wait at different barriers",
    ),
    "missing syncwarp": (in_a_warp, "cuda.syncwarp()", "pass", "race in shared memory"),
    "shuffle of half a warp": (
        sums_of_warps, "value += cuda.shfl", "if t % 32 < 16 or step < 16:\n            value += cuda.shfl",
        "is stuck|take part|different",
    ),
    "missing wait": (pipelined, "wait_copies(1)", "pass", "cp.async is still filling"),
    "wait for one too few": (pipelined, "wait_copies(1)", "wait_copies(2)", "cp.async is still filling"),
    "missing commit": (pipelined, "        commit_copies()\n        wait", "        wait", "is still filling"),
    "commit in a branch only": (
        pipelined, "        commit_copies()\n        wait", "            commit_copies()\n        wait",
        "cp.async is still filling",
    ),
    "missing last wait": (
        pipelined, "if k + 1 < n:", "if k + 1 < n + 1:", "nobody waited for|outside of an array",
    ),
    "missing barrier before the copy": (
        pipelined, "63 - t]\n        cuda.syncthreads()", "63 - t]", "without a barrier between|still filling",
    ),
    "one buffer instead of two": (pipelined, "64 * ((k + 1) % 2) + t", "t", "still filling|race|wrong"),
    "one beyond the shared array": (reversed_blocks, "63 - t", "64 - t", "4 bytes beyond shared memory of 256 bytes"),
    "one before the array": (local_sum, "x[i] +", "x[i - 1] +", "reads outside of an array: 4 bytes before an array"),
    "one beyond the array": (local_sum, "x[i + 1]", "x[i + 2]", "reads outside of an array: 4 bytes beyond an array"),
    "writes one too many": (local_sum, "if i < n", "if i <= n", "outside of an array: 4 bytes beyond an array"),
    "reads the wrong one": (local_sum, "x[i + 1]", "x[i]", "wrong"),
}  # fmt: skip


def outcomes(function, annotations, grid, n, expected, schedules=tuple(SCHEDULES)) -> set[str]:
    """What happens on each schedule: "right", "wrong", or the fault."""
    function.__annotations__ = annotations
    kernel, codes, seen = small_kernel(function, threads=64), {}, set()
    for schedule in schedules:
        for eager in (False, True):
            emulator = Emulator(schedule=schedule, eager_copies=eager)
            emulator._codes = codes
            place = HostPlace(emulator)
            x, y = place.copy_in(X), place.empty(expected.shape, SINGLE)
            try:
                kernel(place, grid, x, y, n)
                seen.add("right" if np.array_equal(place.copy_out(y), expected) else "wrong")
            except EmulatedFault as fault:
                seen.add(str(fault))
    return seen


@pytest.mark.parametrize("function", RIGHT, ids=lambda f: f.__name__)
def test_right_kernels_are_right_on_every_schedule(function):
    assert outcomes(function, dict(function.__annotations__), *RIGHT[function]) == {"right"}


@pytest.mark.parametrize("bug", WRONG)
def test_planted_bug_is_caught(bug):
    function, old, new, message = WRONG[bug]
    seen = outcomes(mutated(function, old, new), dict(function.__annotations__), *RIGHT[function])
    assert all(re.search(message, text) for text in seen - {"right"}), seen
    assert seen - {"right"}, "on no schedule"


@pytest.mark.parametrize("function", [reversed_blocks, sums_of_warps, pipelined, in_a_warp], ids=lambda f: f.__name__)
def test_everything_that_orders_is_needed(function):
    count = 0
    for what, wrong in without_ordering(function):
        count += 1
        if function is pipelined and "wait_copies(0)" in what:
            continue  # the last group holds no copy
        assert outcomes(wrong, dict(function.__annotations__), *RIGHT[function], ("forward",)) != {"right"}, what
    assert count > 0


def large_local_array(x: ELEMENTS, y: ELEMENTS, n: INT32):
    room = registers(x, 70_000)
    for i in range(70_000):
        room[i] = x[i % 64]
    y[cuda.threadIdx.x] = room[n + cuda.threadIdx.x]


def test_overflow_of_a_stack_is_noticed():
    (seen,) = outcomes(large_local_array, dict(large_local_array.__annotations__), 1, 3, X[0], ("forward",))
    assert "overflow the stack of 256 KB" in seen


def numbas_own_shared_array(x: ELEMENTS, y: ELEMENTS, n: INT32):
    t = cuda.threadIdx.x
    room = cuda.shared.array(64, types.int64)
    room[t] = t
    cuda.syncthreads()
    y[t] = room[63 - t + n]


def test_shared_arrays_of_numba_are_watched_too():
    annotations = dict(numbas_own_shared_array.__annotations__)
    expected = np.arange(63, -1, -1).astype(SINGLE)
    assert outcomes(numbas_own_shared_array, annotations, 1, 0, expected, ("forward",)) == {"right"}
    (seen,) = outcomes(numbas_own_shared_array, annotations, 1, 1, expected, ("forward",))
    assert "8 bytes beyond shared memory of 512 bytes" in seen


def vector_from(x: ELEMENTS, y: ELEMENTS, first: INT64):
    values = registers(x, 16)
    load_vector(values, x, first + cuda.threadIdx.x * lanes(x))
    store_vector(y, cuda.threadIdx.x * lanes(x), values)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_vectors_from_addresses_that_are_no_multiples(dtype):
    place = HostPlace(Emulator())
    x = np.arange(40, dtype=dtype)
    source, target = place.copy_in(x), place.copy_in(x)
    read = small_kernel(vector_from, threads=2)
    read(place, 1, source, target, 16 // x.itemsize)
    np.testing.assert_array_equal(place.copy_out(target)[:4], x[16 // x.itemsize :][:4])
    with pytest.raises(EmulatedFault, match="from an address that is not a multiple of 16"):
        read(place, 1, source, target, 1)
