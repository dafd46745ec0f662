"""A GPU that is no GPU: an engine for tilewise's kernels that executes them on the CPU, thread by thread.

`Emulator` stands where driver.Driver stands on a machine with a GPU. Its memory is the host's, every array between two
fences that are checked after each launch. A kernel is compiled by numba-cuda to LLVM IR, translated (translate.py),
compiled for this processor, and run by the scheduler in runtime.cpp, in the schedule that the test asks for.
"""

import ctypes
import hashlib
import json
import mmap
import os
import re
import shutil
import subprocess
import sysconfig
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from gpu_lower import lowered, stamp

from simt.checks import instrument
from simt.translate import GAP, Unsupported, translate

FOLDER = Path(__file__).parent
SCHEDULES = {"forward": 0, "reverse": 1, "shuffled": 2, "warp by warp": 3, "warps reversed": 4}
TESTED_NUMBA_CUDA = "0.30"
CACHE = FOLDER.parent.parent / ".cache" / "simt"
# (kernel's name, dtype's name) of all that was launched in this process, and what could not be run: conftest.py tells
LAUNCHED: set[tuple[str, str]] = set()
UNSUPPORTED: set[str] = set()
FENCE = 256  # bytes before and after each array
_PATTERN = 0xFF
_LARGE = 1 << 28  # bytes from which a memory is made of pages that are there only once they are touched
_MOST_BLOCKS = (1 << 31) - 1, 65_535, 65_535  # of a grid's x, y, z (CUDA C++ Programming Guide)
# KB of shared memory that a block may have, by compute capability (the same)
_MOST_SHARED = {(7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}


class EmulatedFault(RuntimeError):
    """What a GPU would not tell: a race's deadlock, an access outside of an array, a copy nobody waited for."""


def why_not() -> str | None:
    """Why kernels cannot be executed here; None where they can."""
    try:
        import numba_cuda
    except ImportError:
        return "numba-cuda is not installed (extra: gpu)"
    if not numba_cuda.__version__.startswith(TESTED_NUMBA_CUDA):
        return (
            f"the emulator reads numba-cuda {TESTED_NUMBA_CUDA}'s internals, and {numba_cuda.__version__} is installed"
        )
    if shutil.which("g++") is None:
        return "no C++ compiler (g++) for the emulator's scheduler"
    if sysconfig.get_platform() != "linux-x86_64":
        return "the emulator's scheduler is written for Linux on x86-64"
    return None


@lru_cache(maxsize=1)
def runtime() -> ctypes.CDLL:
    """The scheduler, compiled once for each version of its source."""
    sources = [FOLDER / name for name in ("runtime.cpp", "checks.cpp", "ptx.cpp", "pipeline.cpp", "cuda_calls.cpp")]
    stamp = hashlib.sha256(b"".join(p.read_bytes() for p in [*sources, FOLDER / "runtime.h"])).hexdigest()[:16]
    library = CACHE / f"simt-{stamp}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with_name = library.with_suffix(f".{os.getpid()}")
        command = ["g++", "-O2", "-std=c++17", "-fPIC", "-shared", "-o", with_name, *sources]
        subprocess.run(command, check=True)
        with_name.replace(library)
    llvm.load_library_permanently(str(library))
    loaded = ctypes.CDLL(str(library))
    loaded.simt_message.restype = ctypes.c_char_p
    return loaded


@lru_cache(maxsize=1)
def _target():
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    return target.create_target_machine(
        opt=2, reloc="pic", codemodel="jitdefault", cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
    )  # fmt: skip


class Code:
    """A kernel's form, compiled for this processor.

    entry: the address of its code. ranges: (address, bytes, kind) of its shared arrays and constants.
    """

    def __init__(self, form, capability):
        binary, known = _kept_or_compiled(form, capability)
        machine = _target()
        self.engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        self.engine.add_object_file(llvm.ObjectFileRef.from_data(binary))
        self.engine.finalize_object()
        self.entry = self.engine.get_function_address("simt_entry")
        self.ranges = [(self.engine.get_global_value_address(name), *rest) for name, *rest in known]
        self.shared_bytes = sum(size for _, size, kind in self.ranges if kind == _SHARED)
        self.engine.detach()  # it lives as long as the process: at exit, LLVM may be gone before it


_ARRAY, _SHARED, _CONSTANT = range(3)


def _compile(form, capability) -> tuple[bytes, list]:
    """Machine code, and (name, bytes, kind) of the arrays it has."""
    entry, texts = lowered(form, capability)
    parts = [llvm.parse_assembly(translate(text)) for text in texts]
    module = parts[0]
    for part in parts[1:]:
        module.link_in(part)
    _wrap(module, entry)
    machine = _target()
    # a vectorised loop may load under a mask, which the checks do not know
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = False
    llvm.create_pass_builder(machine, options).getModulePassManager().run(
        module, llvm.create_pass_builder(machine, options)
    )
    module = llvm.parse_assembly(instrument(str(module)))
    runtime()
    unknown = [f.name for f in module.functions if f.is_declaration and not _is_known(f.name)]
    if unknown:
        raise Unsupported(f"no emulation for {', '.join(unknown)}")
    arrays = []
    for variable in module.global_variables:
        declared = str(variable)
        if " external " in declared:
            continue
        size = machine.target_data.get_abi_size(variable.global_value_type)
        if "addrspace(3)" in declared.split("[", 1)[0]:
            element = size // int(re.search(r"\[(\d+) x", declared)[1])
            arrays.append((variable.name, size - GAP * element, _SHARED))
        elif variable.linkage in (llvm.Linkage.external, llvm.Linkage.common):
            arrays.append((variable.name, size, _CONSTANT))
    return machine.emit_object(module), arrays


def _is_known(name: str) -> bool:
    return name.startswith("llvm.") or llvm.address_of_symbol(name) is not None


@lru_cache(maxsize=1)
def _sources() -> bytes:
    """What compiled kernels depend on beside their own sources."""
    parts = [path.read_bytes() for path in (FOLDER / "translate.py", FOLDER / "checks.py", Path(__file__))]
    parts += [llvm.get_host_cpu_name().encode(), repr(llvm.llvm_version_info).encode()]
    return b"".join(parts)


def _kept_or_compiled(form, capability) -> tuple[bytes, list]:
    """Machine code of tilewise's own kernels is kept in the checkout's .cache."""
    from tilewise.kernels.cuda.launch import KERNELS

    kernel = form.kernel
    if kernel not in KERNELS:
        return _compile(form, capability)
    parts = stamp(kernel.function.__module__) + kernel.name + form.dtype.name
    own = hashlib.sha256(_sources() + parts.encode()).hexdigest()[:32]
    file = CACHE / f"{kernel.function.__name__}-{own}"
    try:
        arrays, binary = file.read_bytes().split(b"\n", 1)
        return binary, json.loads(arrays)
    except (OSError, ValueError):
        pass
    binary, arrays = _compile(form, capability)
    CACHE.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(json.dumps(arrays).encode() + b"\n" + binary)
    unfinished.replace(file)
    return binary, arrays


def _wrap(module, entry):
    """simt_entry(slots): the kernel with its arguments read from slots of eight bytes."""
    kinds = [str(argument.type) for argument in module.get_function(entry).arguments]
    lines = [
        f"  %p{i} = getelementptr i64, ptr %slots, i32 {i}\n  %v{i} = load {kind}, ptr %p{i}"
        for i, kind in enumerate(kinds)
    ]
    arguments = ", ".join(f"{kind} %v{i}" for i, kind in enumerate(kinds))
    text = f'declare void @"{entry}"({", ".join(kinds)})\ndefine void @simt_entry(ptr %slots) {{\n'
    text += "\n".join(lines) + f'\n  call void @"{entry}"({arguments})\n  ret void\n}}\n'
    wrapper = llvm.parse_assembly(text)
    wrapper.triple = module.triple
    module.link_in(wrapper)


class _Grid(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint)]


