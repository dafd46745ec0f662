"""The command line: `python -m tilewise info | warmup | bench`."""

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import tilewise
from tilewise.progress import Progress


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, RuntimeError, NotImplementedError) as error:  # such as a TILEWISE_BACKEND that is not there
        print(f"tilewise {args.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tilewise", description="Fast CNN kernels for Python.")
    parser.add_argument("--version", action="version", version=f"tilewise {tilewise.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    info = commands.add_parser("info", help="what this machine has, and what tilewise makes of it")
    info.set_defaults(run=_info)

    warmup = commands.add_parser(
        "warmup",
        help="compile the kernels into the cache",
        description="Compile every kernel into the cache, so that no later process waits for it.",
    )
    warmup.add_argument("--dtype", choices=["float32", "float64", "all"], default="float32", help="default: float32")
    warmup.add_argument("--bench", action="store_true", help="only what `python -m tilewise bench` runs")
    warmup.add_argument("--jobs", type=_positive, metavar="N", help="processes at a time (default: one a core)")
    warmup.set_defaults(run=_warmup)

    bench = commands.add_parser(
        "bench",
        help="time the kernels against NumPy",
        description="Time layers of real networks against the NumPy reference; the results are checked first.",
    )
    bench.add_argument("--dtype", choices=["float32", "float64"], default="float32", help="default: float32")
    bench.add_argument(
        "--match", metavar="TEXT", default="", help='only cases whose name has TEXT, such as "conv2d" or "lenet5"'
    )
    bench.add_argument("--all", action="store_true", help="every layer of every network (takes long)")
    bench.add_argument("--batch", type=_positive, metavar="N", help="images at a time (default: each case's own)")
    bench.add_argument("--threads", type=_positive, metavar="N", help="threads of our kernels (default: one a core)")
    bench.add_argument("--json", metavar="FILE", help="also write the measurements to FILE")
    bench.set_defaults(run=_bench)
    return parser


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return number


def _info(args) -> int:
    from tilewise.kernels import machine
    from tilewise.kernels.cpu import jit, simd, threads

    print(f"tilewise {tilewise.__version__}  ({tilewise.__path__[0]})")
    print(f"Python {platform.python_version()}, {_version('numpy')}, {_version('numba')}, {_version('tbb')}")
    print(f"system    {platform.system()} {platform.release()} {platform.machine()}")
    print(f"CPU       {machine.cpu_name()}")
    print(
        f"vectors   {simd.VECTOR_BYTES * 8} bits: {simd.VECTOR_BYTES // 4} float32 or {simd.VECTOR_BYTES // 8} float64"
    )
    print(f"features  {' '.join(sorted(simd.features()))}")
    print(f"threads   {machine.thread_limit()}, layer {threads.layer()}")
    print(f"cache     {jit.cache_folder() or 'none: no folder can be written, so each process compiles for itself'}")
    for device in tilewise.devices():
        print(f"{device.kind.upper():9s} {device.name}")
        for name, missing in device.backends.items():
            print(f"          {name:10s}{'available' if missing is None else f'not available: {missing}'}")
    return 0


def _version(distribution: str) -> str:
    try:
        return f"{distribution} {version(distribution)}"
    except PackageNotFoundError:
        return f"no {distribution}"


def _warmup(args) -> int:
    from tilewise import warmup
    from tilewise.kernels import machine
    from tilewise.kernels.cpu import jit

    folder = jit.cache_folder()
    if folder is None:
        print("tilewise warmup: no cache folder can be written; set NUMBA_CACHE_DIR to one that can", file=sys.stderr)
        return 1
    start = time.perf_counter()
    todo = warmup.jobs(warmup.DTYPES if args.dtype == "all" else (args.dtype,), args.bench)
    outcomes = []
    print(f"compiling into {folder}", file=sys.stderr)
    with Progress("compiling", len(todo)) as progress:
        for job, outcome in warmup.run(todo, args.jobs or min(machine.thread_limit(), len(todo))):
            outcomes.append(outcome)
            progress.step(str(job))
    compiled = frozenset().union(*(outcome.compiled for outcome in outcomes))
    print(f"{len(compiled)} kernels are ready in {folder}, {time.perf_counter() - start:.0f} s")
    for name, reason in {name: why for outcome in outcomes for name, why in outcome.missing.items()}.items():
        print(f"  not there: {name}: {reason}")
    return 0


def _bench(args) -> int:
    from tilewise.benchmarks import cases, report, table, timing

    chosen = {key: case for key, case in (cases.ALL if args.all else cases.QUICK).items() if args.match in key}
    if not chosen:
        known = " ".join(dict.fromkeys(part for case in cases.ALL.values() for part in (case.op, case.layer)))
        print(f"tilewise bench: no case has {args.match!r} in its name. With --all:\n{known}", file=sys.stderr)
        return 2
    report.print_devices()
    comparisons, failed = [], {}
    with tilewise.using(threads=args.threads), Progress("timing", len(chosen)) as progress:
        machine = report.machine()
        for case in chosen.values():
            case = case if args.batch is None else case.with_batch(args.batch)
            try:
                comparisons.append(timing.compare(case, args.dtype))
            except (AssertionError, NotImplementedError) as error:
                failed[case.key] = error
            progress.step(case.key)
    table.show([table.row(c) for c in comparisons], report.title(machine))
    print(table.NOTE)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(machine | {"comparisons": [c.as_dict() for c in comparisons]}, file, indent=1)
    for key, error in failed.items():
        print(f"{key}: {type(error).__name__}: {error}", file=sys.stderr)
    return 1 if failed else 0
