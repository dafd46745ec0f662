"""Every barrier, wait and commit of tilewise's own kernels is needed, and the emulator sees it when one is missing.

Calls that use shared memory are run; when they launch a kernel for the first time, it is launched again on the same
memory without each of its barriers (and so on) in turn. What makes no difference on any schedule is either not needed
or not seen: both are faults.
"""

import copy
from typing import ClassVar

import numpy as np
import pytest
from simt import emulator as simt

if simt.why_not():
    pytest.skip(simt.why_not(), allow_module_level=True)

from numba import cuda
from simt.emulator import EmulatedFault
from simt.mutation import without_ordering
from simt.small import small_kernel

from tilewise import kernels
from tilewise.kernels.cuda.launch import ELEMENTS
from tilewise.kernels.cuda.memory import shared
from tilewise.kernels.device_arrays import HostPlace

SCHEDULES = (("forward", False), ("reverse", True), ("shuffled", False), ("warps reversed", True))

# Several tiles along every axis; name -> (shapes or other operands, options)
CALLS = {
    "matmul": (((140, 70), (70, 150)), {}),
    "matmul of whole vectors": (((132, 72), (72, 152)), {}),
    "matmul of few rows": (((3, 300), (300, 40)), {}),
    "linear": (((40, 70), (30, 70), (30,)), {}),
    "conv2d": (((1, 20, 14, 14), (40, 20, 3, 3), (40,)), {"padding": 1}),
    "conv2d of stride 2": (((1, 20, 14, 14), (40, 20, 3, 3)), {"stride": 2, "padding": 1}),
    "conv2d of groups": (((1, 20, 14, 14), (20, 1, 3, 3)), {"padding": 1, "groups": 20}),
    "conv2d of channels last": (((1, 9, 9, 16), (70, 16, 3, 3), (70,)), {"padding": 1, "layout": "NHWC"}),
    "conv2d_backward": (((1, 20, 14, 14), (1, 20, 14, 14), (20, 20, 3, 3)), {"padding": 1}),
    "max_pool2d": (((2, 5, 20, 40), 3), {"stride": 2, "padding": 1}),
    "adaptive_avg_pool2d": (((2, 40, 13, 13), 1), {}),
    "batch_norm": (((4, 6, 20, 20), (6,), (6,), (6,), (6,)), {"training": True}),
    "batch_norm_backward": (((4, 6, 20, 20), (4, 6, 20, 20), (6,), (6,), (6,)), {}),
    "softmax": (((5, 1500),), {}),
    "log_softmax": (((5, 1500),), {}),
    "softmax_backward": (((5, 1500), (5, 1500)), {}),
}


class Search:
    """Launches each kernel as it is, and the first time also without each thing that orders its threads.

    Once its absence was noticed, in whichever call, that is enough. What belongs to a device function, such as the loop
    of a product, is tried in one of the kernels that have it; and in one that copies asynchronously.
    """

    noticed: ClassVar[set[tuple]] = set()

    def __init__(self, emulator):
        self.emulator, self.seen, self.unnoticed, self.tried = emulator, set(), [], 0
        self._start = emulator.start

    def start(self, form, grid, shared, stream, slots):
        launch = grid, shared, stream, slots
        if (form.kernel.name, form.dtype) in self.seen:
            self._start(form, *launch)
            return
        self.seen.add((form.kernel.name, form.dtype))
        before = self._memory()
        self._start(form, *launch)
        after = self._memory()
        for what, function in without_ordering(form.kernel.function):
            key = what, form.kernel.least if " in " in what else form.kernel.name
            if key in self.noticed:
                continue
            wrong = copy.copy(form.kernel)
            wrong.function, wrong._forms = function, {}
            self.tried += 1
            if self._differs(wrong.form(form.dtype), launch, before, after):
                self.noticed.add(key)
            else:
                self.unnoticed.append(f"{form.kernel.name} {form.dtype}: without {what}")
        self._restore(after)

    def _differs(self, form, launch, before, after) -> bool:
        for self.emulator.schedule, self.emulator.eager_copies in SCHEDULES:
            self._restore(before)
            try:
                self._start(form, *launch)
            except EmulatedFault:
                return True
            if any((m.bytes != bytes_).any() for m, bytes_ in after):
                return True
        return False

    def _memory(self):
        memories = [m for reference in self.emulator._memories if (m := reference()) is not None]
        return [(m, m.bytes.copy()) for m in memories]

    def _restore(self, state):
        for memory, bytes_ in state:
            memory.bytes[:] = bytes_


@pytest.fixture
def search(gpu, monkeypatch):
    if gpu.schedule == "real":
        pytest.skip("needs the emulator")
    search = Search(gpu)
    monkeypatch.setattr(gpu, "start", search.start)
    return search


# float16 where it has kernels of its own, on tensor cores
HALVES = ("matmul", "conv2d of channels last", "conv2d_backward")


@pytest.mark.parametrize(
    ("call", "dtype"), [*((c, np.float32) for c in CALLS if "last" not in c), *((c, np.float16) for c in HALVES)]
)
def test_everything_that_orders_threads_is_needed(search, rng, monkeypatch, call, dtype):
    shapes, options = CALLS[call]
    if "whole vectors" in call:
        monkeypatch.setattr(search.emulator, "multiprocessors", 1)  # the largest tile
    operands = [rng.standard_normal(s).astype(dtype) if isinstance(s, tuple) else s for s in shapes]
    if call == "batch_norm":
        operands[2] = np.abs(operands[2])
    getattr(kernels, call.split(" ")[0])(*operands, **options)
    assert search.unnoticed == []


def with_a_spare_barrier(x: ELEMENTS, y: ELEMENTS):
    t = cuda.threadIdx.x
    room = shared(x, 64)
    room[t] = x[t]
    cuda.syncthreads()
    y[t] = room[63 - t]
    cuda.syncthreads()


def test_the_search_finds_what_is_not_needed(search):
    place = HostPlace(search.emulator)
    x = np.arange(64, dtype=np.float32)
    view, result = place.copy_in(x), place.empty((64,), np.float32)
    small_kernel(with_a_spare_barrier, threads=64)(place, 1, view, result)
    line = with_a_spare_barrier.__code__.co_firstlineno + 6
    assert search.unnoticed == [f"with_a_spare_barrier float32: without cuda.syncthreads() of line {line}"]
    assert search.tried == 2
    np.testing.assert_array_equal(place.copy_out(result), x[::-1])
