"""From a kernel's start to CuPy, through a CuPy that is none: what is compiled, loaded and launched, and where."""

import ctypes
import gc
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import tilewise
from tilewise.kernels import device_arrays, dispatch, machine, operation
from tilewise.kernels.cupy import driver, launch, module

MODULES = ("cupy", "cupy.cuda", "cupy.cuda.driver", "cupy.cuda.function", "cupy.cuda.nvrtc", "cupy.cuda.runtime")


class FakeMemory:
    """Of the host, as cupy.cuda.alloc's. events: where it is noted that the pool has got it back."""

    def __init__(self, nbytes, events):
        self.bytes, self.events = np.zeros(nbytes, np.uint8), events
        self.ptr = self.bytes.ctypes.data

    def __del__(self):
        self.events.append(f"free {self.bytes.size}")

    def copy_from_host(self, pointer, nbytes):
        self.events.append(f"write {nbytes}")
        ctypes.memmove(self.ptr, pointer, nbytes)

    def copy_to_host(self, pointer, nbytes):
        ctypes.memmove(pointer, self.ptr, nbytes)


class FakeCupy:
    """What driver.py and device_arrays.py use of CuPy; notes what is launched, with its parameters' bytes."""

    def __init__(self, capability="90"):
        self.launched, self.loaded, self.current, fake = [], [], 0, self
        self.capture_modes = [0]  # of this thread, the last one now
        self.allowed = []  # (function, attribute, value)
        self.events = []  # of writing, of waiting for a device, and of giving memory back
        self.stream, self.allocated_on = 40, []  # the current one, and those whose memory was asked for

        class Device:
            compute_capability = capability

            def __init__(self, ordinal):
                self.id = ordinal

            def __enter__(self):
                self.before, fake.current = fake.current, self.id

            def __exit__(self, *error):
                fake.current = self.before

            def synchronize(self):
                fake.events.append(f"synchronize {self.id}")

        class Module:
            def load(self, binary):
                assert fake.capture_modes[-1] == 2, "a stream may be capturing"
                fake.loaded.append((fake.current, binary))

            def get_function(self, name):
                return SimpleNamespace(ptr=name)

        def launch(function, *numbers):
            *grid_and_threads, shared, stream, table, _extra = numbers
            addresses = (ctypes.c_uint64 * 3).from_address(table)
            first = [ctypes.c_uint64.from_address(a).value for a in addresses[:2]]
            fake.launched.append((fake.current, function, grid_and_threads, shared, stream, first))

        def allow(*given):
            fake.allowed.append(given)

        runtime = SimpleNamespace(
            getDevice=lambda: self.current,
            getDeviceProperties=lambda ordinal: {"name": b"Fake GPU", "multiProcessorCount": 132},
        )

        class Null:
            def __enter__(self):
                self.before, fake.stream = fake.stream, 0

            def __exit__(self, *error):
                fake.stream = self.before

        def alloc(nbytes):
            fake.allocated_on.append(fake.stream)
            return FakeMemory(nbytes, self.events)

        self.cuda = SimpleNamespace(
            Device=Device, runtime=runtime, alloc=alloc, Stream=SimpleNamespace(null=Null()),
            driver=SimpleNamespace(launchKernel=launch, funcSetAttribute=allow),
            function=SimpleNamespace(Module=Module),
            get_current_stream=lambda ordinal: SimpleNamespace(ptr=40 + ordinal),
        )  # fmt: skip

    def cuThreadExchangeStreamCaptureMode(self, mode):
        before = self.capture_modes[-1]
        self.capture_modes.append(mode._obj.value)
        mode._obj.value = before

    def empty(self, shape, dtype):
        return FakeArray(np.empty(shape, dtype), self.current)


class FakeArray:
    def __init__(self, values, ordinal=0):
        self.values, self.shape, self.device = values, values.shape, SimpleNamespace(id=ordinal)
        self.data = SimpleNamespace(ptr=values.ctypes.data)

    @property
    def __cuda_array_interface__(self):
        described = dict(self.values.__array_interface__)
        return {"shape": described["shape"], "typestr": described["typestr"], "data": described["data"], "version": 3}


FakeArray.__module__ = "cupy"


@pytest.fixture
def cupy(monkeypatch):
    """A CuPy that is none, and the backend on it."""
    fake = FakeCupy()
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, fake)
    code = module.Code("the_entry", b"machine code")
    fake.targets = []
    monkeypatch.setattr(module, "code", lambda source, expression, target: fake.targets.append(target) or code)
    monkeypatch.setattr(module, "architecture_for", lambda capability: module.architecture(capability, (80, 90)))
    monkeypatch.setattr(machine, "unavailable_backends", lambda: {"cuda": "not here"})
    monkeypatch.setattr(machine, "cuda_devices", lambda: (("Fake GPU", "Fake GPU"), None))
    monkeypatch.setattr(machine, "driver_library", lambda: fake)
    forget = (driver.engine, device_arrays.place_of, dispatch.choose_backend)
    for cached in forget:
        cached.cache_clear()
    operation.forget_plans()
    yield fake
    for cached in forget:
        cached.cache_clear()
    operation.forget_plans()


def test_arrays_of_cupy_start_a_kernel_on_its_stream(cupy):
    x = FakeArray(np.ones((2, 3, 8, 8), np.float32))
    _, y = [tilewise.avg_pool2d(x, 3) for _ in range(2)]
    assert type(y) is FakeArray
    assert y.shape == (2, 3, 2, 2)
    assert cupy.loaded == [(0, b"machine code")]  # once
    ordinal, function, numbers, shared, stream, pointers = cupy.launched[1]
    assert (ordinal, function, numbers, shared, stream) == (0, "the_entry", [1, 1, 1, 256, 1, 1], 0, 40)
    assert pointers == [x.data.ptr, y.data.ptr]
    assert cupy.capture_modes == [0, 2, 0]