class Memory:
    """Bytes between two fences, filled with a pattern that is NaN in every float; sparse ones with 0, untouched."""

    def __init__(self, nbytes, sparse=False):
        self.nbytes = nbytes
        size = nbytes + 3 * FENCE
        whole = np.full(size, _PATTERN, np.uint8) if not sparse else _untouched(size)
        skip = -(whole.ctypes.data + FENCE) % FENCE
        self.whole, self.first = whole, skip + FENCE
        self.pointer = whole.ctypes.data + self.first
        if sparse:
            whole[: self.first] = whole[self.first + nbytes :] = _PATTERN

    @property
    def bytes(self):
        return self.whole[self.first : self.first + self.nbytes]

    def check(self):
        before, after = self.whole[: self.first], self.whole[self.first + self.nbytes :]
        if (before != _PATTERN).any() or (after != _PATTERN).any():
            raise EmulatedFault("a kernel wrote outside of an array")


def _untouched(nbytes) -> np.ndarray:
    """Zeros, whatever memory the machine has."""
    if nbytes < _LARGE:
        return np.zeros(nbytes, np.uint8)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.11
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=flags), np.uint8)


class Emulator:
    """An engine: see driver.Driver, whose interface it has.

    schedule: a key of SCHEDULES. eager_copies: whether cp.async copies at once, or when it is waited for.
    launched: (kernel's name, dtype's name) of everything that was launched.
    last_blocks: where it is set, each launch runs so many blocks along x, y, z, its last ones, and memory is zeros that
    take room only where they are touched: for arrays that are larger than the machine.
    """

    name = "emulated GPU"
    backend = "cuda"

    def __init__(self, capability=(9, 0), schedule="forward", eager_copies=False):
        self.capability, self.multiprocessors = capability, 4
        self.schedule, self.eager_copies = schedule, eager_copies
        self.launched: set[tuple[str, str]] = set()
        self.last_blocks: tuple[int, int, int] | None = None
        self._codes: dict = {}
        self._memories: list = []

    @property
    def most_shared(self) -> int:
        return _MOST_SHARED[self.capability] << 10

    def allocate(self, nbytes, every_stream=False):
        memory = Memory(nbytes, self.last_blocks is not None)
        self._memories.append(weakref.ref(memory))
        return memory

    def write(self, memory, array):
        memory.bytes[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def read(self, memory, array):
        array.reshape(-1).view(np.uint8)[:] = memory.bytes

    def compile(self, form) -> Any:
        return Code(form, self.capability)

    def start(self, form, grid, shared, stream, slots):
        code = self._codes.get(form)
        if code is None:
            runtime()
            try:
                code = self._codes[form] = self.compile(form)
            except Unsupported as error:
                UNSUPPORTED.add(f"{form.kernel.name} {form.dtype.name}: {error}")
                raise
        if not form.kernel.runs_on(self.capability):
            raise EmulatedFault(f"kernel {form.kernel.name} does not run on compute capability {self.capability}")
        self.launched.add((form.kernel.name, form.dtype.name))
        LAUNCHED.add((form.kernel.name, form.dtype.name))
        self.run(code, grid, form.kernel.threads, shared, slots, form.dtype.itemsize)

    def run(self, code, grid, threads, shared, slots, itemsize=4):
        library = runtime()
        if any(n > most for n, most in zip(grid, _MOST_BLOCKS, strict=True)):
            raise EmulatedFault(f"a grid of {grid} blocks, at most {_MOST_BLOCKS}")
        if shared + code.shared_bytes > self.most_shared:
            raise EmulatedFault(f"{shared + code.shared_bytes} bytes of shared memory, at most {self.most_shared}")
        memories = [memory for reference in self._memories if (memory := reference()) is not None]
        self._memories = [weakref.ref(memory) for memory in memories]
        buffer = (ctypes.c_char * len(slots)).from_buffer(slots)
        given = [(m.pointer, m.nbytes, _ARRAY) for m in memories]
        given += [(ctypes.addressof(buffer), len(slots), _CONSTANT)]
        library.simt_no_ranges()
        for address, size, kind in given + code.ranges:
            library.simt_range(ctypes.c_void_p(address), ctypes.c_size_t(size), kind)
        outcome = library.simt_launch(
            ctypes.c_void_p(code.entry), buffer, ctypes.byref(_Grid(*grid)), ctypes.byref(_Grid(threads, 1, 1)),
            ctypes.c_size_t(shared), SCHEDULES[self.schedule], int(self.eager_copies), min(itemsize, 4),
            ctypes.byref(_Grid(*(self.last_blocks or _MOST_BLOCKS))),
        )  # fmt: skip
        if outcome != 0:
            raise EmulatedFault(library.simt_message().decode())
        for memory in memories:
            memory.check()

    def synchronize(self):
        pass
