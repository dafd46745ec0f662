"""Every barrier, wait and commit of tilewise's own kernels is needed, and the emulator sees it when one is missing.

Calls that use shared memory are run; when they launch a kernel for the first time, it is launched again on the same
memory without each of its barriers (and so on) in turn. What makes no difference on any schedule is either not needed
or not seen: both are faults. Barriers inside device functions of a module, such as reduction.py's, are not taken out.
"""

import copy
import inspect
from typing import ClassVar

import numpy as np
import pytest
from simt import emulator as simt

if simt.why_not():
    pytest.skip(simt.why_not(), allow_module_level=True)

from gpu_compile import load_kernels
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
    "matmul of halves": (((72, 72), (72, 80)), {}),
    "matmul of few rows": (((3, 300), (300, 40)), {}),
    "linear": (((40, 70), (30, 70), (30,)), {}),
    "conv2d": (((1, 20, 14, 14), (40, 20, 3, 3), (40,)), {"padding": 1}),
    "conv2d of stride 2": (((1, 20, 14, 14), (40, 20, 3, 3)), {"stride": 2, "padding": 1}),
    "conv2d of groups": (((1, 20, 14, 14), (20, 1, 3, 3)), {"padding": 1, "groups": 20}),
    "conv2d of channels last": (((1, 9, 9, 16), (70, 16, 3, 3), (70,)), {"padding": 1, "layout": "NHWC"}),
    "conv2d_backward": (((1, 20, 14, 14), (1, 20, 14, 14), (20, 20, 3, 3)), {"padding": 1}),
    "conv2d of whole steps": (((1, 16, 9, 9), (20, 16, 3, 3)), {"padding": 1}),
    "conv2d_backward of channels last": (
        ((1, 9, 9, 20), (1, 9, 9, 20), (20, 20, 3, 3)),
        {"padding": 1, "layout": "NHWC", "needs": ("x", "weight")},
    ),
    "conv2d_backward of groups": (
        ((1, 20, 14, 14), (1, 20, 14, 14), (20, 1, 3, 3)),
        {"padding": 1, "groups": 20, "needs": ("weight", "bias")},
    ),
    "conv2d_backward of groups, channels last": (
        ((1, 14, 14, 40), (1, 14, 14, 40), (40, 1, 3, 3)),
        {"padding": 1, "groups": 40, "layout": "NHWC", "needs": ("weight", "bias")},
    ),
    "conv2d_backward of few weights": (((1, 2, 13, 13), (1, 2, 14, 14), (2, 2, 2, 2)), {"needs": ("weight",)}),
    "linear_backward": (((40, 30), (40, 70), (30, 70)), {"needs": ("bias",)}),
    "max_pool2d": (((2, 5, 20, 40), 3), {"stride": 2, "padding": 1}),
    "adaptive_avg_pool2d": (((2, 40, 13, 13), 1), {}),
    "adaptive_avg_pool2d of channels last": (((2, 13, 13, 40), 1), {"layout": "NHWC"}),
    "adaptive_avg_pool2d of 7 channels, last": (((2, 13, 13, 7), 1), {"layout": "NHWC"}),
    "batch_norm": (((4, 6, 20, 20), (6,), (6,), (6,), (6,)), {"training": True}),
    "batch_norm_backward": (((4, 6, 20, 20), (4, 6, 20, 20), (6,), (6,), (6,)), {}),
    "batch_norm of odd planes": (((4, 6, 9, 9), (6,), (6,), (6,), (6,)), {"training": True}),
    "batch_norm of channels last": (((4, 9, 9, 8), (8,), (8,), (8,), (8,)), {"training": True, "layout": "NHWC"}),
    "batch_norm of 7 channels, last": (((4, 9, 9, 7), (7,), (7,), (7,), (7,)), {"training": True, "layout": "NHWC"}),
    "batch_norm_backward of odd planes": (((4, 6, 9, 9), (4, 6, 9, 9), (6,), (6,), (6,)), {}),
    "batch_norm_backward of channels last": (((4, 9, 9, 8), (4, 9, 9, 8), (8,), (8,), (8,)), {"layout": "NHWC"}),
    "batch_norm_backward of 7 channels, last": (((4, 9, 9, 7), (4, 9, 9, 7), (7,), (7,), (7,)), {"layout": "NHWC"}),
    "softmax": (((5, 1500),), {}),
    "softmax of columns": (((3, 40, 30),), {"axis": 1}),
    "softmax_backward of columns": (((3, 40, 30), (3, 40, 30)), {"axis": 1}),
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
HALVES = ("matmul", "matmul of halves", "conv2d of channels last", "conv2d_backward")


ALL = [*((c, np.float32) for c in CALLS if "halves" not in c), *((c, np.float16) for c in HALVES)]


def run(emulator, rng, monkeypatch, call, dtype):
    shapes, options = CALLS[call]
    # one: the largest tile
    monkeypatch.setattr(emulator, "multiprocessors", 1 if "whole vectors" in call else 4)
    operands = [rng.standard_normal(s).astype(dtype) if isinstance(s, tuple) else s for s in shapes]
    function = call.split(" ")[0]
    if function == "batch_norm":
        operands[2] = np.abs(operands[2])
    getattr(kernels, function)(*operands, **options)


@pytest.mark.parametrize(("call", "dtype"), ALL)
def test_everything_that_orders_threads_is_needed(search, rng, monkeypatch, call, dtype):
    run(search.emulator, rng, monkeypatch, call, dtype)
    assert search.unnoticed == []


def written(kernel) -> tuple:
    """A kernel as it is written: what a factory makes of it for tiles and dtypes is one, in two layouts it is two."""
    code = kernel.function.__code__
    forms = "nchw", "nhwc", "whole", "copies", "vectors", "elements"
    return code.co_filename, code.co_firstlineno, *(form for form in forms if form in kernel.name)


def orders_threads(function) -> bool:
    """Whether its source, or that of a device function that it calls, has a barrier or a wait."""
    source = inspect.getsource(function)
    known = inspect.getclosurevars(function)
    called = [v.py_func for v in (known.globals | known.nonlocals).values() if hasattr(v, "py_func")]
    return any(f"{name}(" in source for name in ("syncthreads", "wait_copies")) or any(map(orders_threads, called))


def test_the_calls_launch_every_kernel_that_orders_its_threads(gpu, rng, monkeypatch):
    if gpu.schedule == "real":
        pytest.skip("needs the emulator")
    gpu.launched.clear()
    for call, dtype in ALL:
        run(gpu, rng, monkeypatch, call, dtype)
    ours = [kernel for kernel in load_kernels("cuda") if orders_threads(kernel.function)]
    names = {name for name, _ in gpu.launched}
    reached = {written(kernel) for kernel in ours if kernel.name in names}
    assert [kernel.name for kernel in ours if written(kernel) not in reached] == []


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
