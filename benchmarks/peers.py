"""Every kernel beside PyTorch (both layouts), ONNX Runtime and NumPy's BLAS, in one process. `make bench-peers`.

Per case: every engine's best time, our rate, its share of this machine's measured peak, and

    ratio = time of the fastest peer in whatever layout it likes best / our time in NCHW        (more is better)

then for each family the geometric mean of the ratios and the worst. Results are compared before anything is timed;
engines take turns in blocks with a pause between (timing.py). "out=" is ours in NCHW with the result's array given; the
ratio is without. With --prepared, forward convolutions also with weights
packed beforehand (`prepare_conv2d`), as ONNX Runtime's are.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

import tilewise

from . import cases, engines, report, table
from .layers import Case, Matmul
from .peak import peaks
from .timing import check, measure

BATCHES = (1, 8, 64)
# The whole case list takes its time; what would not fit is named, not hidden.
MOST_BYTES, MOST_FLOPS = 2 << 30, 100e9
PREPARED_HEADER = ("prepared", "NHWC", "ratio", "NHWC")
HEADER = (
    "op, layer, shape",
    "ours",
    "out=",
    "NHWC",
    "torch",
    "ch.last",
    "ORT",
    "NumPy",
    "rate",
    "of peak",
    "ratio",
    "NHWC",
)
WIDTHS = (76, 8, 8, 8, 8, 8, 8, 8, 14, 8, 6, 6)
SUMMARY_HEADER = ("family", "cases", "geometric mean", "worst", "which", "NHWC mean", "worst")
PREPARED_COLUMNS = (engines.OURS_PREPARED, engines.OURS_LAST_PREPARED)
COLUMNS = (
    engines.OURS, engines.OURS_OUT, engines.OURS_LAST, engines.TORCH, engines.TORCH_LAST, engines.ONNX, engines.NUMPY,
)  # fmt: skip
FLOPS, BYTES = "GFLOP/s", "GB/s"


@dataclass(frozen=True)
class Result:
    """Best seconds of each engine for one case."""

    case: Case
    threads: int
    seconds: dict[str, float]

    @property
    def peer(self) -> float:
        """The fastest engine that is not ours."""
        return min(t for name, t in self.seconds.items() if not name.startswith(engines.OURS))

    @property
    def ratio(self) -> float:
        return self.peer / self.seconds[engines.OURS]

    @property
    def ratio_last(self) -> float | None:
        """The same for our NHWC."""
        return self.peer / self.seconds[engines.OURS_LAST] if engines.OURS_LAST in self.seconds else None


def family(case: Case) -> str:
    """The rows of the goal's table."""
    if case.family == "batchnorm":
        return "batch norm " + ("backward" if case.is_backward else "training" if case.training else "evaluation")  # pyright: ignore
    if case.family == "gemm":
        return "matmul"
    return f"{case.family} {'backward' if case.is_backward else 'forward'}"


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    chosen = list(_chosen(args))
    if not chosen:
        print("no case matches", file=sys.stderr)
        return 2
    results: list[Result] = []
    for threads in args.threads:
        with pinned(threads):
            peak = peaks(threads)
            print(f"\n{_threads(threads)}: {peak[FLOPS]:.0f} GFLOP/s, {peak[BYTES]:.1f} GB/s", flush=True)
            print(_line(HEADER + PREPARED_HEADER * args.prepared), flush=True)
            for case in chosen:
                result = _measured(case, threads, args.seconds, args.prepared)
                if result:
                    results.append(result)
                    print(_line(_row(result, peak) + _prepared_cells(result)), flush=True)
    for threads in args.threads:
        rows = list(_summary([r for r in results if r.threads == threads]))
        table.show(rows, f"\nby family, {_threads(threads)}", SUMMARY_HEADER, left=1)
    if args.json:
        _save(results, args.json)
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tilewise.benchmarks.peers", description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--only", default="", help="a regular expression that the case's name must contain")
    parser.add_argument("--seconds", type=float, default=0.15, help="for each engine and case")
    parser.add_argument("--prepared", action="store_true", help="forward convolutions also with packed weights")
    parser.add_argument("--json", type=Path, help="write all times to this file")
    args = parser.parse_args(argv)
    if args.json and (args.json.is_dir() or not args.json.resolve().parent.is_dir()):  # now, not after all the timing
        parser.error(f"--json: {args.json} is a folder, or in none")
    return args


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _chosen(args: argparse.Namespace) -> Iterator[Case]:
    seen = set()
    for case in cases.ALL.values():
        for batch in args.batch:
            one = case if isinstance(case, Matmul) else case.with_batch(batch)
            if one in seen or not re.search(args.only, f"{family(one)} {one.key} {one.shape}"):
                continue
            seen.add(one)
            if one.bytes(4) > MOST_BYTES or one.flops > MOST_FLOPS:
                print(f"not measured, too large: {one.key} {one.shape}", file=sys.stderr)
                continue
            yield one


