"""The user's cached functions that call the kernels: found by the next process, and not by one with other kernels."""

import numpy as np
import pytest
from installation import install_copy, run_python

USER = """
import numba, numpy as np, tilewise as t
from tilewise import pad

@numba.njit(cache=True)
def serial(x):
    return t.relu(pad(x, 1, "replicate"))

@numba.njit(cache=True, parallel=True)
def parallel(x):
    y = np.empty((x.shape[0], x.shape[1] + 2, x.shape[2] + 2), x.dtype)
    for i in numba.prange(x.shape[0]):
        y[i] = serial(x[i])
    return y

def run():
    x = np.arange(-12, 12, dtype=np.float32).reshape(2, 3, 4)
    first, second = serial(x), parallel(x)
    assert (first == second).all()
    hits, misses = (sum(sum(getattr(f.stats, kind).values()) for f in (serial, parallel))
                    for kind in ("cache_hits", "cache_misses"))
    print(first.sum(), hits, misses)
"""
RUN = "import sys; sys.path.insert(0, '.'); import user; user.run()"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "user.py").write_text(USER)
    install_copy(tmp_path / "installed")
    return tmp_path


def run(folder) -> list[float]:
    # Cache folders of a user: his own functions' beside his file, the kernels' apart.
    kernels = {"NUMBA_CACHE_DIR": None, "XDG_CACHE_HOME": str(folder / "cache")}
    return [float(word) for word in run_python(RUN, folder, folder / "installed", **kernels).split()]


def test_cached_functions_are_found_again_until_a_kernel_changes(folder):
    x = np.pad(np.arange(-12, 12, dtype=np.float32).reshape(2, 3, 4), ((0, 0), (1, 1), (1, 1)), "edge")
    total = float(np.maximum(x, 0).sum())
    # parallel's use of serial is another lookup of serial's
    value, hits, misses = run(folder)
    assert (value, hits) == (total, 0)
    assert misses >= 2
    assert run(folder) == [total, 2, 0]
    source = folder / "installed" / "tilewise" / "kernels" / "cpu" / "activation_vector.py"
    plain = 'RELU: lambda emit, x, _: emit.builder.select(_ordered(emit, "<", x), emit.zero, x)'
    text = source.read_text()
    assert plain in text
    source.write_text(text.replace(plain, plain[:-2] + "emit.builder.fneg(x))"))
    value, hits, misses = run(folder)
    assert (value, hits) == (-total, 0), "machine code of the old kernels was run"
    assert misses >= 2
    assert run(folder) == [-total, 2, 0]


LAZY = """
import sys
import tilewise
assert "numba" not in sys.modules
import numba
numba.njit(lambda: 1)()
assert not [name for name in sys.modules if name.startswith("tilewise.kernels.njit.")]
assert not [name for name in sys.modules if name.startswith("tilewise.kernels.cpu.")]
print("done")
"""


def test_numba_s_first_compilation_loads_no_kernels(tmp_path):
    assert run_python(LAZY, tmp_path, NUMBA_CACHE_DIR=str(tmp_path)) == "done"
