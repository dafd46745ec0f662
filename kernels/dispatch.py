"""From a call to the code that runs it: array -> device -> backend -> implementation.

`using` pins the choice, `explain` shows it, `devices` lists what there is. operation.py calls what is chosen here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from typing import Any

from tilewise.kernels import estimate, gpu_choice
from tilewise.kernels import machine as machine_module
from tilewise.kernels import settings as settings_module


@dataclass(frozen=True, slots=True)
class Decision:
    """What the dispatcher would do with a call, and why; see `explain`."""

    operation: str
    device: str
    backend: str
    algorithm: str
    flops: int
    bytes: int
    rejected: dict[str, str] = field(default_factory=dict)
    note: str = ""  # what else is good to know, such as that float16 is computed in float32, or images copied

    def __str__(self):
        lines = [
            f"{self.operation} -> device {self.device}, backend {self.backend}, algorithm {self.algorithm}",
            f"  {self.flops:,} FLOPs, {self.bytes:,} bytes",
        ]
        lines += [f"  {self.note}"] if self.note else []
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected.items()]
        return "\n".join(lines)


class Explained(BaseException):
    """Carries a decision out of a call that `explain` makes; never escapes it."""

    def __init__(self, decision: Decision):
        self.decision = decision


@lru_cache(maxsize=64)
def implementation_module(backend: str, family: str) -> Any:
    """The backend's file of a family; None where it has none."""
    name = f"tilewise.kernels.{backend}.{family}"
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # a fault inside of the file
            raise
        return None


@lru_cache(maxsize=64)
def choose_backend(settings, on_device: bool = False) -> tuple[str, dict[str, str]]:
    """The backend under these settings for arrays on the host or on a GPU, and why not the others.

    Of a GPU's backends the first usable one; `choose_for` looks at the call. An explicit choice that cannot be met
    raises RuntimeError with the reason; only "auto" falls back.
    """
    missing = machine_module.unavailable_backends()
    device_of = settings_module.DEVICE_OF
    if settings.backend is not None:
        if settings.backend in missing:
            raise RuntimeError(f"backend {settings.backend!r} is not available: {missing[settings.backend]}")
        if on_device and device_of[settings.backend] != "gpu":
            raise RuntimeError(f"backend {settings.backend!r} runs on the CPU, but the arrays lie on the GPU")
        return settings.backend, {}
    if on_device and settings.device == "cpu":
        raise RuntimeError("device 'cpu' was asked for, but the arrays lie on the GPU; copy them to the host")
    if on_device or settings.device == "gpu":
        usable = usable_gpu_backends()
        if not usable:
            raise RuntimeError(f"device 'gpu' is not available: {missing['cuda']}")
        return usable[0], {name: missing[name] for name in missing if device_of[name] == "gpu"}
    return "cpu", missing | {"reference": "slower by construction; ask for it with using(backend='reference')"}


def usable_gpu_backends() -> list[str]:
    missing = machine_module.unavailable_backends()
    return [name for name in gpu_choice.DEFAULT if name not in missing]


def _lacks(backend: str, call: gpu_choice.Call) -> str | None:
    """Why a backend cannot compute a call; None where it can."""
    module = implementation_module(backend, call.family)
    if not hasattr(module, call.op):
        return f"it does not have {call.op}"
    if call.dtype == "bfloat16" and not getattr(module, "HAS_BFLOAT16", False):
        return f"its {call.op} has no bfloat16"
    return None


def _choose_on_gpu(call: gpu_choice.Call, ordinal: int) -> tuple[str | None, dict[str, str]]:
    names, _ = machine_module.cuda_devices()
    device = names[ordinal] if ordinal < len(names) else None
    return gpu_choice.choose(call, device, usable_gpu_backends(), lambda backend: _lacks(backend, call))


def choose_for(settings, call: gpu_choice.Call, ordinal: int | None, itemsize: int) -> tuple[str, dict[str, str]]:
    """The backend for a call, and why not the others. ordinal: the GPU that the arrays lie on; None for the host."""
    if ordinal is None and settings.backend is None and settings.device == "auto":
        return _choose_for_host(settings, call, itemsize)
    backend, rejected = choose_backend(settings, ordinal is not None)
    if settings.backend is not None or settings_module.DEVICE_OF[backend] != "gpu":
        return backend, rejected
    chosen, others = _choose_on_gpu(call, ordinal or 0)
    return chosen or backend, rejected | others  # where none can, the first one says so


