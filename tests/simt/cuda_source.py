"""Kernels in CUDA C++ (kernels/cupy/src) executed on the CPU: an engine as emulator.py's, for what g++ compiles.

A source becomes one library, with all its instantiations: cuda_shim.h makes g++ understand it, the sanitizer's calls
before every load and store go to checks.cpp, and the scheduler is the same. Shared arrays are static ones of a kernel's
function, which its library's table of symbols tells.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from simt.emulator import _SHARED, CACHE, FOLDER, Emulator, runtime
from tilewise.kernels.cupy import launch
from tilewise.kernels.cupy.module import FOLDER as KERNELS
from tilewise.kernels.cupy.module import included

# Not vectorised: the sanitizer's calls are per access of the source. -O1: an access that is not needed is still gone.
# Shared arrays are each library's own, also where another one has the same kernel (-fno-gnu-unique).
_FLAGS = (
    "-O1", "-std=c++17", "-fPIC", "-fno-gnu-unique", "-fno-strict-aliasing", "-ffp-contract=off", "-Wall", "-Wextra",
    "-Werror", "-Wno-unknown-pragmas", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0",
)  # fmt: skip


def why_not() -> str | None:
    """Why kernels cannot be executed here; None where they can."""
    if shutil.which("g++") is None or shutil.which("nm") is None:
        return "no C++ compiler (g++, nm) for CUDA C++ on the CPU"
    if sysconfig.get_platform() != "linux-x86_64":
        return "the emulator's scheduler is written for Linux on x86-64"
    return None


@dataclass
class Code:
    """An instantiation, as emulator.Code. entry: the address of what calls it with a launch's buffer."""

    entry: int
    ranges: list[tuple[int, int, int]]

    @property
    def shared_bytes(self) -> int:
        return sum(size for _, size, _ in self.ranges)


def _forms(source: str) -> list:
    """Every instantiation of the kernels of a source."""
    return [kernel.form(dtype) for kernel in launch.KERNELS if kernel.source == source for dtype in kernel.dtypes]


class Library:
    """A source with instantiations, compiled by g++. folder: where it lies, with what it includes."""

    def __init__(self, source: str, expressions: list[str], folder: Path = KERNELS):
        runtime()
        self.numbers = {expression: i for i, expression in enumerate(expressions)}
        file = _compiled(source, expressions, folder)
        self._loaded = ctypes.CDLL(str(file))
        self._symbols = _symbols(file)

    def _address(self, name: str) -> int:
        address = ctypes.cast(getattr(self._loaded, name), ctypes.c_void_p).value
        assert address
        return address

    def sizes(self, expression: str) -> list[int]:
        """Bytes of each parameter, as C++ has them."""
        found = (ctypes.c_uint * 64)()
        count = getattr(self._loaded, f"simt_parameters_{self.numbers[expression]}")(found)
        return list(found[:count])

    def code(self, expression: str) -> Code:
        number = self.numbers[expression]
        base = self._address("simt_kernel_0") - self._symbols["simt_kernel_0"][0]
        kernel = getattr(self._loaded, f"simt_kernel_{number}")
        kernel.restype = ctypes.c_void_p
        place = kernel() - base
        (mangled,) = (name for name, (at, *_) in self._symbols.items() if at == place and name.startswith("_Z"))
        inside = f"_ZZ{mangled[2:]}E"  # what is a function's own: static variables, lambdas
        shared = [
            (base + at, size, _SHARED)
            for name, (at, size, kind) in self._symbols.items() if name.startswith(inside) and kind in "bBdDvV"
        ]  # fmt: skip
        return Code(self._address(f"simt_entry_{number}"), shared)


def _symbols(library: Path) -> dict[str, tuple[int, int, str]]:
    """name -> (address in the library, bytes, kind as nm has it: "b" and "V" are variables)."""
    listed = subprocess.run(["nm", "-S", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    fields = [line.split() for line in listed.splitlines()]
    return {f[3]: (int(f[0], 16), int(f[1], 16), f[2]) for f in fields if len(f) == 4}


def _unit(source: str, expressions: list[str]) -> str:
    """What g++ compiles: the source, and for each instantiation three functions that C can call."""
    lines = ['#include "cuda_shim.h"', f'#include "{source}"']
    for i, expression in enumerate(expressions):
        kernel = f"tilewise::{expression}"
        lines += [
            f'extern "C" void simt_entry_{i}(void *slots) {{ cuda_call({kernel}, slots); }}',
            f'extern "C" int simt_parameters_{i}(unsigned *sizes) {{ return cuda_parameters({kernel}, sizes); }}',
            f'extern "C" void *simt_kernel_{i}() {{ return address_of({kernel}); }}',
        ]
    return "\n".join(lines)


def _compiled(source: str, expressions: list[str], folder: Path) -> Path:
    unit = _unit(source, expressions)
    shims = [file.read_text(encoding="utf-8") for file in sorted(FOLDER.glob("*.h"))]
    texts = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}
    parts = (unit, _FLAGS, shims, included(source, texts))
    library = CACHE / f"{Path(source).stem}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        made, written = library.with_suffix(f".{os.getpid()}.o"), library.with_suffix(f".{os.getpid()}.cpp")
        written.write_text(unit, encoding="utf-8")
        folders = ["-I", str(FOLDER), "-I", str(folder)]
        subprocess.run(["g++", *_FLAGS, *folders, "-c", written, "-o", made], check=True)
        linked = library.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", "-shared", made, "-o", linked], check=True)
        written.unlink()
        made.unlink()
        linked.replace(library)
    return library


@lru_cache(maxsize=64)
def library_of(source: str) -> Library:
    return Library(source, [form.expression for form in _forms(source)])


class CudaSourceEmulator(Emulator):
    """An engine for kernels/cupy: see tilewise.kernels.cupy.driver.Driver, whose interface it has.

    folder: where the sources lie. Of changed ones only what is launched is compiled.
    """

    backend = "cupy"

    def __init__(self, folder: Path = KERNELS):
        super().__init__()
        self.folder = folder

    def compile(self, form):
        changed = self.folder != KERNELS
        source, folder = form.kernel.source, self.folder
        library = Library(source, [form.expression], folder) if changed else library_of(source)
        assert library.sizes(form.expression) == form.sizes, (
            f"{form.kernel.name}: launch.py packs parameters of {form.sizes} bytes, "
            f"the source has {library.sizes(form.expression)}"
        )
        return library.code(form.expression)
