"""driver.py against a driver that is none (tests/fake_cuda): the real cuda.bindings, and what arrives behind it."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from installation import run_python
from simt import emulator as simt

if simt.why_not():
    pytest.skip(simt.why_not(), allow_module_level=True)

SOURCE = Path(__file__).parent / "fake_cuda" / "driver.cpp"
BEGIN = """
import gc, os
import numpy as np
import tilewise
from tilewise.kernels.cuda import activation, driver, launch, ptx_cache

def attempt(call, *arguments, **environment):
    os.environ.update(environment)
    try:
        return str(call(*arguments))
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        for name in environment:
            del os.environ[name]

x = np.arange(8, dtype=np.float32) - 4
tilewise.using(backend="cuda").__enter__()
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    if not shutil.which("g++") or sysconfig.get_platform() != "linux-x86_64":
        pytest.skip("no C++ compiler for the driver that is none")
    folder = tmp_path_factory.mktemp("fake_cuda")
    command = ["g++", "-O1", "-fPIC", "-shared", "-o", folder / "libcuda.so.1", SOURCE, "-ldl"]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture
def run(library, tmp_path):
    """Runs code on the driver that is none: what it printed, and the driver's log."""

    def run(code, **environment):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        variables = {"LD_LIBRARY_PATH": str(library), "FAKE_CUDA_LOG": str(log), "NUMBA_CACHE_DIR": str(tmp_path)}
        printed = run_python(BEGIN + code, tmp_path, **variables | environment)
        return printed.splitlines(), log.read_text().splitlines() if log.exists() else []

    return run


def test_one_call_from_the_host_and_back(run):
    printed, log = run("print(tilewise.leaky_relu(x, 0.25).tolist())")
    assert printed == [str([float(v) for v in range(-4, 4)])]  # that driver's only kernel copies
    (launch,) = [line for line in log if line.startswith("launch")]
    assert launch == "launch 0x3000 grid 1 1 1 block 256 1 1 shared 0 stream (nil) extra (nil): 1 1 0.25 8 2 2"
    assert any(line.startswith("load ") and line.endswith(" bytes ending in 0") for line in log)
    assert log.count("allocate 32 stream (nil)") == log.count("free stream (nil)") == 2
    assert sum(line.startswith("push") for line in log) == log.count("pop"), "the thread's own context is not back"
    modes = [line for line in log if line.startswith("capture")]
    assert modes == ["capture mode 2", "capture mode 0"], "a capture survives the loading of a kernel"


def test_a_second_launch_loads_nothing_and_streams_are_passed_on(run):
    code = """
from tilewise.kernels import device_arrays
class AtStream77(device_arrays.Place):
    engine = driver.engine(0)
    def stream(self):
        return 77
Place = AtStream77()
a, b = Place.engine.allocate(64), Place.engine.allocate(64)
for count in 4, 8:
    activation.activate_all(Place, (2, 3, 1), a, b, 0.5, count, 0, 1, dtype=np.dtype(np.float32))
activation.activate_all(Place, 0, a, b, 0.5, 0, 0, 1, dtype=np.dtype(np.float32))
activation.activate_all(Place, 1, a, b, 0.5, 4, 0, 1, dtype=np.dtype(np.float32), shared=100_000)
activation.activate_all(Place, 1, a, b, 0.5, 4, 0, 1, dtype=np.dtype(np.float32), shared=50_000)
Place.engine.synchronize()
"""
    _, log = run(code)
    launches = [line.split(": ") for line in log if line.startswith("launch")]
    assert [arguments for _, arguments in launches] == ["1 1 0.5 4 0 1", "1 1 0.5 8 0 1"] + ["1 1 0.5 4 0 1"] * 2
    assert all("grid 2 3 1" in where and "stream 0x4d" in where for where, _ in launches[:2])
    assert sum(line.startswith("load ") for line in log) == 1
    assert [line for line in log if line.startswith("attribute")] == ["attribute 8 of 0x3000 is 100000"]


