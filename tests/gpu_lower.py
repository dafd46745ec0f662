"""The LLVM IR that numba-cuda makes of a kernel: made once, for the gate (gpu_compile.py) and the emulator (simt).

Numba's part of a compilation takes longest, and is the same for all architectures but for the launch bounds. It is kept
in the checkout's .cache under a hash of the sources that a kernel is made of.
"""

import hashlib
import json
import os
import re
import zlib
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".cache" / "lowered"
_FOLDER = "tilewise.kernels.cuda"


@lru_cache(maxsize=128)
def stamp(module: str) -> str:
    """A hash of a module of kernels/cuda, of the package's that it imports, and so on, and of what compiles them."""
    texts: dict[str, str] = {}
    left = [module]
    while left:
        name = left.pop()
        if name in texts:
            continue
        texts[name] = Path(str(import_module(name).__file__)).read_text(encoding="utf-8")
        left += re.findall(r"^from (tilewise\.kernels\.(?:cuda\.\w+|\w+_plan)) import", texts[name], re.M)
        for names in re.findall(rf"^from {_FOLDER} import (\([^)]*\)|.*)$", texts[name], re.M):
            left += [f"{_FOLDER}.{n}" for n in re.findall(r"\w+", names)]
    parts = [version("numba-cuda"), version("numba"), *(f"{name}\n{texts[name]}" for name in sorted(texts))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def lowered(form, capability: tuple[int, ...]) -> tuple[str, list[str]]:
    """(the entry's name, modules of LLVM IR) of a form; of tilewise's own kernels from the cache where it is there."""
    from tilewise.kernels.cuda.launch import KERNELS

    kernel, bounds = form.kernel, form.kernel.bounds(capability)
    if kernel not in KERNELS:
        return _lower(form, capability, bounds)
    form_name = re.sub(r"\W+", "_", f"{kernel.name} {form.dtype.name} {bounds}")
    file = CACHE / f"{form_name}-{stamp(kernel.function.__module__)}"
    try:
        entry, *modules = json.loads(zlib.decompress(file.read_bytes()))
        return entry, modules
    except (OSError, ValueError, zlib.error):
        pass
    entry, modules = _lower(form, capability, bounds)
    for old in CACHE.glob(f"{form_name}-*"):
        old.unlink(missing_ok=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(zlib.compress(json.dumps([entry, *modules]).encode(), 1))
    unfinished.replace(file)
    return entry, modules


def _lower(form, capability, bounds) -> tuple[str, list[str]]:
    from numba.cuda.compiler import _compile_pyfunc_with_fixup

    from tilewise.kernels.cuda.inlining import quick_inlining

    with quick_inlining():
        library, _ = _compile_pyfunc_with_fixup(
            form.kernel.function, form.signature, device=False, cc=capability, abi="numba", launch_bounds=bounds
        )
    return library._entry_name, list(library.llvm_strs)


def ptx(form, capability: tuple[int, ...]) -> str:
    """form.ptx(capability), from its IR."""
    from numba.cuda.cudadrv import nvrtc, nvvm

    _, modules = lowered(form, capability)
    text = nvvm.compile_ir(modules, fastmath=False, opt=3, arch=nvrtc.get_arch_option(*capability))
    return text.decode().strip("\0").strip()
