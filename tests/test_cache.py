"""Compiled kernels on disk: found by the next process, never stale, the two forms of a kernel apart."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from installation import install_copy, run_python

from tilewise.kernels.cpu import jit

HELPER = """
from tilewise.kernels.cpu.jit import device

@device()
def scale(x):
    return x * {factor}
"""
PROBE = """
from numba import prange
from tilewise.kernels.cpu.helper_of_probe import scale
from tilewise.kernels.cpu.jit import kernel

@kernel()
def fill(out):
    for i in prange(out.size):
        out[i] = scale(1.0)
"""
# Prints the result of each form, then hits and misses of each form's cache.
RUN_PROBE = """
    import numpy as np
    from tilewise.kernels.cpu.probe import fill
    from tilewise.kernels.cpu import jit
    results = []
    for work in (0, 1e9):
        out = np.zeros(4)
        fill(work, out)
        results.append(out[3])
    counts = []
    for form in (fill.serial, fill.parallel):
        stats = form.stats
        counts.append((sum(stats.cache_hits.values()), sum(stats.cache_misses.values())))
    print(results, counts)
"""
# Every op family, serial and parallel, then hits and misses over all kernels.
RUN_ALL = """
    import numpy as np, tilewise as t
    from tilewise.kernels import operation
    from tilewise.kernels.cpu import jit, threads
    rng = np.random.default_rng(0)
    a = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    x, w, c = a(2, 8, 9, 9), a(8, 8, 3, 3), a(8)
    for below in (float("inf"), 0):
        threads.SERIAL_BELOW = below
        operation.forget_plans()  # they hold the form that the threshold gave
        t.matmul(a(300, 300), a(300, 300))
        t.conv2d(x, w, c)
        t.max_pool2d(x, 3, 2)
        t.batch_norm(x, c.copy(), abs(c), c, c, training=True)
        t.relu(x)
        t.pad(x, 1)
    forms = [getattr(k, form) for k in jit.KERNELS for form in ("serial", "parallel") if form in vars(k)]
    print(sum(sum(f.stats.cache_hits.values()) for f in forms), sum(sum(f.stats.cache_misses.values()) for f in forms))
"""


@pytest.fixture
def installed(tmp_path) -> Path:
    """A copy of the package with a kernel of the test's own, and its helper in another file."""
    folder = install_copy(tmp_path / "installed")
    cpu = folder / "tilewise" / "kernels" / "cpu"
    (cpu / "probe.py").write_text(PROBE)
    (cpu / "helper_of_probe.py").write_text(HELPER.format(factor=2))
    return folder


def run_probe(installed: Path, tmp_path: Path) -> str:
    return run_python(RUN_PROBE, tmp_path, installed, NUMBA_CACHE_DIR=str(tmp_path / "cache"))


def test_second_process_loads_what_the_first_compiled(installed, tmp_path):
    assert run_probe(installed, tmp_path) == "[np.float64(2.0), np.float64(2.0)] [(0, 1), (0, 1)]"
    assert run_probe(installed, tmp_path) == "[np.float64(2.0), np.float64(2.0)] [(1, 0), (1, 0)]"


def test_a_changed_helper_in_another_file_changes_the_result(installed, tmp_path):
    run_probe(installed, tmp_path)
    (installed / "tilewise" / "kernels" / "cpu" / "helper_of_probe.py").write_text(HELPER.format(factor=3))
    assert run_probe(installed, tmp_path) == "[np.float64(3.0), np.float64(3.0)] [(0, 1), (0, 1)]"


def test_two_installations_do_not_share_kernels(installed, tmp_path):
    run_probe(installed, tmp_path)
    other = install_copy(tmp_path / "other")
    for name in ("probe.py", "helper_of_probe.py"):
        text = (installed / "tilewise" / "kernels" / "cpu" / name).read_text()
        (other / "tilewise" / "kernels" / "cpu" / name).write_text(text.replace("* 2", "* 5"))
    assert run_probe(other, tmp_path).startswith("[np.float64(5.0), np.float64(5.0)]")
    assert run_probe(installed, tmp_path) == "[np.float64(2.0), np.float64(2.0)] [(1, 0), (1, 0)]"


class Killed(BaseException):
    """What ends a process in the middle."""


def test_a_process_killed_while_it_writes_leaves_no_code_under_another_name(tmp_path, monkeypatch):
    before, after = (jit._CacheFile(str(tmp_path), "kernel", stamp) for stamp in ("older sources", "newer sources"))
    before.save("float32", "older code of float32")
    for write in ("_save_data", "_save_index"):

        def killed(*_):
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(after, write, killed)
            with pytest.raises(Killed):
                after.save("float64", "newer code of float64")
        assert after.load("float64") is None
        assert after.load("float32") is None


def test_processes_of_two_sources_do_not_load_each_others_code(tmp_path, monkeypatch):
    older, newer = (jit._CacheFile(str(tmp_path), "kernel", stamp) for stamp in ("older sources", "newer sources"))
    written = []

    def between(write):
        def writes(*args):
            if written:  # the other saves between this one's first write and its second
                newer.save("float64", "newer code of float64")
            written.append(args)
            write(*args)

        return writes

    for name in ("_save_data", "_save_index"):
        monkeypatch.setattr(older, name, between(getattr(older, name)))
    older.save("float32", "older code of float32")
    assert len(written) == 2
    for one, sources in ((older, "older"), (newer, "newer")):
        for key in ("float32", "float64"):
            assert one.load(key) in (None, f"{sources} code of {key}")


