"""From measurements to a table and a JSON file, and from the JSON files to the README.

python -m tilewise.benchmarks.report --records FILE    print the table, write benchmarks/results/<device>.json
python -m tilewise.benchmarks.report --readme FILE     put the tables of benchmarks/results into the README
"""

import argparse
import json
import os
import platform
import re
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from . import cases, table
from .timing import Comparison

RESULTS = Path("benchmarks/results")
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def machine() -> dict:
    """What the figures depend on besides the code."""
    from tilewise.kernels import machine as hardware
    from tilewise.kernels import settings

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    wanted = settings.active().threads
    return {
        "device": f"{hardware.cpu_name()} ({hardware.cpu_architecture()})",
        "cores": cores,
        "threads": wanted or hardware.thread_limit(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | versions("tilewise", "numpy", "numba"),
        "date": date.today().isoformat(),
    }


def versions(*distributions: str) -> dict[str, str]:
    found = {}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def title(of: dict) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in of["versions"].items())
    return f"{of['device']}, {of['threads']} threads ({of['cores']} cores), {versions}, {of['date']}"


def print_devices() -> None:
    """Say what is measured, and visibly what is not, and why."""
    import tilewise

    for device in tilewise.devices():
        missing = {name: why for name, why in device.backends.items() if why}
        usable = ", ".join(name for name in device.backends if name not in missing)
        print(f"{device.kind.upper()}: {device.name}" + (f" (backends: {usable})" if usable else ""))
        for name, why in missing.items():
            print(f"     {name}: not measured, {why}")
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5:
        print(f"Other programs are running (load {os.getloadavg()[0]:.1f}): expect times that are too long.")


def read_records(path: Path) -> list[Comparison]:
    """The measurements that the asv run left, in the cases' order; a repeated one replaces the earlier."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = [Comparison.from_dict(json.loads(line)) for line in lines]
    order = {key: number for number, key in enumerate(cases.ALL)}
    latest = {(f"{c.op} {c.layer}", c.dtype): c for c in records}
    return [latest[key] for key in sorted(latest, key=lambda key: (order[key[0]], key[1]))]


def result_file(of: dict, folder: Path) -> Path:
    slug = re.sub(r"[^a-z0-9.]+", "-", of["device"].lower()).strip("-")
    return folder / f"{slug}-{of['threads']}threads.json"


def save(of: dict, comparisons: list[Comparison], command: str, folder: Path) -> Path:
    path = result_file(of, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = of | {"command": command, "comparisons": [c.as_dict() for c in comparisons]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def fill(readme: str, results: list[dict]) -> str:
    """The README with what stands between its two markers replaced by one table for each result."""
    parts = []
    for result in results:
        rows = [table.row(Comparison.from_dict(record)) for record in result["comparisons"]]
        parts += [f"{title(result)}; printed by `{result['command']}`. {table.NOTE}.", table.markdown(rows)]
    return between(readme, BEGIN, END, "\n\n".join(parts), "README")


def between(text: str, begin: str, end: str, content: str, what: str) -> str:
    """The text with what stands between its two markers replaced."""
    head, found_begin, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"the {what} must have the markers {begin} and {end}, in this order")
    return "\n\n".join(part for part in (head + begin, content, end + tail) if part)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tilewise.benchmarks.report", description="Print, save and publish measurements."
    )
    parser.add_argument("--devices", action="store_true", help="print what can be measured here, and what cannot")
    parser.add_argument("--records", type=Path, metavar="FILE", help="print and save the measurements of an asv run")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put the saved tables between the README's markers")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help=f"default: {RESULTS}")
    args = parser.parse_args(argv)
    if not (args.devices or args.records or args.readme):
        parser.error("nothing to do: give --devices, --records or --readme")
    if args.devices:
        print_devices()
    failed = _report(args.records, args.results) if args.records else 0
    if args.readme:
        files = sorted(args.results.glob("*.json"))
        if not files:
            parser.error(f"no results in {args.results}: run `make bench` first")
        filled = fill(args.readme.read_text(encoding="utf-8"), [json.loads(f.read_text("utf-8")) for f in files])
        args.readme.write_text(filled, encoding="utf-8")
        print(f"{args.readme}: tables of {', '.join(f.name for f in files)}")
    return failed


def _report(records: Path, results: Path) -> int:
    comparisons, of = read_records(records), machine()
    table.show([table.row(c) for c in comparisons], title(of))
    print(table.NOTE)
    measured = {f"{c.op} {c.layer}" for c in comparisons}
    missing = [key for key in cases.suite() if key not in measured]
    if comparisons:
        print(f"saved as {save(of, comparisons, 'make bench', results)}")
    if missing:
        print(f"{len(missing)} cases have no result (see asv's output above): {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