def _choose_for_host(settings, call: gpu_choice.Call, itemsize: int) -> tuple[str, dict[str, str]]:
    """For arrays on the host, left free: a GPU's backend where that is estimated to be worth the transfers, or where
    the CPU does not have the dtype, whatever the size."""
    backend, rejected = choose_backend(settings)
    usable = usable_gpu_backends()
    if not usable:
        return backend, rejected
    rates = machine_module.gpu_rates()
    reason = (
        "the driver does not tell the GPU's rates" if rates is None
        else estimate.why_not(call.flops, call.bytes, itemsize, rates)
    )  # fmt: skip
    why_gpu = "estimated to take more than twice as long as the GPU with the transfers"
    if reason is not None:
        lack = _lacks(backend, call)
        if lack is None:
            return backend, rejected | dict.fromkeys(usable, reason)
        why_gpu = lack
    chosen, others = _choose_on_gpu(call, 0)
    if chosen is None:
        return backend, rejected | others
    return chosen, rejected | others | {backend: why_gpu}


class using:
    """`with using(device=..., backend=..., threads=...)` pins the dispatcher's choice inside the block.

    Args:
        device: "auto", "cpu" or "gpu".
        backend: "cpu", "reference", "cuda" or "cupy".
        threads: how many threads a CPU kernel may use, from 1 to Numba's limit (NUMBA_NUM_THREADS).
        tf32: whether float32 matrix products on a GPU may round their operands to TF32 (10 bits of mantissa instead of
            23), which tensor cores multiply; without it float32 is float32.

    What is not given stays as the enclosing `using`, the environment (TILEWISE_DEVICE, TILEWISE_BACKEND,
    TILEWISE_THREADS, TILEWISE_TF32=1) or the default has it. Safe with threads and asyncio; may be entered more than
    once.

    Raises:
        TypeError, ValueError: not a device, backend, thread count or truth value.
        RuntimeError: on entering, when the choice cannot be met, with the reason.
    """

    def __init__(
        self, *, device: str | None = None, backend: str | None = None, threads: int | None = None,
        tf32: bool | None = None,
    ):  # fmt: skip
        settings_module.checked("auto" if device is None else device, backend, threads, False if tf32 is None else tf32)
        self._choice = (device, backend, threads, tf32)

    def __enter__(self):
        outer = settings_module.active()
        device, backend, threads, tf32 = self._choice
        if device is not None and backend is None and outer.backend is not None:
            # A device pinned inside a pinned backend: the inner one wins where the two do not agree.
            backend = outer.backend if device in ("auto", settings_module.DEVICE_OF[outer.backend]) else None
        elif backend is None:
            backend = outer.backend
        if device is None:
            device = outer.device
            if backend is not None and device not in ("auto", settings_module.DEVICE_OF[backend]):
                device = "auto"
        threads, tf32 = outer.threads if threads is None else threads, outer.tf32 if tf32 is None else tf32
        settings = settings_module.intern(device, backend, threads, False, tf32)
        choose_backend(settings)
        settings_module.outer.set((*settings_module.outer.get(), settings_module.current.get()))
        settings_module.current.set(settings)
        return self

    def __exit__(self, *error):
        *rest, before = settings_module.outer.get()
        settings_module.outer.set(tuple(rest))
        settings_module.current.set(before)
        return False


def explain(function: Callable, *args, **kwargs) -> Decision:
    """What `function(*args, **kwargs)` would do, without doing it: device, backend, algorithm, work, and for each
    candidate not taken, why. Of several GPUs, the one that the arrays lie on is meant; of host arrays, the first.

    Raises whatever the call itself would raise for wrong arguments; TypeError for a function that is not tilewise's.
    """
    here = settings_module.active()
    token = settings_module.current.set(
        settings_module.intern(here.device, here.backend, here.threads, True, here.tf32)
    )
    try:
        function(*args, **kwargs)
    except Explained as explained:
        return explained.decision
    finally:
        settings_module.current.reset(token)
    raise TypeError(f"explain: {function!r} is not one of tilewise's dispatched functions")


def devices() -> list[machine_module.Device]:
    """The devices of this machine, each with its backends: None where usable, else why it is not."""
    return machine_module.list_devices()
