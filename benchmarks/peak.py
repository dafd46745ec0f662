"""What this machine can do at most: multiply-adds from registers and L1, and a copy of memory."""

import time

import numpy as np
from numba import prange

from tilewise.kernels.cpu.jit import kernel
from tilewise.kernels.cpu.scratch import scratch
from tilewise.kernels.cpu.simd import MR, NV, address, lane_count, lanes, micro_kernel

_DEPTH = 128  # a panel of each operand: 7 KB and 16 KB, both in L1
_REPEATS = 400


@kernel()
def _multiply_in_cache(example, threads, sums):
    width = NV * lanes(example)  # pyright: ignore[reportCallIssue]
    for chunk in prange(threads):
        a, b, c = scratch(_DEPTH * MR, example), scratch(_DEPTH * width, example), scratch(MR * width, example)
        a[:], b[:], c[:] = 0, 0, 0
        for _ in range(_REPEATS):
            micro_kernel(
                MR, NV, address(a, 0), MR, address(b, 0), width, _DEPTH, address(c, 0), width, MR, width, 1
            )  # fmt: skip
        sums[chunk] = c[0]


def peaks(threads: int, seconds: float = 0.3) -> dict[str, float]:
    """{"GFLOP/s": multiply-adds of float32, "GB/s": bytes read and written by a copy}."""
    example, sums = np.zeros(1, np.float32), np.empty(threads, np.float32)
    flops = threads * 2 * MR * NV * lane_count(4) * _DEPTH * _REPEATS
    source, target = np.ones(1 << 24, np.float32), np.empty(1 << 24, np.float32)
    return {
        "GFLOP/s": flops / _best(lambda: _multiply_in_cache(1e9, example, threads, sums), seconds) / 1e9,
        "GB/s": 2 * source.nbytes / _best(lambda: np.copyto(target, source), seconds) / 1e9,
    }


def _best(call, seconds: float) -> float:
    call()
    best, end = np.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return float(best)
