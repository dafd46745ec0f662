"""From three loops to the kernels of this package, a step at a time, each step timed on one thread. `make ladder`.

docs/cpu-kernels.md explains the steps; this module has their code where no public function runs them, and fills the
page's tables. Every step's result is compared with the reference before it is timed.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np

import tilewise
from tilewise.kernels.cpu.jit import FASTMATH
from tilewise.kernels.cpu.row_kernel import row_product
from tilewise.kernels.cpu.simd import MR, NV, address, lane_count, lanes

from . import cases, engines, report, table, timing
from .layers import Case, Matmul
from .peak import peaks

RESULTS = report.RESULTS / "ladder"
PAGE = Path("docs/cpu-kernels.md")
HEADER = ("step", "time", "rate", "of peak")
NR = NV * lane_count(4)
# Whole register tiles in every direction, near 900: three matrices of 3 MB, more than an L2.
SIZE = math.lcm(MR, NR) * round(900 / math.lcm(MR, NR))
BLOCK_K, BLOCK_J = 32, 256  # 32 x 256 numbers of B are 32 KB: they stay in L1
CONVOLUTION = cases.ALL["conv2d resnet50.conv2.3x3"]

# The steps of the ladder are compiled for the process alone (the cache's stamp does not cover this file), with the
# same flags as the kernels.
_step: Any = numba.njit(fastmath=set(FASTMATH), nogil=True, error_model="numpy")


@_step
def three_loops(a, b, c):
    """The definition: each result is a dot product. B is read down its columns, a cache line for every number."""
    for i in range(c.shape[0]):
        for j in range(c.shape[1]):
            total = a.dtype.type(0)
            for k in range(a.shape[1]):
                total += a[i, k] * b[k, j]
            c[i, j] = total


@_step
def rows_in_order(a, b, c):
    """The two inner loops exchanged: rows of B and C are read in order, so the compiler makes vectors of them."""
    c[:] = 0
    for i in range(c.shape[0]):
        for k in range(a.shape[1]):
            for j in range(c.shape[1]):
                c[i, j] += a[i, k] * b[k, j]


@_step
def blocked(a, b, c):
    """The same on blocks of B that stay in L1 while every row of A passes by."""
    c[:] = 0
    for first_j in range(0, c.shape[1], BLOCK_J):
        last_j = min(c.shape[1], first_j + BLOCK_J)
        for first_k in range(0, a.shape[1], BLOCK_K):
            for i in range(c.shape[0]):
                sums = c[i, first_j:last_j]
                for k in range(first_k, min(a.shape[1], first_k + BLOCK_K)):
                    factor, row = a[i, k], b[k, first_j:last_j]
                    for j in range(sums.size):
                        sums[j] += factor * row[j]


@_step
def register_tile(a, b, c):
    """MR rows x NV vectors of C in registers over the whole sum; A and B are read where they lie."""
    depth, columns = b.shape
    starts, origin = np.arange(MR) * depth, np.zeros(1, np.int64)
    for j in range(0, columns, NV * lanes(c)):  # pyright: ignore[reportCallIssue]
        for i in range(0, c.shape[0], MR):
            row_product(
                MR, NV, address(a, i * depth), address(starts, 0), 1, address(origin, 0), 1, depth,
                address(b, j), columns, address(c, i * columns + j), columns, 0, MR,
            )  # fmt: skip


@_step
def definition(x, weight, bias, y):
    """The convolution's definition for 3x3, stride 1 and padding 1, in NCHW."""
    images, outputs, height, width = y.shape
    for n in range(images):
        for o in range(outputs):
            for i in range(height):
                for j in range(width):
                    total = bias[o]
                    for c in range(x.shape[1]):
                        for r in range(3):
                            for s in range(3):
                                row, column = i + r - 1, j + s - 1
                                if 0 <= row < height and 0 <= column < width:
                                    total += x[n, c, row, column] * weight[o, c, r, s]
                    y[n, o, i, j] = total


def matmul_steps() -> tuple[Case, dict[str, Callable]]:
    case = Matmul("matmul", f"square.{SIZE}", 1, SIZE, SIZE, SIZE)
    (a, b), _ = case.arguments(np.random.default_rng(timing.SEED), np.float32)
    steps = {
        "three loops: i, j, k": three_loops,
        "loop order: i, k, j": rows_in_order,
        f"blocked: {BLOCK_K} x {BLOCK_J} of B": blocked,
        f"register tile {MR} x {NV} vectors, nothing packed": register_tile,
    }
    calls = {name: partial(_into, step, (SIZE, SIZE), a, b) for name, step in steps.items()}
    return case, calls | {
        "and packed: `matmul`": partial(tilewise.matmul, a, b),
        "NumPy's BLAS": partial(np.matmul, a, b),
    }


