"""Other dtypes beside float32: every kernel's time in both, in both layouts, by the same algorithm.

float16 is computed in float32, between two conversions, batch norm's in registers: wanted is at most twice float32's
time. float64 moves twice the bytes, and a vector holds half as many elements: wanted is at least 0.45 of float32's
rate. What float32 does by an algorithm that float64 does not use (Winograd) is timed by float64's algorithm in both.
Where a cache holds float32's arrays but not float64's, that is all one sees; --same-bytes compares with float64 on half
as many images.

    python -m tilewise.benchmarks.dtypes --dtype float64 --only "pool|batch norm"
"""

import argparse
import re
import sys
from functools import partial
from statistics import geometric_mean
from unittest import mock

import numpy as np

import tilewise
from tilewise.kernels.cpu import conv_transposed, conv_weight_gradient

from . import cases, engines, table
from .layers import Case, Conv, Matmul
from .peers import MOST_BYTES, MOST_FLOPS, family
from .timing import measure

# dtype -> the largest ratio of its time to float32's
WANTED = {"float16": 2.0, "float64": 1 / 0.45}
SINGLE = np.dtype(np.float32)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tilewise.benchmarks.dtypes", description=__doc__)
    parser.add_argument("--dtype", choices=list(WANTED), default="float16", help="beside float32; default: float16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--only", default="", help="a regular expression that the case's name must contain")
    parser.add_argument("--same-bytes", action="store_true", help="float64 on half the batch, its time counted twice")
    parser.add_argument("--seconds", type=float, default=0.1, help="for each case, layout and dtype")
    args = parser.parse_args(argv)
    name, wanted = args.dtype, WANTED[args.dtype]
    half = ("float32 ms", f"{name} ms", "times", "share")
    header = ("op, layer, shape", *half, *(f"NHWC {cell}" for cell in half))
    rows, ratios = [], {}
    with tilewise.using(threads=args.threads):
        for case in _chosen(args):
            row = [f"{case.key} {case.shape}"]
            halved = args.same_bytes and name == "float64" and case.batch > 1
            again = case.with_batch(case.batch // 2) if halved else case
            for single, other in zip(_calls(case), _calls(again, np.dtype(name)), strict=True):
                a, b = _times(_pinned(case, single, np.dtype(name)), other, args.seconds)
                b *= case.batch / again.batch
                ratios.setdefault(family(case), []).append(b / a)
                missed = "" if b <= wanted * a else " MISSED"
                row += [f"{a * 1e3:.4g}", f"{b * 1e3:.4g}", f"{b / a:.2f}", f"{a / b:.2f}{missed}"]
            rows.append(tuple(row + [""] * (len(header) - len(row))))
    if not rows:
        print("no case matches", file=sys.stderr)
        return 2
    title = f"{name} beside float32, batch {args.batch}, {args.threads} thread(s); share: of float32's rate"
    table.show(rows, f"{title}, wanted {1 / wanted:.2g}", header, left=1)
    summary = [
        (name, f"{1 / geometric_mean(r):.2f}", f"{1 / max(r):.2f}", f"{sum(x > wanted for x in r)} of {len(r)}")
        for name, r in ratios.items()
    ]
    table.show(summary, "by family", ("family", "mean share", "worst", "missed"), left=1)
    return 0


def _chosen(args: argparse.Namespace):
    itemsize = max(4, np.dtype(args.dtype).itemsize)
    for case in cases.ALL.values():
        one = case if isinstance(case, Matmul) else case.with_batch(args.batch)
        fits = one.bytes(itemsize) <= MOST_BYTES and one.flops <= MOST_FLOPS
        if fits and re.search(args.only, f"{family(one)} {one.key} {one.shape}"):
            yield one


def _calls(case: Case, dtype: np.dtype = SINGLE):
    """The call in each layout; the numbers are float32's."""
    for layout in (engines.OURS, engines.OURS_LAST):
        call = engines.ours(case).get(layout)
        if call:
            args = [a.astype(dtype) if _is_float(a) else a for a in call.args]
            yield _pinned(case, partial(call.func, *args, **call.keywords), dtype)


def _pinned(case: Case, call: partial, dtype: np.dtype) -> partial:
    """The call by an algorithm that float64 has too, if that is the dtype."""
    if dtype.itemsize < 8 or not isinstance(case, Conv):
        return call
    if case.is_backward:  # has no such option, but keeps the plan of its first call
        without = partial(mock.patch.object, attribute="why_not_winograd", new=lambda *_: "float64 has none")
        with without(conv_transposed), without(conv_weight_gradient):
            call()
        return call
    args = [a.astype(dtype) for a in call.args]
    return partial(call, algorithm=tilewise.explain(call.func, *args, **call.keywords).algorithm)


def _times(single: partial, other: partial, seconds: float) -> tuple[float, float]:
    other()
    single()
    times = measure({"single": single, "other": other}, seconds)
    return times["single"].best, times["other"].best


def _is_float(value) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == SINGLE


if __name__ == "__main__":
    sys.exit(main())
