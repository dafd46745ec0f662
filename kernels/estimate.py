"""Whether arrays of the host are worth sending to a GPU: a fixed estimate, in which nothing is measured.

    here    the larger of FLOPs / CPU_FLOPS / cores and bytes / CPU_BYTES
    there   CALL + bytes / TRANSFER + the larger of FLOPs / its nominal rate and bytes / its memory's, at EFFICIENCY

Operands and results cross the bus once, which is what a problem's bytes count. A call goes there if it is estimated to
be `AHEAD` times as fast, and the arrays fit its memory with room. The CPU is taken for a fast one, so that a doubtful
call stays; its rates and cores are the machine's, never the thread count of a call, whose bits must not depend on it.
"""

import os
from dataclasses import dataclass

CPU_FLOPS = 100e9  # float32 of a core with AVX2; float64 half
CPU_BYTES = 40e9
TRANSFER = 10e9  # bytes a second over PCI Express from and to memory that is not pinned
CALL = 50e-6  # seconds for allocations, copies and launches
EFFICIENCY = 0.6
AHEAD = 2.0
_ROOM = 0.4  # of the device's memory


@dataclass(frozen=True, slots=True)
class GpuRates:
    """A GPU's nominal float32 FLOPs and bytes a second, its float64 FLOPs as a part of that, its bytes of memory."""

    flops: float
    bytes: float
    double: float
    memory: int


def seconds_here(flops: int, moved: int, itemsize: int) -> float:
    rate = CPU_FLOPS * (os.cpu_count() or 1) / (2 if itemsize == 8 else 1)
    return max(flops / rate, moved / CPU_BYTES)


def seconds_there(flops: int, moved: int, itemsize: int, gpu: GpuRates) -> float:
    rate = gpu.flops * (gpu.double if itemsize == 8 else 1.0)
    return CALL + moved / TRANSFER + max(flops / rate, moved / gpu.bytes) / EFFICIENCY


def why_not(flops: int, moved: int, itemsize: int, gpu: GpuRates) -> str | None:
    """Why a call stays on the CPU; None where it is worth sending."""
    if moved > _ROOM * gpu.memory:
        return f"{moved:,} bytes do not fit the GPU's memory with room"
    here, there = seconds_here(flops, moved, itemsize), seconds_there(flops, moved, itemsize, gpu)
    if AHEAD * there <= here:
        return None
    return f"estimated {there * 1e3:.3g} ms with the transfers, {here * 1e3:.3g} ms here; twice as fast would do"
