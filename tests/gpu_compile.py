"""Every GPU kernel compiled for every architecture it is for, without a GPU: `make gpu-compile` prints the table.

numba-cuda makes PTX and NVIDIA's assembler machine code of it; of CUDA C++, NVRTC makes it; nvdisasm reads it. A kernel
fails if registers spill to memory, if it has a stack frame (a local array that is indexed by run-time values), or if an
instruction is missing that it promises.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import gpu_lower
import numpy as np


@dataclass(frozen=True)
class Architecture:
    """What a multiprocessor has: threads, blocks and bytes of shared memory. All have 65,536 registers."""

    capability: tuple[int, int]
    threads: int
    blocks: int
    shared: int
    feature: str = ""  # "a": with the instructions that later devices lack

    @property
    def name(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}{self.feature}"


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"
ARCHITECTURES = (
    Architecture((7, 5), 1024, 16, 64 << 10),
    Architecture((8, 0), 2048, 32, 164 << 10),
    Architecture((8, 6), 1536, 16, 100 << 10),
    Architecture((8, 9), 1536, 24, 100 << 10),
    Architecture((9, 0), 2048, 32, 228 << 10),
    Architecture((9, 0), 2048, 32, 228 << 10, "a"),
    Architecture((10, 0), 2048, 32, 228 << 10),
    Architecture((10, 0), 2048, 32, 228 << 10, "a"),
    Architecture((12, 0), 1536, 24, 100 << 10),
)
BY_NAME = {a.name: a for a in ARCHITECTURES}
REGISTERS = 65_536
BACKENDS = ("cuda", "cupy")
CACHE = Path(__file__).parent.parent / ".cache" / "gpu-compile"
_WARP, _REGISTER_UNIT = 32, 256  # a warp gets registers in units of 256
_RESERVED = 1 << 10  # bytes of shared memory of each block that the system takes, since sm_80


@dataclass(frozen=True)
class Report:
    """A kernel's form on an architecture. blocks: how many fit a multiprocessor, without dynamic shared memory."""

    kernel: str
    dtype: str
    architecture: str
    threads: int
    registers: int = 0
    shared: int = 0
    blocks: int = 0
    promised: dict[str, int] = field(default_factory=dict)
    faults: tuple[str, ...] = ()


# ---- tools


@lru_cache(maxsize=8)
def tool(name: str) -> str | None:
    """NVIDIA's ptxas or nvdisasm: from the wheels, else from a CUDA toolkit."""
    spec = find_spec("nvidia")
    folders = [Path(f) / "cu13" / "bin" for f in (spec.submodule_search_locations or [] if spec else [])]
    folders += [Path(os.environ[v]) / "bin" for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ]
    folders.append(Path("/usr/local/cuda/bin"))
    found = [str(folder / name) for folder in folders if os.access(folder / name, os.X_OK)]
    return found[0] if found else shutil.which(name)


def why_not() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    if find_spec("numba_cuda") is None:
        return "numba-cuda is not installed (extra: gpu)"
    if find_spec("cupy") is None:
        return "CuPy, whose binding of NVRTC is used, is not installed (extra: gpu)"
    missing = [name for name in ("ptxas", "nvdisasm") if tool(name) is None]
    return f"{' and '.join(missing)} not found (extra: gpu)" if missing else None


def load_kernels(backend: str = "") -> list:
    """Every kernel of kernels/cuda and of kernels/cupy, or of one of them."""
    found = []
    for name in [backend] if backend else BACKENDS:
        package = import_module(f"tilewise.kernels.{name}")
        for folder in package.__path__:
            for file in sorted(Path(folder).glob("*.py")):
                if file.stem not in ("__init__", "driver", "ptx_cache"):
                    import_module(f"tilewise.kernels.{name}.{file.stem}")
        found += import_module(f"tilewise.kernels.{name}.launch").KERNELS
    return found


def backend_of(kernel) -> str:
    return type(kernel).__module__.split(".")[2]


# ---- one form


def assemble(kernel, dtype: np.dtype, architecture: Architecture) -> tuple[str, str]:
    """What ptxas says about a form, and its machine code as text."""
    form = kernel.form(dtype)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        if backend_of(kernel) == "cupy":
            from tilewise.kernels.cupy.module import compiled

            code, said = compiled(kernel.source, form.expression, architecture.name, ("--ptxas-options=-v",))
            binary.write_bytes(code.binary)
        else:
            said = _run_ptxas(gpu_lower.ptx(form, architecture.capability), architecture, binary)
        code = subprocess.run([tool("nvdisasm"), "-c", str(binary)], capture_output=True, text=True, check=True)
    return said, code.stdout


