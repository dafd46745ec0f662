"""What `make gpu-check` measured, as a table for each device.

python -m tilewise.benchmarks.gpu_report                  print the tables of benchmarks/results/gpu
python -m tilewise.benchmarks.gpu_report --readme FILE    put them between the README's markers

PyTorch's time over ours, of whole calls and of the kernels alone: geometric mean and worst case.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import geometric_mean

from . import table
from .gpu_peers import BACKENDS, RESULTS, ratios
from .report import between

BEGIN, END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
HEADER = ("family", "numbers", "cases", "cuda: calls", "kernels", "cupy: calls", "kernels")


def rows(records: list[dict]) -> list[tuple[str, ...]]:
    """A row for each family, direction and kind of numbers."""
    calls, kernels = (ratios(records, part) for part in ("seconds", "kernels"))
    kinds = dict.fromkeys(group[:-1] for group in calls)
    return [(_name(kind), " ".join(kind[2:]), _count(calls, kind), *_cells(calls, kernels, kind)) for kind in kinds]


def _name(kind: tuple[str, ...]) -> str:
    family, direction, *_ = kind
    return family if direction == "forward" else f"{family} {direction}"


def _count(calls: dict, kind: tuple[str, ...]) -> str:
    return str(max(len(calls.get((*kind, backend), ())) for backend in BACKENDS))


def _cells(calls: dict, kernels: dict, kind: tuple[str, ...]) -> list[str]:
    return [_shown(part.get((*kind, backend))) for backend in BACKENDS for part in (calls, kernels)]


def _shown(found: list[float] | None) -> str:
    return f"{geometric_mean(found):.2f} ({min(found):.2f})" if found else ""


def title(result: dict) -> str:
    told = ("numba-cuda", "cupy", "torch", "commit")
    versions = ", ".join(f"{name} {result[name]}" for name in told if name in result)
    kernels = f" Kernels: {result['kernels']}." if "kernels" in result else ""
    return (
        f"{result['device']}, {versions}, {result['date']}; printed by `{result['command']}`. PyTorch's time / ours, "
        f"geometric mean (worst case).{kernels}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tilewise.benchmarks.gpu_report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put the tables between the README's markers")
    args = parser.parse_args(argv)
    results = [json.loads(f.read_text(encoding="utf-8")) for f in sorted(args.results.glob("*.json"))]
    results = [result for result in results if "peers" in result]
    if not results:
        print(f"no results in {args.results}: run `make gpu-check` first", file=sys.stderr)
        return 1
    for result in results:
        table.show(rows(result["peers"]), title(result), HEADER, left=2)
    if args.readme:
        parts = [part for r in results for part in (title(r), table.markdown(rows(r["peers"]), HEADER, left=2))]
        text = between(args.readme.read_text(encoding="utf-8"), BEGIN, END, "\n\n".join(parts), "README")
        args.readme.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