@contextmanager
def pinned(threads: int):
    """Every engine on this many threads."""
    from threadpoolctl import threadpool_limits

    try:
        import torch

        torch.set_num_threads(threads)
    except ImportError:
        print("PyTorch is not installed (extra: peers)", file=sys.stderr)
    with tilewise.using(threads=threads), threadpool_limits(threads, user_api="blas"):
        yield


def _measured(case: Case, threads: int, seconds: float, prepared: bool = False) -> Result | None:
    calls = engines.build(case, threads) | (engines.prepared(case) if prepared else {})
    ours = engines.as_arrays(engines.OURS, case, calls[engines.OURS]())
    for name, call in calls.items():
        if case.draws and not name.startswith(engines.OURS):
            call()
            continue
        check(case, "float32", engines.as_arrays(name, case, call()), ours)
    if len(calls) == 1:
        return None
    return Result(case, threads, {name: t.best for name, t in measure(calls, seconds).items()})


def _row(result: Result, peak: dict[str, float]) -> tuple[str, ...]:
    case = result.case
    work = case.flops if case.rate_unit == FLOPS else case.bytes(4)
    rate = work / result.seconds[engines.OURS] / 1e9
    last = result.ratio_last
    return (
        f"{case.key} {case.shape}",
        *(_milliseconds(result.seconds.get(name)) for name in COLUMNS),
        f"{rate:.1f} {case.rate_unit}",
        f"{rate / peak[case.rate_unit]:.0%}",
        f"{result.ratio:.2f}",
        f"{last:.2f}" if last else "",
    )


def _prepared_cells(result: Result) -> tuple[str, ...]:
    """The times with packed weights and their ratios; nothing where they were not measured."""
    if engines.OURS_PREPARED not in result.seconds:
        return ()
    seconds = [result.seconds[name] for name in PREPARED_COLUMNS]
    return (*map(_milliseconds, seconds), *(f"{result.peer / s:.2f}" for s in seconds))


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.4g}"


def _line(cells: tuple[str, ...]) -> str:
    first, *others = cells
    widths = (*WIDTHS[1:], *(8 for _ in PREPARED_HEADER))
    return " ".join([first.ljust(WIDTHS[0]), *(c.rjust(w) for c, w in zip(others, widths, strict=False))])


def _summary(results: list[Result]) -> Iterator[tuple[str, ...]]:
    for name in dict.fromkeys(family(r.case) for r in results):
        some = [r for r in results if family(r.case) == name]
        worst = min(some, key=lambda r: r.ratio)
        last = [r.ratio_last for r in some if r.ratio_last]
        yield (
            name, str(len(some)), f"{geometric_mean(r.ratio for r in some):.2f}", f"{worst.ratio:.2f}",
            f"{worst.case.layer} batch {worst.case.batch}",
            f"{geometric_mean(last):.2f}" if last else "", f"{min(last):.2f}" if last else "",
        )  # fmt: skip


def _save(results: list[Result], path: Path) -> None:
    records = [
        {"op": r.case.op, "layer": r.case.layer, "shape": r.case.shape, "threads": r.threads, "ratio": r.ratio}
        | {"seconds": r.seconds}
        for r in results
    ]
    text = json.dumps(report.machine() | {"command": "make bench-peers", "peers": records}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
