"""The tests' own cache folder and thread limit, set before Numba is imported; the peers' fixtures."""

import os
import sys
import zlib
from pathlib import Path

os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "numba"))
os.environ.setdefault("NUMBA_NUM_THREADS", "3")  # more than the cores of a small machine, to test 1, 2 and 3

from processors import AVX2

if os.environ.get("TILEWISE_TEST_PROCESSOR") == "avx2":
    os.environ |= AVX2

import numpy as np
import pytest


@pytest.fixture
def rng():
    return np.random.default_rng(20261121)


@pytest.fixture(scope="session")
def torch():
    """PyTorch, on one thread; a visible skip where the `peers` extra is not installed."""
    module = pytest.importorskip("torch", reason="PyTorch is not installed (extra: peers)")
    module.set_num_threads(1)
    return module


@pytest.fixture(scope="session")
def example_extras():
    """What the scripts in examples/ need; a visible skip where it is not installed."""
    for module, distribution, extra in (("sklearn", "scikit-learn", "train"), ("matplotlib", "matplotlib", "plot")):
        pytest.importorskip(module, reason=f"{distribution} is not installed (extra: {extra})")


@pytest.fixture
def run_example(example_extras, tmp_path, capsys):
    """run_example(name, *arguments): what its main returns, after a look at the picture and at what was printed."""
    import example_scripts

    import tilewise

    def run(name: str, *arguments: str):
        picture = tmp_path / f"{name}.png"
        quiet = ["--quiet"] if name in example_scripts.TRAINING else []
        with tilewise.using(threads=1):  # the problems are small, and the machine may be busy
            result = example_scripts.load(name).main([*arguments, *quiet, "--out", str(picture)])
        printed = capsys.readouterr()
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert str(picture) in printed.out
        assert printed.err == ""
        return result

    return run


@pytest.fixture(autouse=True)
def gradients_as_they_were():
    """The benchmarks switch PyTorch's recording of gradients off for their process; other tests need it."""
    yield
    module = sys.modules.get("torch")
    if module is not None and not module.is_grad_enabled():
        module.set_grad_enabled(True)


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Each backend in turn, pinned for the duration of the test."""
    import tilewise

    with tilewise.using(backend=request.param):
        yield request.param


@pytest.fixture(scope="session")
def emulators():
    """emulators(backend): a GPU executed on the CPU (tests/simt); a visible skip where its tools are missing.

    In gpu-check: the GPU.
    """
    made = {}

    def emulator_of(backend):
        from simt import cuda_source, installed
        from simt import emulator as numba_source

        if backend not in made:
            if installed.REAL:
                made[backend] = installed.real_gpu(backend)
            elif reason := (numba_source if backend == "cuda" else cuda_source).why_not():
                pytest.skip(reason)
            else:
                made[backend] = numba_source.Emulator() if backend == "cuda" else cuda_source.CudaSourceEmulator()
        return made[backend]

    return emulator_of


def pytest_generate_tests(metafunc):
    """`gpu` is each backend in turn that a test file names in GPU_BACKENDS, else "cuda"."""
    if "gpu" in metafunc.fixturenames:
        backends = getattr(metafunc.module, "GPU_BACKENDS", None)
        if backends:
            metafunc.parametrize("gpu", backends, indirect=True)


@pytest.fixture
def gpu(emulators, request):
    """A GPU backend on its emulator, pinned; each test has a schedule of its own, always the same one."""
    from simt.emulator import SCHEDULES
    from simt.installed import emulated_gpu

    import tilewise

    backend = getattr(request, "param", "cuda")
    emulator = emulators(backend)
    if emulator.schedule != "real":
        number = zlib.crc32(request.node.name.encode())
        emulator.schedule = list(SCHEDULES)[number % len(SCHEDULES)]
        emulator.eager_copies = bool(number // len(SCHEDULES) % 2)
    with emulated_gpu(emulator), tilewise.using(backend=backend):
        yield emulator


@pytest.fixture
def one_multiprocessor(gpu, monkeypatch):
    """A device that any tile occupies: the largest one is taken of which the product fills more than half."""
    monkeypatch.setattr(gpu, "multiprocessors", 1)


@pytest.fixture
def planned_anew(monkeypatch):
    """planned_anew(module, name, value): a constant with another value, in plans made since; for this test only."""
    from tilewise.kernels import operation

    def patch(module, name, value):
        monkeypatch.setattr(module, name, value)
        operation.forget_plans()

    yield patch
    operation.forget_plans()


@pytest.fixture
def split_everything(planned_anew):
    """Every kernel is split over threads, however little it has to do."""
    from tilewise.kernels.cpu import threads

    planned_anew(threads, "SERIAL_BELOW", 0)


# ---- what the emulator (or the GPU) ran: told at the end, from all processes

_REPORTS: list[dict] = []


def pytest_sessionfinish(session):
    """A worker of pytest-xdist hands its part to the process that prints."""
    module = sys.modules.get("simt.emulator")
    if module is None:
        return
    report = {"launched": sorted(map(list, module.LAUNCHED)), "unsupported": sorted(module.UNSUPPORTED)}
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["gpu"] = report
    else:
        _REPORTS.append(report)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    _REPORTS.append(getattr(node, "workeroutput", {}).get("gpu", {}))


def pytest_terminal_summary(terminalreporter):
    launched = {tuple(form) for report in _REPORTS for form in report.get("launched", ())}
    unsupported = sorted({text for report in _REPORTS for text in report.get("unsupported", ())})
    if not launched and not unsupported:
        return
    from gpu_compile import load_kernels

    forms = {(kernel.name, dtype.name) for kernel in load_kernels() for dtype in kernel.dtypes}
    missing = sorted(forms - launched)
    terminalreporter.section("GPU kernels")
    terminalreporter.line(f"{len(forms) - len(missing)} of {len(forms)} forms (kernel x dtype) were executed")
    for name in sorted({name for name, _ in missing}):
        terminalreporter.line(f"not executed: {name} {', '.join(d for n, d in missing if n == name)}")
    for text in unsupported:
        terminalreporter.line(f"cannot be executed: {text}")


@pytest.fixture
def allocations():
    """A function: (arrays allocated, arrays freed) by compiled code."""
    from numba.core.registry import cpu_target
    from numba.core.runtime import _nrt_python, rtsys

    rtsys.initialize(cpu_target.target_context)
    counted = _nrt_python.memsys_stats_enabled()
    _nrt_python.memsys_enable_stats()
    yield lambda: rtsys.get_allocation_stats()[:2]
    if not counted:
        _nrt_python.memsys_disable_stats()