def test_errors_are_named_and_leak_nothing(run):
    code = """
print(attempt(tilewise.relu, x, FAKE_CUDA_FAIL="cuMemAllocAsync=2"))
print(attempt(tilewise.relu, x, FAKE_CUDA_FAIL="cuModuleLoadData=222"))
print(attempt(tilewise.relu, x, FAKE_CUDA_FAIL="cuLaunchKernel=700"))
print(attempt(tilewise.relu, x, FAKE_CUDA_FAIL="cuLaunchKernel=999"))
print(attempt(tilewise.relu, x, FAKE_CUDA_FAIL="cuMemcpyDtoH=700"))
print(attempt(driver.engine, 5))
print(attempt(driver.Driver, 0, FAKE_CUDA_FAIL="cuInit=100"))
print(attempt(driver.Driver, 0, FAKE_CUDA_MAJOR="6"))
print(attempt(lambda: driver.Driver(0).target, FAKE_CUDA_MAJOR="11"))
kernel = launch.kernel(threads=32, least=(12, 0))(activation.gradient_all.function)
print(attempt(driver.engine(0)._load, kernel.form(np.dtype(np.float32))))
print(tilewise.relu(x).size)
"""
    printed, log = run(code)
    for line, start in zip(
        printed,
        (
            "OutOfMemory: 32 bytes on Fake GPU 0: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
            "DriverError: kernel activate_all: CUDA_ERROR_UNSUPPORTED_PTX_VERSION: text: the driver is older",
            "DriverError: kernel activate_all, grid (1, 1, 1), 0 bytes of shared memory: CUDA_ERROR_ILLEGAL_ADDRESS",
            "DriverError: kernel activate_all, grid (1, 1, 1), 0 bytes of shared memory: error 999",
            "DriverError: copy from the GPU: CUDA_ERROR_ILLEGAL_ADDRESS",
            "DriverError: GPU 5: CUDA_ERROR_INVALID_DEVICE: text: there is no device of this number",
            "DriverError: the NVIDIA driver did not start: CUDA_ERROR_NO_DEVICE",
            "DriverError: Fake GPU 0 has compute capability (6, 0), the kernels need (7, 5)",
            "(10, 0)",
            "DriverError: kernel gradient_all needs compute capability (12, 0), Fake GPU 0 has less",
            "8",
        ),
        strict=True,
    ):
        assert line.startswith(start)
    assert sum(line.startswith("allocate") for line in log) == log.count("free stream (nil)")
    assert sum(line.startswith("push") for line in log) == log.count("pop")


def test_another_device_is_used_and_left_again(run):
    code = """
from tilewise.kernels.device_arrays import HostPlace
place = HostPlace(driver.engine(1))
print(place.copy_out(activation.relu(place.copy_in(x))).size, driver.engine(1).name)
"""
    printed, log = run(code)
    assert printed == ["8 Fake GPU 1"]
    assert {line for line in log if line.startswith("push")} == {"push 0x1001"}


def test_prepared_weights_are_given_back_when_no_stream_reads_them(run):
    code = """
prepared = tilewise.prepare_conv2d(np.ones((1, 3, 1, 1), np.float32))
for _ in range(2):
    prepared(np.ones((1, 3, 2, 2), np.float32))
del prepared
gc.collect()
"""
    _, log = run(code)
    assert log.count("plain allocate 12") == log.count("plain free") == 1
    assert log.count("write 12") == 1
    assert log.count("allocate 48 stream (nil)") == 2  # x of each call, from the pool


def test_device_without_memory_pools(run):
    _, log = run("tilewise.relu(x)", FAKE_CUDA_POOLS="0")
    assert log.count("plain allocate 32") == log.count("plain free") == 2


def test_no_driver(run, tmp_path):
    printed = run_python(
        BEGIN.replace("tilewise.using", "#") + "print(attempt(driver.Driver, 0))", tmp_path, LD_LIBRARY_PATH=None
    )
    if "Driver object" in printed:
        pytest.skip("this machine has a driver")
    assert printed.startswith("DriverError: no NVIDIA driver")


