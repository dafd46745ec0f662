"""A GPU that is no GPU: an engine for tilewise's kernels that executes them on the CPU, thread by thread.

`Emulator` stands where driver.Driver stands on a machine with a GPU. Its memory is the host's, every array between two
fences that are checked after each launch. A kernel is compiled by numba-cuda to LLVM IR, translated (translate.py),
compiled for this processor, and run by the scheduler in runtime.cpp, in the schedule that the test asks for.
"""

import ctypes
import hashlib
import shutil
import subprocess
import sysconfig
import weakref
from functools import lru_cache
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np

from simt.translate import translate

FOLDER = Path(__file__).parent
SCHEDULES = {"forward": 0, "reverse": 1, "shuffled": 2, "warp by warp": 3, "warps reversed": 4}
TESTED_NUMBA_CUDA = "0.30"
FENCE = 256  # bytes before and after each array
_PATTERN = 0xFF


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
    sources = [FOLDER / name for name in ("runtime.cpp", "ptx.cpp")]
    stamp = hashlib.sha256(b"".join(p.read_bytes() for p in [*sources, FOLDER / "runtime.h"])).hexdigest()[:16]
    folder = FOLDER.parent.parent / ".cache" / "simt"
    library = folder / f"simt-{stamp}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with_name = library.with_suffix(f".{id(sources):x}.tmp")
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
    """A kernel's form, compiled for this processor."""

    def __init__(self, form, capability):
        from numba.cuda.compiler import _compile_pyfunc_with_fixup

        library, _ = _compile_pyfunc_with_fixup(
            form.kernel.function, form.signature, device=False, cc=capability, abi="numba"
        )
        parts = [llvm.parse_assembly(translate(part, "").text) for part in library.llvm_strs]
        module = parts[0]
        for part in parts[1:]:
            module.link_in(part)
        self._wrap(module, library._entry_name)
        machine = _target()
        passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
        passes.getModulePassManager().run(module, passes)
        shared = [(g.name, g) for g in module.global_variables if "addrspace(3)" in str(g).split("=", 1)[1][:60]]
        self.engine = llvm.create_mcjit_compiler(module, machine)
        self.engine.finalize_object()
        self.entry = self.engine.get_function_address("simt_entry")
        layout = self.engine.target_data
        self.shared = [
            (
                self.engine.get_global_value_address(name),
                None if name == "dynamic_shared_memory" else layout.get_abi_size(value.global_value_type),
            )
            for name, value in shared
        ]
        self.engine.detach()  # it lives as long as the process: at exit, LLVM may be gone before it

    @staticmethod
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
    """Bytes between two fences, filled with a pattern that is NaN in every float."""

    def __init__(self, nbytes):
        self.nbytes = nbytes
        whole = np.full(nbytes + 2 * FENCE + 64, _PATTERN, np.uint8)
        skip = -(whole.ctypes.data + FENCE) % FENCE
        self.whole, self.first = whole, skip + FENCE
        self.pointer = whole.ctypes.data + self.first

    @property
    def bytes(self):
        return self.whole[self.first : self.first + self.nbytes]

    def check(self):
        before, after = self.whole[: self.first], self.whole[self.first + self.nbytes :]
        if (before != _PATTERN).any() or (after != _PATTERN).any():
            raise EmulatedFault("a kernel wrote outside of an array")


class Emulator:
    """An engine: see driver.Driver, whose interface it has.

    schedule: a key of SCHEDULES. eager_copies: whether cp.async copies at once, or when it is waited for.
    launched: (kernel's name, dtype's name) of everything that was launched.
    """

    name = "emulated GPU"

    def __init__(self, capability=(9, 0), schedule="forward", eager_copies=False):
        self.capability, self.multiprocessors = capability, 4
        self.schedule, self.eager_copies = schedule, eager_copies
        self.launched: set[tuple[str, str]] = set()
        self._codes: dict = {}
        self._memories: list = []

    def allocate(self, nbytes):
        memory = Memory(nbytes)
        self._memories.append(weakref.ref(memory))
        return memory

    def write(self, memory, array):
        memory.bytes[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def read(self, memory, array):
        array.reshape(-1).view(np.uint8)[:] = memory.bytes

    def start(self, form, grid, shared, stream, slots):
        code = self._codes.get(form)
        if code is None:
            runtime()
            code = self._codes[form] = Code(form, self.capability)
        self.launched.add((form.kernel.name, form.dtype.name))
        self.run(code, grid, form.kernel.threads, shared, slots)

    def run(self, code, grid, threads, shared, slots):
        library = runtime()
        library.simt_no_static_shared()
        for address, size in code.shared:
            library.simt_static_shared(ctypes.c_void_p(address), ctypes.c_size_t(shared if size is None else size))
        buffer = (ctypes.c_char * len(slots)).from_buffer(slots)
        outcome = library.simt_launch(
            ctypes.c_void_p(code.entry), buffer, ctypes.byref(_Grid(*grid)), ctypes.byref(_Grid(threads, 1, 1)),
            ctypes.c_size_t(shared), SCHEDULES[self.schedule], int(self.eager_copies),
        )  # fmt: skip
        if outcome != 0:
            raise EmulatedFault(library.simt_message().decode())
        self._memories = [reference for reference in self._memories if reference() is not None]
        for reference in self._memories:
            memory = reference()
            if memory is not None:
                memory.check()

    def synchronize(self):
        pass
