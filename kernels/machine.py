"""What this machine has: the CPU, CUDA GPUs, and why a backend cannot be used. Probing makes no CUDA context."""

import ctypes
import os
import platform
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec

from tilewise.kernels.estimate import GpuRates

_DRIVER = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"


@dataclass(frozen=True, slots=True)
class Device:
    """A device and its backends: backend name -> None where usable, else the reason."""

    name: str
    kind: str  # "cpu" or "gpu"
    backends: dict[str, str | None] = field(default_factory=dict)


def driver_library() -> ctypes.CDLL:
    """NVIDIA's driver; raises OSError where there is none."""
    return ctypes.CDLL(_DRIVER)


@lru_cache(maxsize=1)
def cuda_devices() -> tuple[tuple[str, ...], str | None]:
    """The names of the CUDA devices, and, where there are none, the reason. Asks the driver without a context."""
    try:
        driver = driver_library()
    except OSError:
        return (), f"no NVIDIA driver ({_DRIVER} was not found)"
    status = driver.cuInit(0)
    if status != 0:
        return (), f"the NVIDIA driver did not start (cuInit returned {status})"
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    names = []
    for ordinal in range(count.value):
        device, text = ctypes.c_int(), ctypes.create_string_buffer(256)
        driver.cuDeviceGet(ctypes.byref(device), ordinal)
        driver.cuDeviceGetName(text, len(text), device)
        names.append(text.value.decode(errors="replace"))
    return (tuple(names), None) if names else ((), "the NVIDIA driver lists no device")


# CUDA's numbers of a device's attributes
_MULTIPROCESSORS, _CLOCK_KHZ, _MEMORY_KHZ, _BUS_BITS, _MAJOR, _MINOR = 16, 13, 36, 37, 75, 76


@lru_cache(maxsize=1)
def gpu_rates() -> GpuRates | None:
    """Nominal rates of the first GPU; None where there is none, or it does not tell. Asks without a context."""
    if not cuda_devices()[0]:
        return None
    driver = driver_library()
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    driver.cuDeviceGet(ctypes.byref(device), 0)

    def attribute(which: int) -> int:
        value = ctypes.c_int()
        return value.value if driver.cuDeviceGetAttribute(ctypes.byref(value), which, device) == 0 else 0

    capability = attribute(_MAJOR), attribute(_MINOR)
    cores = 64 if capability in ((7, 0), (7, 5), (8, 0)) else 128  # of a multiprocessor
    flops = 2e3 * attribute(_MULTIPROCESSORS) * cores * attribute(_CLOCK_KHZ)
    moved = 2e3 * attribute(_MEMORY_KHZ) * attribute(_BUS_BITS) / 8
    if driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device) != 0 or not (flops and moved):
        return None
    double = 0.5 if capability in ((7, 0), (8, 0), (9, 0), (10, 0)) else 1 / 64
    return GpuRates(flops, moved, double, memory.value)


@lru_cache(maxsize=1)
def unavailable_backends() -> dict[str, str]:
    """Backend -> why it cannot be used here; a usable backend is not in it."""
    _, no_device = cuda_devices()
    if no_device:
        return {"cuda": no_device, "cupy": no_device}
    missing = {}
    if find_spec("cupy") is None:
        missing["cupy"] = "CuPy is not installed (extra: cuda13 or cuda12)"
    if find_spec("numba_cuda") is None or find_spec("cuda.bindings") is None:
        missing["cuda"] = "numba-cuda is not installed (extra: cuda13 or cuda12)"
    return missing


def thread_limit() -> int:
    """How many threads a kernel can use at most: NUMBA_NUM_THREADS, or the number of usable cores."""
    import numba

    return numba.config.NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue]


def cpu_name() -> str:
    """The processor's own name, or its architecture where the system does not tell."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
            for line in cpuinfo:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_architecture() -> str:
    """LLVM's name of the processor that kernels are compiled for, such as znver4: some names are shared by many."""
    import numba
    from llvmlite import binding

    return numba.config.CPU_NAME or binding.get_host_cpu_name()  # pyright: ignore[reportAttributeAccessIssue]


def list_devices() -> list[Device]:
    missing = unavailable_backends()
    gpu_backends: dict[str, str | None] = {name: missing.get(name) for name in ("cuda", "cupy")}
    found = [Device(cpu_name(), "cpu", {"cpu": None, "reference": None})]
    names, reason = cuda_devices()
    found += [Device(name, "gpu", dict(gpu_backends)) for name in names]
    if reason:
        found.append(Device(f"no GPU: {reason}", "gpu", dict(gpu_backends)))
    return found
