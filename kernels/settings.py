"""The choice of device, backend, thread count and precision: `using(...)`, the environment, the default.

The innermost `using` wins over the environment, that over the default, field by field. The current choice is a
context variable: safe with threads and asyncio. Equal choices are one object, so that a plan cache may key on identity.
"""

import os
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache

from tilewise.kernels import machine

DEVICES = ("auto", "cpu", "gpu")
DEVICE_OF = {"cpu": "cpu", "reference": "cpu", "cuda": "gpu", "cupy": "gpu"}  # backend -> device


@dataclass(frozen=True, eq=False, slots=True)
class Settings:
    device: str = "auto"
    backend: str | None = None  # None: chosen by the dispatcher
    threads: int | None = None  # None: Numba's current count
    explaining: bool = False  # the dispatcher plans, and hands out the decision instead of running it
    tf32: bool = False  # whether float32 products on a GPU may round their operands to TF32's 10 bits


@lru_cache(maxsize=256)
def intern(
    device: str, backend: str | None, threads: int | None, explaining: bool = False, tf32: bool = False
) -> Settings:
    return Settings(device, backend, threads, explaining, tf32)


current: ContextVar[Settings | None] = ContextVar("tilewise_settings", default=None)
# What each `using` entered in this context is to put back. Kept here and not in the `using`, which threads may share.
outer: ContextVar[tuple[Settings | None, ...]] = ContextVar("tilewise_outer_settings", default=())


def checked(device, backend, threads, tf32=False, source: str = "using") -> Settings:
    """The settings for these, or an error that names what was wrong and where it came from."""
    if device not in DEVICES:
        raise ValueError(f"{source}: device must be one of {', '.join(DEVICES)}, got {device!r}")
    if backend is not None and backend not in DEVICE_OF:
        raise ValueError(f"{source}: backend must be one of {', '.join(DEVICE_OF)}, got {backend!r}")
    if backend is not None and device not in ("auto", DEVICE_OF[backend]):
        raise ValueError(f"{source}: backend {backend!r} runs on the {DEVICE_OF[backend]}, but device is {device!r}")
    if threads is not None:
        if not isinstance(threads, int) or isinstance(threads, bool):
            raise TypeError(f"{source}: threads must be an int, got {type(threads).__name__}")
        if threads < 1:
            raise ValueError(f"{source}: threads must be at least 1, got {threads}")
        limit = machine.thread_limit()
        if threads > limit:
            raise ValueError(f"{source}: threads must be at most {limit} (NUMBA_NUM_THREADS), got {threads}")
    if not isinstance(tf32, bool):
        raise TypeError(f"{source}: tf32 must be True or False, got {type(tf32).__name__}")
    return intern(device, backend, threads, False, tf32)


@lru_cache(maxsize=1)
def from_environment() -> Settings:
    """What TILEWISE_DEVICE, _BACKEND, _THREADS and _TF32 ask for; read once, at the first call."""
    threads = os.environ.get("TILEWISE_THREADS") or None
    if threads is not None:
        try:
            threads = int(threads)
        except ValueError:
            raise ValueError(f"TILEWISE_THREADS must be a whole number, got {threads!r}") from None
    tf32 = os.environ.get("TILEWISE_TF32") or "0"
    if tf32 not in ("0", "1"):
        raise ValueError(f"TILEWISE_TF32 must be 0 or 1, got {tf32!r}")
    device = os.environ.get("TILEWISE_DEVICE") or "auto"
    return checked(device, os.environ.get("TILEWISE_BACKEND") or None, threads, tf32 == "1", "environment TILEWISE_*")


def active() -> Settings:
    """The settings in force here and now."""
    return current.get() or from_environment()