def test_code_of_older_sources_is_removed(tmp_path):
    older, newer = (jit._CacheFile(str(tmp_path), "kernel", stamp) for stamp in ("older sources", "newer sources"))
    other = jit._CacheFile(str(tmp_path), "kernels_neighbour", "older sources")
    for file in (older, other):
        file.save("float32", "code")
        file.save("float64", "code")
    newer.save("float32", "code")
    assert sum(file.name.startswith("kernel.") for file in tmp_path.glob("*.nbc")) == 1
    assert sum(file.name.startswith("kernels_neighbour.") for file in tmp_path.glob("*.nbc")) == 2


def test_no_kernel_misses_the_cache_in_the_second_process(tmp_path):
    """An intrinsic made in a closure, or a dynamic global, would make every process compile anew."""
    # The working folder itself: a cache folder of the package's name there would hide an editable installation.
    cache = {"NUMBA_CACHE_DIR": str(tmp_path)}
    first_hits, first_misses = map(int, run_python(RUN_ALL, tmp_path, **cache).split())
    assert first_hits == 0
    assert first_misses >= 12, "six ops in two forms"
    hits, misses = map(int, run_python(RUN_ALL, tmp_path, **cache).split())
    assert (hits, misses) == (first_misses, 0)


OTHER_NUMBA = """
import sys
import numba

numba.__version__ = "0.99.0"
import numpy as np
import tilewise
from tilewise.kernels.cpu import threads

threads.SERIAL_BELOW = 0
x, y = np.ones((40, 30), np.float32), np.ones((30, 20), np.float32)
with tilewise.using(threads=2):
    assert (tilewise.matmul(x, y) == 30).all()
assert "tilewise.kernels.cpu.device_compiler" not in sys.modules
print("done")
"""


def test_another_numba_compiles_by_its_own_pipeline(tmp_path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", OTHER_NUMBA], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "done\n"


# Each form's result by Numba's own pipeline and by ours, bit for bit; whether the collector is on; and a device
# function called from Python before and after a kernel was compiled with it.
PIPELINES = """
import gc
import numpy as np
from numba import prange
from tilewise.kernels.cpu import jit

results, enabled = [], []
for options in (({},) * 3, jit._shortened_pipelines("0.68.1")):
    jit._FOR_DEVICE, jit._FOR_SERIAL, jit._FOR_PARALLEL = options

    @jit.device()
    def inner(x, y):
        return x * x + np.exp(y)

    @jit.device(allocates=True)
    def outer(source, i):
        parts = np.empty(5, source.dtype)
        for k in range(5):
            parts[k] = inner(source[i] + k, source[i])
        return parts.sum() if i else parts[0] / source[i]

    @jit.kernel()
    def fill(source, result):
        for i in prange(result.size):
            result[i] = outer(source, i)

    for dtype in (np.float32, np.float64):
        source = np.random.default_rng(0).standard_normal(101).astype(dtype)
        source[[0, 7, 50]] = 0, np.nan, np.inf
        for form in (fill.serial, fill.parallel):
            result = np.empty_like(source)
            form(source, result)
            results.append((dtype, result.tobytes()))
    enabled.append(gc.isenabled())
for dtype in (np.float32, np.float64):
    assert len({bits for kind, bits in results if kind is dtype}) == 1
assert enabled == [True, True]
for function, arguments in ((inner, (1.0, 2.0)), (inner, (1, 2)), (outer, (source, 1))):
    try:
        function(*arguments)
    except TypeError as error:
        assert "only kernels can call it" in str(error)
    else:
        raise AssertionError("called")
gc.disable()
fill.serial(source[::2], np.empty(51))
assert not gc.isenabled(), "the caller's wish"
print("done")
"""


def test_the_shortened_pipeline_computes_what_numba_s_own_does(tmp_path):
    assert run_python(PIPELINES, tmp_path, NUMBA_CACHE_DIR=str(tmp_path)) == "done"


def test_only_the_numba_it_was_tested_with_gets_the_shortened_pipeline():
    assert all(jit._shortened_pipelines("0.68.1"))
    assert not any(any(jit._shortened_pipelines(version)) for version in ("0.67.0", "0.69.0", "1.0.0"))


LOADED = """
    import sys
    import numpy as np, numba, tilewise as t
    from tilewise.kernels import operation
    from tilewise.kernels.cpu import jit, threads
    x = np.linspace(-3, 3, 1000, dtype=np.float32).reshape(1, 10, 10, 10)
    results = []
    for below in (float("inf"), 0):
        threads.SERIAL_BELOW = below
        operation.forget_plans()
        for call in (lambda: t.relu(x), lambda: t.max_pool2d(x, 3, 2), lambda: t.matmul(x[0, 0], x[0, 1])):
            results.append(call())
    first = "numba.np.linalg" in sys.modules
    # what Numba did not load yet is there for whoever compiles
    solve = numba.njit(lambda a, b: (np.linalg.solve(a, b), {"key": len(str(a.size))}))
    solution, table = solve(np.eye(4) * 2, np.ones(4))
    assert (solution == 0.5).all() and table["key"] == 2
    assert (t.tanh(x) == np.tanh(x)).mean() > 0.2
    print(first, *[r.tobytes().hex() for r in results])
"""


def test_loading_a_kernel_does_not_make_numba_load_its_compiler(tmp_path):
    cache = {"NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_NUM_THREADS": "2"}
    compiled, *first = run_python(LOADED, tmp_path, **cache).split()
    loaded, *second = run_python(LOADED, tmp_path, **cache).split()
    assert (compiled, loaded) == ("True", "False")
    assert first == second
