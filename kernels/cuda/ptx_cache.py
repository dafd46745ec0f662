"""The PTX of kernels, kept on disk beside Numba's cache of the CPU kernels, so that a second process compiles nothing.

A file's name is a hash of everything that its text depends on: the sources of this folder, the versions of numba-cuda,
Numba and the CUDA compiler, the kernel, its dtype and the compute capability. Where no folder can be written, every
process compiles.
"""

import hashlib
import os
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from inspect import getclosurevars
from pathlib import Path

from tilewise.kernels.disk_cache import cache_folder, source_stamp

_PLAIN = (int, float, bool, str, tuple, type(None))


@lru_cache(maxsize=1)
def _folder() -> Path | None:
    base = cache_folder()
    return None if base is None else base / "ptx"


@lru_cache(maxsize=1)
def _stamp() -> str:
    # cuda-bindings go with CUDA's version, and so with its compiler's: a newer one's PTX is not for an older driver
    packages = "numba-cuda", "numba", "cuda-bindings"
    # all sources: kernels take constants from the plans, too
    return "-".join([source_stamp(), *(_version(package) for package in packages)])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # the CUDA that is installed beside Python
        return ""


def key(form, capability: tuple[int, int]) -> str:
    """The same for the same text."""
    kernel = form.kernel
    function = kernel.function
    # what tells the kernels of a factory apart, beside their names: the constants that they enclose
    enclosed = sorted((k, v) for k, v in getclosurevars(function).nonlocals.items() if isinstance(v, _PLAIN))
    parts = (
        _stamp(), function.__module__, function.__qualname__, kernel.name, enclosed,
        kernel.threads, kernel.blocks, form.dtype.name, capability,
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def ptx(form, capability: tuple[int, int]) -> str:
    """form.ptx(capability), from the cache where it is there."""
    folder = _folder()
    if folder is None:
        return form.ptx(capability)
    file = folder / f"{form.kernel.function.__name__}-{key(form, capability)}.ptx"
    try:
        text = file.read_text(encoding="utf-8")
        if text.rstrip().endswith("}"):  # not one that a full disk cut off
            return text
    except (OSError, UnicodeDecodeError):
        pass
    text = form.ptx(capability)
    unfinished = file.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(file)
    return text