NEVER = "launch.Form.ptx = lambda *a: 1 / 0\n"


def test_second_process_compiles_nothing(run):
    run("tilewise.relu(x)")
    printed, _ = run(NEVER + "print(attempt(lambda: tilewise.relu(x).size), attempt(tilewise.relu_backward, x, x))")
    assert printed == ["8 ZeroDivisionError: division by zero"]


def test_cache_tells_kernels_apart_and_survives_damage(run):
    code = """
def factory(n):
    def scaled(x: launch.ELEMENTS):
        x[0] = n
    return launch.kernel(threads=32)(scaled).form(np.dtype(np.float32))
forms = [factory(n) for n in (1, 2, 2)]
keys = [ptx_cache.key(f, (9, 0)) for f in forms] + [ptx_cache.key(forms[0], (8, 0))]
print([keys.index(k) for k in keys])
first = ptx_cache.ptx(forms[0], (9, 0))
(file,) = ptx_cache._folder().iterdir()
file.write_text(first[:-20])
again = ptx_cache.ptx(forms[0], (9, 0))
print(again == file.read_text(), len(again) == len(first))
"""
    assert run(code)[0] == ["[0, 1, 1, 3]", "True True"]


def test_cache_tells_compilers_apart(run):
    code = """
real = ptx_cache.version
form = activation.activate_all.form(np.dtype(np.float32))
def key(number):
    def version(package):
        if package != "cuda-bindings":
            return real(package)
        if number is None:
            raise ptx_cache.PackageNotFoundError(package)
        return number
    ptx_cache.version = version
    ptx_cache._stamp.cache_clear()
    return ptx_cache.key(form, (9, 0))
keys = [key(number) for number in ("12.9.1", "13.0.3", "12.9.1", None)]
print([keys.index(k) for k in keys])
"""
    assert run(code)[0] == ["[0, 1, 0, 3]"]


def test_cached_code_is_stale_where_a_plan_changes(tmp_path, monkeypatch):
    """Kernels take constants from the plans, which no folder of kernels has."""
    from tilewise.kernels import disk_cache
    from tilewise.kernels.cuda import ptx_cache

    plan = tmp_path / "conv_plan.py"
    monkeypatch.setattr(disk_cache, "_package_folder", lambda: tmp_path)
    monkeypatch.setattr(ptx_cache, "source_stamp", disk_cache.source_stamp.__wrapped__)
    plan.write_text("one")
    before = ptx_cache._stamp.__wrapped__()
    plan.write_text("two")
    assert ptx_cache._stamp.__wrapped__() != before


ESTIMATE = """
from tilewise.kernels import machine
tilewise.using(backend="cpu").__enter__()
tilewise.kernels.settings.current.set(None)
print(machine.gpu_rates())
large = np.broadcast_to(np.float32(1), (8192, 8192))
for call, operands in ((tilewise.matmul, (large, large)), (tilewise.relu, (large,)), (tilewise.matmul, (x, x))):
    decision = tilewise.explain(call, *operands)
    print(decision.device, sorted(decision.rejected))
"""


def test_estimate_from_the_drivers_numbers_makes_no_context(run):
    printed, log = run(ESTIMATE)
    # 132 multiprocessors of 128 cores at 1.98 GHz; 5120 bits at twice 2.619 GHz
    assert printed[0].startswith(
        "GpuRates(flops=66908160000000.0, bytes=3352320000000.0, double=0.5, memory=85899345920)"
    )
    assert printed[1:] == ["gpu ['cpu', 'cupy', 'reference']", *["cpu ['cuda', 'cupy', 'reference']"] * 2]
    assert not any(line.startswith("context") for line in log)


def test_estimate_where_the_driver_does_not_tell(run):
    printed, _ = run(ESTIMATE, FAKE_CUDA_RATES="0")
    assert printed == ["None", *["cpu ['cuda', 'cupy', 'reference']"] * 3]