def _run_ptxas(ptx: str, architecture: Architecture, binary: Path) -> str:
    source = binary.with_suffix(".ptx")
    source.write_text(ptx, encoding="utf-8")
    command = [tool("ptxas"), "-v", f"-arch={architecture.name}", "-o", str(binary), str(source)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode:
        raise RuntimeError(said.stderr.strip() or said.stdout.strip())
    return said.stderr


def instructions(code: str) -> Counter:
    """Instruction -> how often it is there: "LDG.E.128"."""
    return Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code, re.M))


def count_promised(promise: str, found: Counter) -> int:
    """How many instructions keep a promise: "LDG.128" is kept by LDG.E.128 and LDG.E.128.CONSTANT."""
    name, *parts = promise.split(".")

    def keeps(instruction: str) -> bool:
        first, *rest = instruction.split(".")
        return first == name and set(parts) <= set(rest)

    return sum(number for instruction, number in found.items() if keeps(instruction))


def resident_blocks(architecture: Architecture, threads: int, registers: int, shared: int) -> int:
    """How many blocks fit a multiprocessor at a time."""
    warps = -(-threads // _WARP)
    of_a_warp = -(-registers * _WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    limits = [architecture.blocks, architecture.threads // (warps * _WARP), REGISTERS // (max(of_a_warp, 1) * warps)]
    taken = shared + (_RESERVED if architecture.capability >= (8, 0) else 0)
    return min(*limits, architecture.shared // taken) if taken else min(limits)


def promised_blocks(kernel, architecture: Architecture, shared: int, dtype: np.dtype | None = None) -> int:
    """How many blocks shall fit a multiprocessor. Tiles are sized for the shared memory of sm_90; where there is less,
    it may be the limit."""
    shall = kernel.bounds(architecture.capability, dtype)[1]
    if architecture.shared >= BY_NAME["sm_90"].shared or not shared:
        return shall
    return min(shall, max(1, resident_blocks(architecture, 32, 0, shared)))


def inspect(kernel, dtype: np.dtype, architecture: Architecture) -> Report:
    about = kernel.name, dtype.name, architecture.name, kernel.threads
    try:
        said, code = assemble(kernel, dtype, architecture)
    except Exception as error:  # whatever Numba or ptxas raises belongs into the table
        return Report(*about, faults=(f"does not compile: {type(error).__name__}: {str(error)[-2000:]}",))

    def number(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, said)))

    registers = number(r"Used (\d+) registers")
    shared = number(r"(\d+) bytes smem") + getattr(kernel, "shared", 0)
    faults = []
    if stack := number(r"(\d+) bytes stack frame"):
        faults.append(f"a stack frame of {stack} bytes")
    if spills := number(r"(\d+) bytes spill (?:stores|loads)"):
        faults.append(f"registers spill, {spills} bytes")
    found = instructions(code)
    if not found:
        faults.append("nvdisasm printed no instructions")
    promised = {p: count_promised(p, found) for p in kernel.promises(dtype)}
    faults += [f"no {p}, which it promises" for p, count in promised.items() if not count]
    blocks = resident_blocks(architecture, kernel.threads, registers, shared)
    if blocks < (shall := promised_blocks(kernel, architecture, shared, dtype)):
        faults.append(f"{blocks} blocks fit a multiprocessor, {shall} shall")
    return Report(*about, registers, shared, blocks, promised, tuple(faults))


# ---- all of them


def jobs(kernels: Iterable, architectures: Iterable[Architecture]) -> Iterator[tuple]:
    """(kernel, dtype, architectures) of everything to compile; numba.cuda's for what its driver.py compiles for."""
    from tilewise.kernels.cuda.driver import TARGETS

    for kernel in kernels:
        wanted = [
            a for a in architectures
            if kernel.runs_on(a.capability)
            and (getattr(kernel, "target", None) or a.name) == a.name
            and (backend_of(kernel) == "cupy" or (a.capability in TARGETS and not a.feature))
        ]  # fmt: skip
        for dtype in kernel.dtypes if wanted else ():
            yield kernel, dtype, wanted


@lru_cache(maxsize=1)
def _tools() -> str:
    """A hash of what all reports depend on: this file, the assembler."""
    return hashlib.sha256(Path(__file__).read_bytes() + Path(str(tool("ptxas"))).read_bytes()).hexdigest()


def stamp(kernel, dtype: np.dtype, architecture: Architecture) -> str:
    """A hash of what a form's report depends on; an edit elsewhere leaves it."""
    if backend_of(kernel) == "cupy":
        from cupy.cuda import nvrtc  # pyright: ignore[reportMissingImports]

        from tilewise.kernels.cupy import module

        about = kernel.form(dtype).expression, kernel.bounds(architecture.capability, dtype), kernel.shared
        compiler = nvrtc.getVersion(), Path(str(module.__file__)).read_bytes()
        parts = repr((about, kernel.promises(dtype), compiler, module.included(kernel.source, module.sources())))
    else:
        parts = gpu_lower.stamp(kernel.function.__module__)
    return hashlib.sha256(f"{parts} {_tools()}".encode()).hexdigest()[:16]


def _in_process(job: tuple[str, str, tuple[str, ...]]) -> list[Report]:
    name, dtype, architectures = job
    return [_kept(name, dtype, BY_NAME[a]) for a in architectures]


def _kept(name: str, dtype: str, architecture: Architecture) -> Report:
    """The report of an earlier run where nothing has changed since, else a new one."""
    (kernel,) = [k for k in load_kernels() if k.name == name]
    (form_dtype,) = [d for d in kernel.dtypes if d.name == dtype]
    form_name = re.sub(r"\W+", "_", f"{name} {dtype} {architecture.name}")
    file = CACHE / f"{form_name}-{stamp(kernel, form_dtype, architecture)}.json"
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return Report(**kept | {"faults": tuple(kept["faults"])})
    except (OSError, ValueError, TypeError):
        pass
    report = inspect(kernel, form_dtype, architecture)
    for old in CACHE.glob(f"{form_name}-*"):
        old.unlink(missing_ok=True)
    partial_file = file.with_suffix(f".{os.getpid()}")
    CACHE.mkdir(parents=True, exist_ok=True)
    partial_file.write_text(json.dumps(asdict(report)), encoding="utf-8")
    partial_file.replace(file)
    return report


def compile_all(
    architectures: Iterable[Architecture], only: str = "", part: tuple[int, int] = (1, 1), processes: int | None = None
) -> list[Report]:
    """Reports on every kernel whose name contains `only`, compiled in several processes.

    part: (i, n) for every n-th form, from the i-th on.
    """
    chosen = [k for k in load_kernels() if only in k.name]
    work = [(k.name, d.name, tuple(a.name for a in some)) for k, d, some in jobs(chosen, list(architectures))]
    work = work[part[0] - 1 :: part[1]]
    with ProcessPoolExecutor(processes or min(os.cpu_count() or 1, 8), get_context("spawn")) as pool:
        return [report for some in pool.map(_in_process, work) for report in some]


def faults(reports: Iterable[Report]) -> list[str]:
    return [f"{r.kernel} {r.dtype} {r.architecture}: {fault}" for r in reports for fault in r.faults]


def rows(reports: list[Report], architectures: Iterable[Architecture]) -> Iterator[tuple[str, ...]]:
    """A row for each kernel and dtype, a cell for each architecture."""
    by_form: dict[tuple[str, str], dict[str, Report]] = {}
    for report in reports:
        by_form.setdefault((report.kernel, report.dtype), {})[report.architecture] = report
    for (kernel, dtype), by_architecture in by_form.items():
        last = list(by_architecture.values())[-1]
        cells = [_cell(by_architecture.get(a.name), a) for a in architectures]
        promised = " ".join(f"{count} {name}" for name, count in last.promised.items())
        yield kernel, dtype, str(last.threads), str(last.shared), *cells, promised


def _cell(report: Report | None, architecture: Architecture) -> str:
    if report is None:
        return ""
    if report.faults:
        return "FAILS"
    occupied = report.blocks * -(-report.threads // _WARP) * _WARP / architecture.threads
    return f"{report.registers} r {report.blocks} b {occupied:.0%}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu_compile", description=__doc__)
    parser.add_argument("--only", default="", help="a part of the kernel's name")
    parser.add_argument("--part", default="1/1", help="of the forms: 2/5 is every fifth, from the second on")
    parser.add_argument("--arch", nargs="+", choices=list(BY_NAME), default=list(BY_NAME))
    args = parser.parse_args(argv)
    if reason := why_not():
        print(f"no GPU kernel was compiled: {reason}", file=sys.stderr)
        return 2
    from tilewise.benchmarks import table

    architectures = [BY_NAME[name] for name in args.arch]
    part, parts = map(int, args.part.split("/"))
    reports = compile_all(architectures, args.only, (part, parts))
    header = ("kernel", "dtype", "threads", "shared", *args.arch, f"instructions of {args.arch[-1]}")
    title = (
        "registers (r) of a thread, blocks (b) that fit a multiprocessor, the share of its threads that this is\n"
        "shared: bytes of shared memory (of numba.cuda's the static one: more, at the launch, can make it fewer blocks)"
    )
    table.show(list(rows(reports, architectures)), title, header, left=2)
    found = faults(reports)
    print("\n".join(found) or f"{len(reports)} compilations, no spill, no stack frame, no broken promise")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
