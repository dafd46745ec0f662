"""Threads: two of Python's at once, forks, thread counts, and Numba's three layers. Each in a process of its own,
because a layer is chosen once a process, and because what goes wrong here ends the process."""

import os

import pytest
from installation import run_python

from tilewise.kernels.cpu import threads

# Defines work(): a matmul, a pooling and an activation, all forced into their parallel form, with their right results.
SETUP = """
import os, sys, threading
import numpy as np
import tilewise as t
from tilewise.kernels.cpu import threads
threads.SERIAL_BELOW = 0
rng = np.random.default_rng(0)
a = rng.standard_normal((96, 96), dtype=np.float32)
x = rng.standard_normal((4, 8, 32, 32), dtype=np.float32)
with t.using(backend="reference"):
    right = a @ a, t.max_pool2d(x, 3, 2), t.relu(x)

def work():
    for ours, reference in zip((t.matmul(a, a), t.max_pool2d(x, 3, 2), t.relu(x)), right):
        np.testing.assert_allclose(ours, reference, atol=1e-4)
"""
TWO_THREADS = """
work()
failures = []
def repeat():
    try:
        for _ in range(100):
            work()
    except BaseException as error:
        failures.append(error)
both = [threading.Thread(target=repeat) for _ in range(2)]
for thread in both: thread.start()
for thread in both: thread.join()
print(threads.layer(), failures)
"""
FORK = """
work()
child = os.fork()
if child == 0:
    try:
        work()
        print(threads.may_split(), flush=True)
        os._exit(0)
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(1)
_, status = os.waitpid(child, 0)
work()
print(threads.layer(), os.waitstatus_to_exitcode(status))
"""
LAYERS = [None, "workqueue", "omp"]


@pytest.fixture(params=LAYERS, ids=lambda layer: layer or "default")
def layer(request, tmp_path) -> str | None:
    """NUMBA_THREADING_LAYER; a visible skip where this Numba cannot load it."""
    if request.param == "omp":
        probe = "from numba.np.ufunc import omppool"
        try:
            run_python(probe, tmp_path)
        except AssertionError:
            pytest.skip("Numba's OpenMP layer cannot be loaded here (libgomp is missing)")
    return request.param


def test_two_python_threads_at_once(layer, tmp_path):
    """Under workqueue two launches at once would abort the process."""
    printed = run_python(SETUP + TWO_THREADS, tmp_path, NUMBA_THREADING_LAYER=layer)
    assert printed == f"{layer or threads.layer()} []"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_fork_after_use(layer, tmp_path):
    """The child of a process that used OpenMP is killed by a parallel kernel, so it gets serial ones."""
    printed = run_python(SETUP + FORK, tmp_path, NUMBA_THREADING_LAYER=layer).split()
    assert printed == [str(layer != "omp"), layer or threads.layer(), "0"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_fork_after_a_mere_import(layer, tmp_path):
    """Importing must not start the pool: under OpenMP even a question for the thread count would."""
    code = FORK.replace("work()", "pass", 1)
    assert run_python(SETUP + code, tmp_path, NUMBA_THREADING_LAYER=layer).split()[-1] == "0"


def test_multiprocessing_pool_by_fork(tmp_path):
    code = """
work()
import multiprocessing
def job(i):
    work()
    return i
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map(job, range(4)))
"""
    assert run_python(SETUP + code, tmp_path) == "[0, 1, 2, 3]"


def test_using_restores_the_thread_count(tmp_path):
    code = """
import numba
numba.set_num_threads(2)
for wanted in (1, 3):
    with t.using(threads=wanted):
        work()
    print(numba.get_num_threads())
with t.using(threads=3):
    try:
        t.matmul(a, a[:5])
    except ValueError:
        print(numba.get_num_threads())
"""
    assert run_python(SETUP + code, tmp_path, NUMBA_NUM_THREADS="3").split() == ["2", "2", "2"]


def test_a_user_s_layer_wins_and_nothing_is_set_for_the_process(tmp_path):
    code = """
before = dict(os.environ)
import numba
config = numba.config.THREADING_LAYER
work()
print(threads.layer(), dict(os.environ) == before, numba.config.THREADING_LAYER == config)
"""
    assert run_python(SETUP + code, tmp_path, NUMBA_THREADING_LAYER="workqueue") == "workqueue True True"


def test_chunks_handed_out_one_by_one(tmp_path):
    """Of a kernel that says so, from a size on: the same bits, and the user's own chunk size is restored."""
    code = """
import numba
from tilewise.kernels.cpu import gemm_blocks
asked = []
ask = numba.set_parallel_chunksize
numba.set_parallel_chunksize = lambda size: asked.append(size) or ask(size)
b = rng.standard_normal((700, 700), dtype=np.float32)
t.relu(x)  # starts the threads
ask(5)
results = []
for one_by_one_from in (float("inf"), 0):
    threads.ONE_BY_ONE_FROM = one_by_one_from
    for count in (1, 2, 3):
        with t.using(threads=count):
            results.append(t.matmul(b, b))
    t.max_pool2d(x, 3, 2)
tbb = threads.layer() == "tbb"
print(all(np.array_equal(results[0], r) for r in results), asked == ([1, 5] * 2 if tbb else []),
      numba.get_parallel_chunksize() == 5)
"""
    assert run_python(SETUP + code, tmp_path, NUMBA_NUM_THREADS="3") == "True True True"
