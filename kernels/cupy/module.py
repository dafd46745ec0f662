"""CUDA C++ compiled by NVRTC for a device; the machine code is kept on disk, and a second process compiles nothing.

A source of src/ holds kernel templates; what is compiled is one instantiation of one of them, named by an expression
such as `avg_pool<float, 4, 3, int>`. A file's name in the cache is a hash of everything that its code depends on: the
sources of this folder, the version of NVRTC, the expression and the architecture.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from tilewise.kernels.disk_cache import cache_folder, source_stamp

FOLDER = Path(__file__).parent / "src"
OLDEST = (7, 5)  # the first compute capability that kernels are compiled for
NAMESPACE = "tilewise"
OPTIONS = ("-std=c++17",)
_SUFFIXES = (".cu", ".cuh")
_INCLUDE = re.compile(r'^#include "([^"]+)"', re.M)
_PART_OF_A_MAJOR = 10  # architectures are numbered 10 * major + minor


class CompileError(RuntimeError):
    """NVRTC is not there, or refused a source; the message has its log."""


@dataclass(frozen=True, slots=True)
class Code:
    """An instantiation of a kernel: what the driver loads (a cubin, or PTX), and the kernel's name in it."""

    entry: str
    binary: bytes


@lru_cache(maxsize=1)
def sources() -> dict[str, str]:
    """File name -> text, of all kernels and what they include."""
    files = sorted(file for file in FOLDER.iterdir() if file.suffix in _SUFFIXES)
    return {file.name: file.read_text(encoding="utf-8") for file in files}


def included(source: str, texts: Mapping[str, str]) -> dict[str, str]:
    """Those of the texts that a source is compiled of: itself, what it includes, what that includes, and so on."""
    found: dict[str, str] = {}
    left = [source]
    while left:
        name = left.pop()
        if name in texts and name not in found:
            found[name] = texts[name]
            left += _INCLUDE.findall(texts[name])
    return dict(sorted(found.items()))


@lru_cache(maxsize=1)
def _nvrtc() -> tuple[Any, tuple[int, int]]:
    """CuPy's binding of NVRTC, and NVRTC's version."""
    try:
        nvrtc: Any = import_module("cupy.cuda").nvrtc
    except ImportError as error:
        raise CompileError(f"CuPy cannot be imported (extra: cuda13 or cuda12): {error}") from error
    try:
        return nvrtc, nvrtc.getVersion()
    except Exception as error:  # whatever the binding raises where it finds no library
        raise CompileError(f"NVRTC, CUDA's compiler, is not there (pip install nvidia-cuda-nvrtc): {error}") from error


def architecture(capability: tuple[int, int], known: tuple[int, ...]) -> str:
    """What to compile for, for a device: "sm_90".

    known: the architectures that NVRTC has, as in 90. Code for one runs on later devices of its major number; a device
    of a later one gets PTX ("compute_120"), which the driver compiles.
    """
    if capability < OLDEST:
        raise CompileError(f"compute capability {_dotted(capability)} is too old, the kernels need {_dotted(OLDEST)}")
    number = capability[0] * _PART_OF_A_MAJOR + capability[1]
    usable = [k for k in known if k <= number]
    if not usable:
        raise CompileError(f"the installed NVRTC does not know compute capability {_dotted(capability)} any more")
    newest = max(usable)
    return f"{'sm' if newest // _PART_OF_A_MAJOR == capability[0] else 'compute'}_{newest}"


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def architecture_for(capability: tuple[int, int]) -> str:
    """`architecture` with the NVRTC at hand."""
    return architecture(capability, _nvrtc()[0].getSupportedArchs())


def compiled(source: str, expression: str, target: str, options: tuple[str, ...] = ()) -> tuple[Code, str]:
    """An instantiation for an architecture ("sm_90", or "compute_90" for PTX), and what NVRTC said.

    Raises:
        CompileError: with NVRTC's log.
    """
    nvrtc, _ = _nvrtc()
    texts = included(source, sources())
    headers = {name.encode(): text.encode() for name, text in texts.items() if name != source}
    name = f"{NAMESPACE}::{expression}"
    program = nvrtc.createProgram(texts[source], source, list(headers.values()), list(headers))
    try:
        nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, [f"-arch={target}", *OPTIONS, *options])
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            raise CompileError(f"{source}: {expression} for {target}: {error}\n{log}") from error
        read = nvrtc.getCUBIN if target.startswith("sm_") else nvrtc.getPTX
        # CuPy strips the zero that ends a text, also of machine code, where it is the high byte of an alignment.
        code = Code(nvrtc.getLoweredName(program, name), read(program) + b"\0")
        return code, nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)


# ---- on disk


@lru_cache(maxsize=1)
def _folder() -> Path | None:
    base = cache_folder()
    return None if base is None else base / "cubin"


def code(source: str, expression: str, target: str) -> Code:
    """`compiled`, from the cache where it is there. Where no folder can be written, every process compiles."""
    folder = _folder()
    if folder is None:
        return compiled(source, expression, target)[0]
    parts = (source_stamp("cupy"), _nvrtc()[1], source, expression, target, OPTIONS)
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    file = folder / f"{expression.partition('<')[0]}-{digest}"
    with suppress(OSError, ValueError):
        header, binary = file.read_bytes().split(b"\n", 1)
        entry, length = header.decode().split(" ")
        if int(length) == len(binary):  # not one that a full disk cut off
            return Code(entry, binary)
    made, _ = compiled(source, expression, target)
    unfinished = file.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(f"{made.entry} {len(made.binary)}\n".encode() + made.binary)
        unfinished.replace(file)
    return made
