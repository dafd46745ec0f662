"""Turns what `make gpu-check` measured into the table by which the dispatcher chooses between a GPU's backends.

    python -m tilewise.benchmarks.gpu_choices benchmarks/results/gpu/*.json

Each result is of one device, whose part of kernels/gpu_choices.json it replaces; the others stay. Of a kind of call
(kernels/gpu_choice.py) the geometric means of the seconds count, over the cases that every backend with the op ran: of
the kernels alone, since the host takes as long for either backend. Where they were not timed alone, calls that may be
the host's time say nothing, and a kind of which three in four are of that sort has no row.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import geometric_mean

from tilewise.kernels import gpu_choice
from tilewise.kernels.gpu_choice import Call, Measurements, Row

HOST_BOUND = 600e-6  # seconds: a call that planned its kernels anew could take as long on the host

_VERSIONS = ("numba", "numba-cuda", "cupy", "CUDA of torch")


def times(record: dict) -> dict[str, dict[str, float]]:
    """kind of call -> backend -> seconds, of one case: "cuda", "cupy NHWC", "cuda TF32" are names of measurements.

    No seconds where they may be the host's.
    """
    found: dict[str, dict[str, float]] = {}
    calls, kernels = record.get("seconds", {}), record.get("kernels", {})
    alone = set(kernels) >= set(calls)
    for name, seconds in (kernels if alone else calls).items():
        backend, *variant = name.split()
        if backend not in gpu_choice.DEFAULT:
            continue
        layout = "NHWC" if "NHWC" in variant else "NCHW" if record["images"] else ""
        work = record["dispatched"]["flops"], record["dispatched"]["bytes"]
        call = Call(record["op"], record["family"], record["dtype"], layout, *work, "TF32" in variant)
        found.setdefault(call.kind, {})[backend] = seconds
    # the host takes about as long for either backend: where one takes longer than that, they differ in their kernels
    return {kind: s if alone or max(s.values()) >= HOST_BOUND else {} for kind, s in found.items()}


def measurements(result: dict) -> Measurements:
    """A device's part of the table. Raises ValueError for what `make gpu-check` does not write."""
    for key in ("device", "date", "command", "peers"):
        if not result.get(key):
            raise ValueError(f"not a result of make gpu-check: it has no {key!r}")
    cases: dict[str, list[dict[str, float]]] = {}
    for record in result["peers"]:
        for kind, seconds in times(record).items():
            cases.setdefault(kind, []).append(seconds)
    rows = {}
    for kind, seconds in cases.items():
        backends = [b for b in gpu_choice.DEFAULT if any(b in s for s in seconds)]
        whole = [s for s in seconds if s and all(b in s for b in backends)]
        if len(backends) > 1 and 4 * len(whole) >= len(seconds):  # what one backend alone has needs no choice
            rows[kind] = Row({b: geometric_mean(s[b] for s in whole) for b in backends}, len(whole))
    versions = {name: result[name] for name in _VERSIONS if name in result}
    return Measurements(result["date"], result["command"], versions, rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tilewise.benchmarks.gpu_choices", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, help="files that make gpu-check wrote")
    parser.add_argument("--table", type=Path, default=gpu_choice.FILE, help="the table to change")
    args = parser.parse_args(argv)
    try:
        table = gpu_choice.read(args.table.read_text(encoding="utf-8")) if args.table.exists() else {}
        for file in args.results:
            result = json.loads(file.read_text(encoding="utf-8"))
            made = measurements(result)
            table[result["device"]] = made
            print(f"{result['device']}: {len(made.rows)} kinds of calls, {made.date}")
        text = gpu_choice.written(table)
        gpu_choice.read(text)
    except (OSError, ValueError) as error:
        print(f"nothing was written: {error}", file=sys.stderr)
        return 1
    args.table.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
