"""The figures this project set out to reach, each next to what it is measured against. `make targets` prints them.

Everything but the training of the digits runs on one thread. What needs PyTorch or scikit-learn says so where they are
not installed.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import tilewise

from . import cases, report, table, tiny_calls
from .timing import measure, prepared

HEADER = ("what", "ours", "peer", "peer's", "ours / peer", "wanted", "")
DIGITS = Path("examples/digits.py")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tilewise.benchmarks.targets", description="Print the figures this project set out to reach."
    )
    parser.add_argument("--no-digits", action="store_true", help="leave out the training of the digits")
    args = parser.parse_args(argv)
    torch = torch_on_one_thread()
    with tilewise.using(threads=1), one_blas_thread():
        title = report.title(report.machine()) + (f", torch {torch.__version__}" if torch else "")
        print("measuring on one thread ...", file=sys.stderr, flush=True)
        rows = [*_matmul(), *_conv2d(torch), *_max_pool()]
        table.show(rows, title, HEADER, left=1)
        if torch:
            table.show(list(_call_costs(torch)), "a call on a 1x1x8x8 image", HEADER, left=1)
        else:
            print("PyTorch is not installed (extra: peers): nothing to compare conv2d and the cost of a call with")
    return 0 if args.no_digits else _digits()


def torch_on_one_thread():
    """PyTorch, or None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    return torch


@contextmanager
def one_blas_thread():
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        yield


def _verdict(reached: bool) -> str:
    return "reached" if reached else "MISSED"


def _same(ours, theirs, reduction: int) -> None:
    """Check, then time: the two engines must agree as far as float32 allows."""
    theirs = np.asarray(theirs)
    worst = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    assert worst <= 8 * np.finfo(np.float32).eps * (1 + reduction) ** 0.5, f"results differ by {worst:.3g}"


def _matmul() -> Iterator[tuple[str, ...]]:
    case = cases.ALL["matmul square.1024"]
    (a, b), _ = case.arguments(np.random.default_rng(0), np.float32)
    _same(tilewise.matmul(a, b), a @ b, case.reduction)
    times = measure({"ours": lambda: tilewise.matmul(a, b), "OpenBLAS": lambda: a @ b}, seconds=2)
    yield _rate_row("matmul 1024^3 float32", case.flops, times, 0.8)


def _conv2d(torch) -> Iterator[tuple[str, ...]]:
    case = cases.ALL["conv2d resnet50.conv2.3x3"]
    arguments, options = case.arguments(np.random.default_rng(0), np.float32)
    engines: dict[str, Callable] = {"ours": lambda: tilewise.conv2d(*arguments, **options)}
    if torch:
        x, w, b = tiny_calls.tensors(torch, *arguments)
        last = [t.contiguous(memory_format=torch.channels_last) for t in (x, w)]
        engines["torch NCHW"] = lambda: torch.nn.functional.conv2d(x, w, b, **options)
        engines["torch channels_last"] = lambda: torch.nn.functional.conv2d(*last, b, **options)
        for name in ("torch NCHW", "torch channels_last"):
            _same(engines["ours"](), engines[name](), case.reduction)
    engines["ours"]()
    yield _rate_row("conv2d 8x64x56 -> 64, 3x3", case.flops, measure(engines, seconds=3), 0.8)


def _rate_row(what: str, flops: int, times: dict, wanted: float) -> tuple[str, ...]:
    """Ours against the fastest peer, in GFLOP/s."""
    rates = {name: flops / timing.best / 1e9 for name, timing in times.items()}
    ours = rates.pop("ours")
    if not rates:
        return (what, f"{ours:.0f} GFLOP/s", "not installed", "", "", f">= {wanted}", "")
    peer = max(rates, key=lambda name: rates[name])
    ratio = ours / rates[peer]
    figures = f"{ours:.0f} GFLOP/s", peer, f"{rates[peer]:.0f} GFLOP/s", f"{ratio:.2f}"
    return (what, *figures, f">= {wanted}", _verdict(ratio >= wanted))


def _max_pool() -> Iterator[tuple[str, ...]]:
    call = prepared(cases.ALL["max_pool2d resnet50.pool1"], "float32")
    call()
    best = measure({"ours": call}, seconds=1)["ours"].best
    yield ("max_pool2d 8x64x112, 3x3 s2", f"{best * 1e3:.2f} ms", "", "", "", "< 2 ms", _verdict(best < 2e-3))


def _call_costs(torch) -> Iterator[tuple[str, ...]]:
    for what, ours, theirs in tiny_calls.tiny_calls(torch):
        ours()
        theirs()
        times = measure({"ours": ours, "theirs": theirs}, seconds=0.2)
        mine, other = times["ours"].best * 1e6, times["theirs"].best * 1e6
        verdict = _verdict(mine <= 1.5 * other)
        yield (what, f"{mine:.1f} us", "torch", f"{other:.1f} us", f"{mine / other:.2f}", "<= 1.5", verdict)


def _digits() -> int:
    if not DIGITS.exists():
        print(f"no {DIGITS} here: run this in a checkout to train on the digits as well")
        return 0
    print("\ntraining LeNet-5 on the digits (wanted: at least 98 % within a minute on 2 cores) ...", flush=True)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, str(DIGITS), "--quiet"], check=False)
    print(f"{time.perf_counter() - start:.1f} s with imports, data and compilation or loading of the kernels")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
