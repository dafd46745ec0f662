"""float16 beside float32: every kernel's time in both, in both layouts, and float16 / float32 (wanted: at most 2).

The operands are the same numbers, rounded to float16. `python -m tilewise.benchmarks.half --only REGEX`.
"""

import argparse
import re
import sys
from functools import partial
from statistics import geometric_mean

import numpy as np

import tilewise

from . import cases, engines, table
from .layers import Case, Matmul
from .peers import MOST_BYTES, MOST_FLOPS, family
from .timing import measure

HEADER = ("op, layer, shape", "float32 ms", "float16 ms", "ratio", "NHWC float32", "float16", "ratio")
WANTED = 2.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tilewise.benchmarks.half", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--only", default="", help="a regular expression that the case's name must contain")
    parser.add_argument("--seconds", type=float, default=0.1, help="for each case, layout and dtype")
    args = parser.parse_args(argv)
    rows, ratios = [], []
    with tilewise.using(threads=args.threads):
        for case in _chosen(args):
            row = [f"{case.key} {case.shape}"]
            for single, half in _calls(case):
                half()
                single()
                times = measure({"float32": single, "float16": half}, args.seconds)
                a, b = times["float32"].best, times["float16"].best
                ratios.append(b / a)
                row += [f"{a * 1e3:.4g}", f"{b * 1e3:.4g}", f"{b / a:.2f}" + ("" if b <= WANTED * a else " MISSED")]
            rows.append(tuple(row + [""] * (len(HEADER) - len(row))))
    if not rows:
        print("no case matches", file=sys.stderr)
        return 2
    table.show(rows, f"float16 beside float32, batch {args.batch}, {args.threads} thread(s)", HEADER, left=1)
    print(f"geometric mean {geometric_mean(ratios):.2f}, worst {max(ratios):.2f}")
    return 0


def _chosen(args: argparse.Namespace):
    for case in cases.ALL.values():
        one = case if isinstance(case, Matmul) else case.with_batch(args.batch)
        fits = one.bytes(4) <= MOST_BYTES and one.flops <= MOST_FLOPS
        if fits and re.search(args.only, f"{family(one)} {one.key} {one.shape}"):
            yield one


def _calls(case: Case):
    """For each layout the call in float32 and in float16."""
    for layout in (engines.OURS, engines.OURS_LAST):
        call = engines.ours(case).get(layout)
        if call:
            half = [a.astype(np.float16) if _is_float(a) else a for a in call.args]
            yield call, partial(call.func, *half, **call.keywords)


def _is_float(value) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.float32


if __name__ == "__main__":
    sys.exit(main())
