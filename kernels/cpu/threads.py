"""Threads: which pool, how many, and when not.

- Pool: TBB where the `tbb` distribution is installed. An idle OpenMP pool spins and slows whatever runs next to it
  (NumPy's BLAS by several times), and a forked child that uses one is killed. Numba does not look for libtbb inside a
  Python environment, so it is loaded here, just before the first parallel kernel. A user's NUMBA_THREADING_LAYER wins,
  and nothing is set for the whole process.
- A forked child of a process that used OpenMP runs serial kernels. Under Numba's workqueue, which two threads must not
  enter at once, launches take turns.
- Small problems stay serial: a launch costs a few microseconds.
- Each thread gets an equal share of the chunks, one after the other in memory. Of a long product or convolution they
  are handed out one by one instead, for a thread whose core is taken holds up the others by one chunk then, and not by
  its whole share: OpenBLAS' threads spin for 2**26 cycles after a product. A convolution of 5.6 ms that alternates with
  np.matmul took 2.2 times as long as both alone, now 1.6. Passes that wait for memory lose 2 to 8 % of their speed by
  it, and gain nothing where they are short.
"""

import ctypes
import os
import sys
import threading
from contextlib import contextmanager

import numba

from tilewise.kernels import settings

# Estimated serial time in nanoseconds below which a kernel is not split. A launch costs 2.5 microseconds while TBB's
# thread waits for work, 6 to 14 once it sleeps, and the second core's caches start cold. Squares of n in halves, best
# and median microseconds on two cores of Zen 4, serial -> two threads:
#
#     n     one after another      a millisecond apart
#     64     5.0 ->  6.8  ( 7.8)    5.1 (6.0) -> 15.3 (18.7)
#     80     9.4 ->  9.4  ( 9.7)    9.5 (11)  -> 16.1 (22.8)
#     112   26   -> 18.9  (19.3)    26  (28)  -> 22.4 (33.7)
#     128   38   -> 25.6  (26.8)    39  (40)  -> 30.2 (41.4)
#     256  300   -> 165    (170)   293 (302)  -> 197   (234)
#
# So the least that pays in a row of calls is 10 microseconds, and what also costs little apart is two and
# a half times that.
SERIAL_BELOW = 25_000

# Estimated serial time in nanoseconds from which chunks are handed out one by one: asking for it costs 3 microseconds.
ONE_BY_ONE_FROM = 1_000_000

_lock = threading.Lock()
_layer: str | None = None  # known after the first launch
_forked_from_openmp = False


def may_split() -> bool:
    """False where only one thread is wanted, or where a split would kill the process."""
    if _forked_from_openmp:
        return False
    wanted = settings.active().threads
    limit = numba.config.NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue]
    return limit > 1 and wanted != 1


def launch(kernel, args: tuple, one_by_one: bool = False):
    """Run a parallel kernel on the wanted number of threads; the caller's own thread count is restored.

    one_by_one: hand its chunks out to whichever thread is free, where the pool is TBB.
    """
    if _layer is None:
        with _lock:
            if _layer is None:
                return _first_launch(kernel, args)
    if _layer == "workqueue":
        with _lock:
            return _run(kernel, args)
    if not one_by_one or _layer != "tbb":
        return _run(kernel, args)
    before = numba.set_parallel_chunksize(1)
    try:
        return _run(kernel, args)
    finally:
        numba.set_parallel_chunksize(before)


def _run(kernel, args: tuple):
    wanted = settings.active().threads
    if wanted is None or wanted == numba.get_num_threads():
        return kernel(*args)
    with _thread_count(wanted):
        return kernel(*args)


@contextmanager
def _thread_count(wanted: int):
    before = numba.get_num_threads()
    numba.set_num_threads(wanted)
    try:
        yield
    finally:
        numba.set_num_threads(before)


def _first_launch(kernel, args: tuple):
    global _layer
    load_tbb()
    result = _run(kernel, args)
    _layer = numba.threading_layer()
    return result


def load_tbb() -> str | None:
    """Load libtbb from the `tbb` distribution, so that Numba finds it; the path, or None where there is none."""
    if sys.platform != "linux" or os.environ.get("NUMBA_THREADING_LAYER"):
        return None
    from importlib.metadata import PackageNotFoundError, files

    try:
        candidates = [file for file in files("tbb") or () if file.name == "libtbb.so.12"]
    except PackageNotFoundError:
        return None
    for candidate in candidates:
        try:
            ctypes.CDLL(str(candidate.locate()), mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return str(candidate.locate())
    return None


def layer() -> str:
    """The threading layer in use, started if need be: "tbb", "omp" or "workqueue"."""
    from tilewise.kernels.cpu.jit import FASTMATH, compiled

    if _layer is None:
        launch(compiled(_touch, FASTMATH, parallel=True), (2,))
    assert _layer is not None
    return _layer


def _touch(n):
    total = 0
    for i in numba.prange(n):
        total += i
    return total


def _after_fork_in_child():
    global _lock, _forked_from_openmp
    _lock = threading.Lock()  # another thread of the parent may have held it
    _forked_from_openmp = _layer == "omp"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