def test_arrays_on_another_device_run_there_and_the_current_one_stays(cupy):
    x = FakeArray(np.ones((1, 1, 4, 4), np.float32), ordinal=1)
    y = tilewise.avg_pool2d(x, 2)
    assert (y.device.id, cupy.current) == (1, 0)
    assert [(ordinal, stream) for ordinal, _, _, _, stream, _ in cupy.launched] == [(1, 41)]
    assert cupy.loaded[0][0] == 1
    with pytest.raises(TypeError, match="grad and y must be of one kind, on one device"):
        tilewise.relu_backward(x, FakeArray(np.ones((1, 1, 4, 4), np.float32)))


def test_host_arrays_go_there_and_back(cupy):
    x = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    with tilewise.using(backend="cupy"):
        assert tilewise.explain(tilewise.avg_pool2d, x, 2).backend == "cupy"
        y = tilewise.avg_pool2d(x, 2)
    (launch,) = cupy.launched
    sent = np.ctypeslib.as_array((ctypes.c_float * 16).from_address(launch[-1][0]))
    assert (y.shape, launch[4]) == ((1, 1, 2, 2), 0)
    assert cupy.allocated_on == [0, 0]  # another stream's kernels may still use what its pool hands out
    np.testing.assert_array_equal(sent, x.ravel())


def test_engine_tells_what_the_device_is(cupy):
    engine = driver.engine(0)
    assert (engine.name, engine.capability, engine.target, engine.multiprocessors) == ("Fake GPU", (9, 0), "sm_90", 132)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"least": (10, 0)}, r"needs compute capability \(10, 0\), Fake GPU has \(9, 0\)"),
        ({"least": (8, 0), "target": "sm_80a"}, r"needs sm_80a, Fake GPU has \(9, 0\)"),  # with no later device's code
    ],
)
def test_a_kernel_for_another_device(cupy, options, message):
    kernel = launch.Kernel("none.cu", "other<{T}>", "P", **options)
    launch.KERNELS.remove(kernel)
    with pytest.raises(driver.DriverError, match=rf"kernel cupy other<T> {message}"):
        driver.engine(0)._load(kernel.form(np.dtype(np.float32)))
    assert cupy.targets == cupy.loaded == []


def test_products_get_their_shared_memory_and_their_architecture(cupy):
    x = FakeArray(np.empty((4096, 4096), np.float16))
    for _ in range(2):
        tilewise.matmul(x, x)
    tilewise.relu(x)
    assert cupy.targets == ["sm_90a", "sm_90"]
    assert cupy.allowed == [("the_entry", 8, 4 * (128 + 256) * 128)]  # once, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_...
    assert [shared for *_, shared, _, _ in cupy.launched] == [196_608, 196_608, 0]


def test_prepared_weights_are_given_back_when_no_stream_reads_them(cupy):
    prepared = tilewise.prepare_conv2d(np.ones((1, 3, 1, 1), np.float32))
    x = FakeArray(np.ones((1, 3, 2, 2), np.float32), ordinal=1)
    for _ in range(2):
        assert prepared(x).shape == (1, 1, 2, 2)
    # the memory may be in use in another stream; and once they have arrived, whatever stream reads them
    assert cupy.events == ["synchronize 1", "write 12", "synchronize 1"]
    del prepared
    gc.collect()
    assert cupy.events[3:] == ["synchronize 1", "free 12"]


def test_what_the_backend_lacks_says_so(cupy, monkeypatch):
    from tilewise.kernels.cupy import pool

    monkeypatch.delattr(pool, "avg_pool2d")
    with (
        tilewise.using(backend="cupy"),
        pytest.raises(NotImplementedError, match="avg_pool2d: backend 'cupy' does not have it"),
    ):
        tilewise.avg_pool2d(np.ones((1, 1, 4, 4), np.float32), 2)


def test_an_old_device_is_refused(cupy, monkeypatch):
    monkeypatch.setattr(cupy.cuda.Device, "compute_capability", "61")
    with pytest.raises(module.CompileError, match=r"compute capability 6\.1 is too old, the kernels need 7\.5"):
        driver.engine(2)


def test_without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(driver.DriverError, match=r"CuPy cannot be imported \(extra: cuda13 or cuda12\)"):
        driver.Driver(0)


def test_without_a_driver(cupy, monkeypatch):
    def fails(ordinal):
        raise RuntimeError("cudaErrorInsufficientDriver")

    monkeypatch.setattr(cupy.cuda, "Device", fails)
    with pytest.raises(driver.DriverError, match="GPU 0: cudaErrorInsufficientDriver"):
        driver.Driver(0)


@pytest.mark.parametrize(("installed", "reason"), [(True, None), (False, "CuPy is not installed")])
def test_availability(monkeypatch, installed, reason):
    monkeypatch.setattr(machine, "cuda_devices", lambda: (("GPU",), None))
    monkeypatch.setattr(machine, "find_spec", lambda name: object() if installed or name != "cupy" else None)
    missing = machine.unavailable_backends.__wrapped__()
    assert ("cupy" in missing) == (reason is not None)
    assert reason is None or missing["cupy"].startswith(reason)
    assert "cuda" not in missing


def test_cuda_comes_first(monkeypatch):
    monkeypatch.setattr(machine, "unavailable_backends", dict)
    dispatch.choose_backend.cache_clear()
    from tilewise.kernels import settings

    backend, rejected = dispatch.choose_backend(settings.intern("gpu", None, None))
    assert backend == "cuda"
    assert rejected == {}
    dispatch.choose_backend.cache_clear()
