"""What a program waits for besides the work: imports, first calls, other libraries' threads, forks. `make latency`.

Each figure comes from processes of its own, which print what they measured as JSON; the goal stands beside it.

- import: `import tilewise` in a fresh interpreter, best and median of some.
- first call: with NumPy, Numba and tilewise's own modules loaded, the time of the call itself: planning, compiling or
  loading the kernels, starting the threads where it has any, and the work. Cold: an empty cache folder, into which it
  also writes; the first compilation makes Numba load its registries, and SciPy where it is installed. Warm: another
  process, which must find every kernel there. CPU time well below wall time means that other programs ran.
- beside BLAS: a program that alternates one of our kernels with np.matmul, against the sum of both alone. The pools of
  both libraries stay; what they cost each other is the figure. OpenBLAS' threads spin for 2**26 cycles or more after a
  product and so share our workers' cores; OPENBLAS_THREAD_TIMEOUT=16 (2**16 cycles) makes them sleep sooner.
- fork: a child of a process that has used a parallel kernel calls one.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from . import first_calls, report, table

RESULTS = report.RESULTS / "latency"
IMPORT_GOAL, COLD_GOAL, WARM_GOAL, BESIDE_GOAL = 0.030, 4.0, 0.2, 1.6
IMPORTS, WARM_STARTS, BESIDE_RUNS = 9, 3, 3
HEADER = ("what", "form", "", "measured", "goal", "")
_IMPORT = "import time; start = time.perf_counter(); import tilewise; print(time.perf_counter() - start)"


@dataclass(frozen=True)
class Figure:
    """One measured number; unit: "s", or "x" for a ratio. note: what else a reader should know."""

    what: str
    form: str
    measured: float
    goal: float | None
    unit: str = "s"
    note: str = ""

    def row(self) -> tuple[str, ...]:
        verdict = "" if self.goal is None else "reached" if self.measured <= self.goal else "MISSED"
        goal = "" if self.goal is None else self._text(self.goal)
        return self.what, self.form, self.note, self._text(self.measured), goal, verdict

    def _text(self, number: float) -> str:
        return table.duration(number) if self.unit == "s" else f"{number:.2f}x"


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    if args.probe:
        print(json.dumps(PROBES[args.probe](*args.arguments)))
        return 0
    figures = []
    for figure in measurements(args.only):
        print("  ".join(figure.row()), file=sys.stderr, flush=True)
        figures.append(figure)
    of = report.machine()
    table.show([f.row() for f in figures], report.title(of), HEADER, left=3)
    print(f"saved in {save(of, figures, args.results)}")
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tilewise.benchmarks.latency", description=__doc__)
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="figures whose name contains this; nothing is saved"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help=f"default: {RESULTS}")
    parser.add_argument("--probe", choices=PROBES, help=argparse.SUPPRESS)  # what the fresh processes run
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def measurements(only: str = "") -> Iterator[Figure]:
    """Each figure as it is measured."""
    if re.search(only, "import tilewise"):
        yield from import_time()
    for name in first_calls.names():
        if re.search(only, f"first call: {name}"):
            yield from first_call(name)
    for name in BESIDE:
        if re.search(only, f"beside BLAS: {name}"):
            yield from beside_blas(name)
    if hasattr(os, "fork") and re.search(only, "fork"):
        yield after_fork()


def save(of: dict, figures: list[Figure], folder: Path) -> Path:
    """Into the device's file; figures in it that were not measured this time stay."""
    path = report.result_file(of, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text(encoding="utf-8"))["figures"] if path.exists() else []
    merged = {(f["what"], f["form"]): f for f in [*before, *map(asdict, figures)]}
    content = of | {"command": "make latency", "figures": list(merged.values())}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def _run(command: list[str], **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def _probe(name: str, *arguments: str, **environment: str) -> dict:
    return json.loads(_run(["-m", "tilewise.benchmarks.latency", "--probe", name, *arguments], **environment))


def import_time() -> Iterator[Figure]:
    times = [float(_run(["-c", _IMPORT])) for _ in range(IMPORTS)]
    yield Figure("import tilewise", f"best of {IMPORTS}", min(times), IMPORT_GOAL)
    yield Figure("import tilewise", f"median of {IMPORTS}", statistics.median(times), IMPORT_GOAL)


def first_call(name: str) -> Iterator[Figure]:
    """Cold, then warm from the cache that the cold call left, in both forms."""
    for form in (first_calls.SERIAL, first_calls.PARALLEL):
        with tempfile.TemporaryDirectory() as folder:
            cold = _probe("first", name, form, NUMBA_CACHE_DIR=folder)
            warm = [_probe("first", name, form, NUMBA_CACHE_DIR=folder) for _ in range(WARM_STARTS)]
        best = min(warm, key=lambda run: run["seconds"])
        missed = sum(run["misses"] for run in warm)
        lost = f"; {missed} kernels were not in the cache" if missed else ""
        for state, run, goal, more in (
            ("cold", cold, COLD_GOAL, ", ".join(cold["kernels"])),
            ("warm", best, WARM_GOAL, ""),
        ):
            note = f"CPU {table.duration(run['cpu'])}{more and '; '}{more}"
            note += lost if state == "warm" else ""
            yield Figure(f"first call: {name}", f"{form} {state}", run["seconds"], goal, note=note)


def _time_first_call(name: str, form: str) -> dict:
    from tilewise.kernels.cpu import jit

    call = first_calls.prepared(name, form)
    begin, cpu = time.perf_counter(), time.process_time()
    call()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    forms = [(k, f, getattr(k, f)) for k in jit.KERNELS for f in ("serial", "parallel") if f in vars(k)]
    used = [(k, f, compiled) for k, f, compiled in forms if compiled.signatures]
    misses = sum(sum(compiled.stats.cache_misses.values()) for _, _, compiled in used)
    return {
        "seconds": seconds,
        "cpu": cpu,
        "kernels": [f"{k.__name__} {f}" for k, f, _ in used],
        "misses": misses,
    }


# Our call beside a product of 256 x 256 matrices (some 0.15 ms): short turns are what suffers.
BESIDE = {"relu": "relu", "max_pool2d": "max_pool2d", "conv2d": "conv2d 3x3 gemm NCHW", "matmul": "matmul"}


def beside_blas(name: str) -> Iterator[Figure]:
    def median(**environment: str) -> tuple[float, dict]:
        runs = [_probe("beside", BESIDE[name], **environment) for _ in range(BESIDE_RUNS)]
        runs.sort(key=lambda run: run["ratio"])
        return runs[len(runs) // 2]["ratio"], runs[len(runs) // 2]

    ratio, run = median()
    alone = f"{run['layer']}; alone {table.duration(run['ours'])} and {table.duration(run['blas'])}"
    yield Figure(f"beside BLAS: {name}", "default", ratio, BESIDE_GOAL, "x", alone)
    ratio, _ = median(OPENBLAS_THREAD_TIMEOUT="16")
    yield Figure(f"beside BLAS: {name}", "OPENBLAS_THREAD_TIMEOUT=16", ratio, None, "x")


def _time_beside_blas(name: str, seconds: str = "0.4") -> dict:
    import numpy as np

    from tilewise.kernels.cpu import threads

    a = np.random.default_rng(0).standard_normal((256, 256), dtype=np.float32)
    ours = first_calls.prepared(name, first_calls.PARALLEL)

    def blas():
        return np.matmul(a, a)

    def pair():
        ours()
        blas()

    one, other, both = (_mean(call, float(seconds)) for call in (ours, blas, pair))
    return {"ours": one, "blas": other, "pair": both, "ratio": both / (one + other), "layer": threads.layer()}


def _mean(call: Callable[[], object], seconds: float) -> float:
    """Wall time a call: everything counts, as it does for a user. A pause first, for pools to fall asleep."""
    call()
    time.sleep(0.2)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        call()
        count += 1
    return (time.perf_counter() - start) / count


def after_fork() -> Figure:
    done = _probe("fork")
    note = f"{done['layer']}; the child's kernels {'may split' if done['may_split'] else 'stay serial'}"
    return Figure("fork: child's kernel", "parallel in the parent", done["seconds"], WARM_GOAL, note=note)


def _call_in_a_forked_child() -> dict:
    import numpy as np

    from tilewise.kernels.cpu import threads

    call = first_calls.prepared("matmul", first_calls.PARALLEL)
    right = np.asarray(call())
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        start = time.perf_counter()
        same = bool(np.array_equal(np.asarray(call()), right))
        answer = {"same": same, "seconds": time.perf_counter() - start, "may_split": threads.may_split()}
        os.write(sending, json.dumps(answer).encode())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"the child ended with {os.waitstatus_to_exitcode(status)}")
    answer = json.loads(os.read(receiving, 1 << 12))
    if not answer["same"]:
        raise RuntimeError("the child's result differs from the parent's")
    return answer | {"layer": threads.layer()}


PROBES: dict[str, Callable[..., dict]] = {
    "first": _time_first_call,
    "beside": _time_beside_blas,
    "fork": _call_in_a_forked_child,
}

if __name__ == "__main__":
    sys.exit(main())