def _into(step: Callable, shape: tuple[int, ...], *operands: np.ndarray) -> np.ndarray:
    result = np.empty(shape, np.float32)
    step(*operands, result)
    return result


def convolution_steps(case: Case = CONVOLUTION) -> tuple[Case, dict[str, Callable]]:
    args, options = case.arguments(np.random.default_rng(timing.SEED), np.float32)
    x, weight, bias = args
    assert options == {"stride": 1, "padding": 1, "groups": 1}, "what `definition` computes"
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1))

    def ours(algorithm: str):
        return partial(tilewise.conv2d, *args, **options, algorithm=algorithm)

    def ours_last(algorithm: str):
        call = partial(tilewise.conv2d, last, weight, bias, **options, layout="NHWC", algorithm=algorithm)
        return lambda: call().transpose(0, 3, 1, 2)

    calls = {
        "definition: seven loops": partial(_into, definition, (len(x), len(weight), *x.shape[2:]), *args),
        'row by row: `algorithm="direct"`': ours("direct"),
        'implicit product on planes: `"gemm"`': ours("gemm"),
        'implicit product in NHWC: `"gemm"`': ours_last("gemm"),
        'Winograd: `"winograd"`': ours("winograd"),
        'Winograd in NHWC: `"winograd"`': ours_last("winograd"),
    }
    peers = engines.build(case, threads=1)
    named = {engines.TORCH: "PyTorch, NCHW", engines.TORCH_LAST: "PyTorch, channels_last"}
    return case, calls | {named[name]: call for name, call in peers.items() if name in named}


def measured(case: Case, calls: dict[str, Callable], seconds: float) -> list[dict]:
    """Best time of each step, after its result was compared with the reference's."""
    reference = timing.checked(case, "float32")[1]()
    for call in calls.values():
        timing.check(case, "float32", np.asarray(call()), reference)
    times = timing.measure(calls, seconds)
    return [{"step": name, "seconds": times[name].best, "rate": case.flops / times[name].best / 1e9} for name in calls]


def rows(steps: list[dict], peak: float) -> list[tuple[str, ...]]:
    return [
        (s["step"], table.duration(s["seconds"]), f"{s['rate']:.3g} GFLOP/s", f"{s['rate'] / peak:.0%}") for s in steps
    ]


def fill(page: str, results: list[dict]) -> str:
    """The page with one table for each result between the markers of each ladder."""
    for name in ("ladder-matmul", "ladder-conv2d"):
        parts = []
        for result in results:
            ladder, peak = result["ladders"][name], result["peak"]
            parts += [
                f"{report.title(result)}; one thread, float32, {ladder['shape']}; measured peak of a core "
                f"{peak:.0f} GFLOP/s; best of several calls; filled in by `{result['command']}`.",
                table.markdown(rows(ladder["steps"], peak), HEADER, left=1),
            ]
        page = report.between(page, f"<!-- {name}:begin -->", f"<!-- {name}:end -->", "\n\n".join(parts), "page")
    return page


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tilewise.benchmarks.ladder", description=__doc__)
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help=f"default: {PAGE}, where it exists")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help=f"default: {RESULTS}")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each step")
    args = parser.parse_args(argv)
    result = _measure_all(args.seconds)
    for name, ladder in result["ladders"].items():
        table.show(rows(ladder["steps"], result["peak"]), f"{name}: {ladder['shape']}", HEADER, left=1)
    path = report.result_file(result, args.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"saved as {path}")
    if args.page.exists():
        results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(args.results.glob("*.json"))]
        args.page.write_text(fill(args.page.read_text(encoding="utf-8"), results), encoding="utf-8")
        print(f"{args.page}: tables filled")
    return 0


def _measure_all(seconds: float) -> dict:
    from .targets import one_blas_thread, torch_on_one_thread

    torch = torch_on_one_thread()
    with tilewise.using(threads=1), one_blas_thread():
        of = report.machine()
        if torch:
            of["versions"]["torch"] = torch.__version__
        ladders = {}
        for name, (case, calls) in {"ladder-matmul": matmul_steps(), "ladder-conv2d": convolution_steps()}.items():
            ladders[name] = {"shape": case.shape, "flops": case.flops, "steps": measured(case, calls, seconds)}
        return of | {"command": "make ladder", "peak": peaks(1)["GFLOP/s"], "ladders": ladders}


if __name__ == "__main__":
    sys.exit(main())
