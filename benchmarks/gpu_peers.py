"""Every GPU kernel of both backends beside PyTorch (cuBLAS, cuDNN) on the same GPU: `make gpu-check` ends with it.

Results are compared with PyTorch's before anything is timed, on the GPU; those that are drawn with our CPU kernels'.
Times are of CUDA events around blocks of calls, back to back on tensors that lie on the GPU; the median of the blocks.
Small calls take as long as the host needs to start their kernels, so each engine's calls are captured into a CUDA graph
as well: what a call takes in its replay is the kernels' time alone.
TF32 off, which is the same precision, and on; images in both layouts. Prints a table and writes
benchmarks/results/gpu/<device>.json, anew after every case; gpu_choices.py makes the dispatcher's table of it.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np

import tilewise
from tilewise.kernels import machine

from . import cases, engines, table
from .layers import Arguments, Case, Conv, Linear, Matmul
from .timing import SEED, check_error

FAMILIES = ("gemm", "conv", "pool", "batchnorm", "activation", "dropout_mask")
HEADER = ("op, layer, shape", "dtype", "", "cuda", "cupy", "torch", "rate", "cuda ratio", "cupy ratio", "kernels alone")
BACKENDS, TORCH = ("cuda", "cupy"), "torch"
# Of a case: as it is, with images in NHWC, with factors rounded to TF32. "cupy NHWC", "torch TF32" are measurements.
PLAIN, LAST, TF32 = VARIANTS = ("", "NHWC", "TF32")
HALVES = ("float16", "bfloat16")
BLOCKS = 5
CAPTURED = 10  # calls of a graph
RESULTS = Path(__file__).parent / "results" / "gpu"
# The goal of issue 4, which no network's layer has.
LARGE = Matmul("matmul", "square.4096", 1, 4096, 4096, 4096)


def main(argv: list[str] | None = None, device: str = "cuda") -> int:
    args = _arguments(argv)
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed: nothing to compare with, nothing measured", file=sys.stderr)
        return 0
    if device == "cuda" and not torch.cuda.is_available():
        print("PyTorch finds no GPU", file=sys.stderr)
        return 2
    torch.set_grad_enabled(False)
    about = _machine(torch, device)
    print(", ".join(f"{k} {v}" for k, v in about.items()), flush=True)
    backends = usable_backends()
    launches = launch_costs(torch, device, args.launches, backends)
    for name, seconds in launches.items():
        print(f"{name}: {seconds * 1e6:.2f} us", flush=True)
    records: list[dict] = []
    path = save(about, launches, records, args.results)
    for record in _measured(torch, chosen(args.only, args.batch), args, device, backends):
        records.append(record)
        save(about, launches, records, args.results)
    rows = [row for r in records for row in _rows(r)]
    table.show(rows, f"\nbeside PyTorch on {about['device']}; ratio: its time / ours; rate: of the faster", HEADER, 3)
    for line in _summary(records):
        print(line)
    print(f"written to {path}")
    failed = [(r, name, error) for r in records for name, error in r["errors"].items()]
    for record, name, error in failed:
        print(f"FAILED {record['key']} {record['dtype']} {name}: {error}", file=sys.stderr)
    return 1 if failed else 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tilewise.benchmarks.gpu_peers", description=__doc__)
    parser.add_argument("--only", default="", help="a regular expression that the case's name must contain")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=0.03, help="for each engine and case")
    parser.add_argument("--budget", type=float, default=180, help="seconds after which no new case is begun")
    parser.add_argument("--launches", type=int, default=5000)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def chosen(only: str, batch: int) -> Iterator[tuple[Case, str]]:
    """What matters most first, so that a budget that ends leaves out the least."""
    some = [LARGE, *(case for case in cases.ALL.values() if case.family in FAMILIES)]
    some = [c if isinstance(c, Matmul | Linear) else c.with_batch(batch) for c in some]
    some = [c for c in dict.fromkeys(some) if re.search(only, f"{c.key} {c.shape}")]
    forward, backward = ([c for c in some if c.is_backward == which] for which in (False, True))
    products = [c for c in forward if isinstance(c, Matmul | Linear | Conv)]
    others = [c for c in forward if c not in products]
    for group, dtypes in (
        (products, ("float32",)), (others, ("float32",)), (products, HALVES), (backward, ("float32",)),
        (others, HALVES), (backward, HALVES),
    ):  # fmt: skip
        yield from ((case, dtype) for case in group for dtype in dtypes)


# ---- what a launch costs


def usable_backends() -> list[str]:
    missing = machine.unavailable_backends()
    return [name for name in BACKENDS if name not in missing]


def launch_costs(torch, device: str, count: int, backends: list[str]) -> dict[str, float]:
    """Seconds of the host for a launch: of an empty kernel alone, of a whole call, and of PyTorch's."""
    x = torch.zeros(32, device=device)
    calls: dict[str, Callable] = {"torch.relu of 32 numbers": partial(torch.relu, x)}
    if "cuda" in backends:
        calls["cuda: launch of an empty kernel with four arguments"] = _empty_launch(x, device)
    costs = {name: _host_seconds(torch, call, count) for name, call in calls.items()}
    for backend in backends:
        with tilewise.using(backend=backend):
            costs[f"{backend}: relu of 32 numbers"] = _host_seconds(torch, partial(tilewise.relu, x), count)
    return costs


def _host_seconds(torch, call: Callable, count: int) -> float:
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    seconds = (time.perf_counter() - start) / count
    torch.cuda.synchronize()
    return seconds


def _empty_launch(x, device: str) -> Callable:
    from tilewise.kernels import device_arrays
    from tilewise.kernels.cuda import launch

    def nothing(x, y, z, n):
        pass

    elements, number = launch.ELEMENTS, launch.INT64
    nothing.__annotations__ = {"x": elements, "y": elements, "z": elements, "n": number}
    empty = launch.kernel(threads=32, name="nothing")(nothing)
    launch.KERNELS.remove(empty)  # it is not one of tilewise's
    view: Any = device_arrays.device_view("launch_costs", "x", x) if device == "cuda" else _host_view()
    return partial(empty, view.place, 1, view, view, view, 32)


def _host_view():
    from tilewise.kernels.device_arrays import host_place

    return host_place().copy_in(np.zeros(32, np.float32))


# ---- cases


def _measured(torch, some: Iterator[tuple[Case, str]], args, device: str, backends: list[str]) -> Iterator[dict]:
    end, left = time.monotonic() + args.budget, []
    for case, dtype in some:
        if time.monotonic() > end:
            left.append(f"{case.key} {dtype}")
            continue
        record = {"key": case.key, "op": case.op, "layer": case.layer, "family": case.family, "shape": case.shape}
        record |= {"dtype": dtype, "flops": case.flops, "bytes": case.bytes(2 if dtype in HALVES else 4)}
        record |= {"rate_unit": case.rate_unit, "images": isinstance(case, engines.IMAGES)}
        try:
            yield record | measure(torch, case, dtype, args.seconds, device, backends)
        except Exception as error:  # PyTorch's; the other cases are to be measured all the same
            yield record | {
                "seconds": {},
                "kernels": {},
                "missing": {},
                "errors": {TORCH: f"{type(error).__name__}: {error}"},
            }
    if left:
        print(f"not measured, no time left: {', '.join(left)}", file=sys.stderr)


@lru_cache(maxsize=1)  # the other dtypes of the case come next
def single(case: Case) -> Arguments:
    return case.arguments(np.random.default_rng(SEED), np.dtype(np.float32))


def variants_of(case: Case, dtype: str) -> tuple[str, ...]:
    tensor_cores = dtype == "float32" and case.family in ("gemm", "conv")
    return (PLAIN, *((LAST,) if isinstance(case, engines.IMAGES) else ()), *((TF32,) if tensor_cores else ()))


def measure(
    torch, case: Case, dtype: str, seconds: float, device: str = "cuda", backends: list[str] | tuple = BACKENDS
) -> dict:  # fmt: skip
    """Seconds a call of each engine, after the results were compared; what is missing or wrong, by engine.

    kernels: seconds of a call's kernels, without the host. dispatched: the FLOPs and bytes that the dispatcher counts
    for the call.
    """
    args, options = single(case)
    tensors = engines.torch_tensors(torch, args, device, dtype)
    peers = engines.torch_calls(case, tensors, options)
    allow_tf32(torch, False)
    expected = _drawn(torch, case, device) if case.draws else peers[engines.TORCH]()
    record: dict[str, dict] = {"seconds": {}, "kernels": {}, "missing": {}, "errors": {}, "dispatched": {}}
    alone = partial(time_kernels, torch, seconds=seconds) if device == "cuda" else None
    for variant in variants_of(case, dtype):
        last = variant == LAST
        operands = engines.channels_last(case, tensors) if last else tensors
        call = partial(getattr(tilewise, case.op), *operands, **(engines.options_last(options) if last else options))
        for backend in backends:
            name = f"{backend} {variant}".strip()
            try:
                with tilewise.using(backend=backend, tf32=variant == TF32):
                    work = tilewise.explain(call.func, *call.args, **call.keywords)
                    # TF32 has as many bits of a number as float16
                    _compare(case, "float16" if variant == TF32 else dtype, call(), expected, last)
                    record["seconds"][name] = time_call(torch, call, seconds)
                    record["kernels"] |= {} if alone is None else {name: alone(call)}
                    record["dispatched"] = {"flops": work.flops, "bytes": work.bytes}
            except NotImplementedError as error:
                record["missing"][name] = str(error)
            except Exception as error:  # the other engines are to be measured all the same
                record["errors"][name] = f"{type(error).__name__}: {error}"
        allow_tf32(torch, variant == TF32)
        peer = peers[engines.TORCH_LAST if last else engines.TORCH]
        theirs = f"{TORCH} {variant}".strip()
        record["seconds"][theirs] = time_call(torch, peer, seconds)
        with suppress(RuntimeError):  # what PyTorch does not capture has no time of its kernels
            record["kernels"] |= {} if alone is None else {theirs: alone(peer)}
        allow_tf32(torch, False)
    return record


def _drawn(torch, case: Case, device: str):
    """What our CPU kernel gives: PyTorch draws other numbers."""
    args, options = single(case)
    with tilewise.using(device="cpu"):
        return engines.torch_tensors(torch, [getattr(tilewise, case.op)(*args, **options)], device)[0]


def allow_tf32(torch, allowed: bool):
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def _compare(case: Case, dtype: str, ours, theirs, channels_last: bool = False):
    """AssertionError where a result is further from PyTorch's than rounding explains."""
    if not isinstance(theirs, tuple | list):
        ours, theirs = (ours,), (theirs,)
    for i, (actual, expected) in enumerate(zip(ours, theirs, strict=True)):
        image = channels_last and i == 0  # other results have no layout
        right = expected.double()
        error = ((actual.permute(0, 3, 1, 2) if image else actual).double() - right).abs().max() / right.abs().max()
        check_error(case, dtype, float(error))


def time_call(torch, call: Callable, seconds: float) -> float:
    """The median of some blocks of calls, each between two events."""
    for _ in range(3):
        call()
    count = max(1, int(seconds / BLOCKS / max(_block(torch, call, 1), 1e-6)))
    return median(_block(torch, call, count) for _ in range(BLOCKS))


def time_kernels(torch, call: Callable, seconds: float) -> float:
    """The same of a call in a graph's replay: its kernels and the gaps between them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CAPTURED):
            call()
    return time_call(torch, graph.replay, seconds) / CAPTURED


def _block(torch, call: Callable, count: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(count):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / count  # it tells milliseconds


# ---- what is shown and kept


def _rows(record: dict) -> Iterator[tuple[str, ...]]:
    """One for each variant that an engine of ours was to run."""
    for variant in VARIANTS:
        names = {engine: f"{engine} {variant}".strip() for engine in (*BACKENDS, TORCH)}
        ours = [names[b] for b in BACKENDS]
        if any(name in record[part] for name in ours for part in ("seconds", "missing", "errors")):
            seconds = {engine: record["seconds"].get(name) for engine, name in names.items()}
            times = [_time(record, name) for name in names.values()]
            calls = [_ratio(seconds[TORCH], seconds[b]) for b in BACKENDS]
            rate = _rate(record, [seconds[b] for b in BACKENDS if seconds[b]])
            alone = record.get("kernels", {})
            kernels = [_ratio(alone.get(names[TORCH]), alone.get(names[b])) for b in BACKENDS]
            about = f"{record['key']} {record['shape']}", record["dtype"], variant
            yield (*about, *times, rate, *calls, " ".join(kernels).strip())


def _time(record: dict, name: str) -> str:
    if name in record["seconds"]:
        return table.duration(record["seconds"][name])
    return "FAILED" if name in record["errors"] else "missing" if name in record["missing"] else ""


def _ratio(theirs: float | None, ours: float | None) -> str:
    return f"{theirs / ours:.2f}" if theirs and ours else ""


def _rate(record: dict, ours: list[float]) -> str:
    work = record["flops"] if record["rate_unit"] == "GFLOP/s" else record["bytes"]
    return f"{work / min(ours) / 1e9:.0f} {record['rate_unit']}" if ours else ""


def _summary(records: list[dict]) -> Iterator[str]:
    calls, kernels = (ratios(records, part) for part in ("seconds", "kernels"))
    for group, found in calls.items():
        alone = f"; kernels alone {_mean_and_worst(kernels[group])}" if group in kernels else ""
        yield f"{' '.join(group)}: {_mean_and_worst(found)}{alone}"


def ratios(records: list[dict], part: str) -> dict[tuple, list[float]]:
    """(family, direction, dtype, variant..., backend) -> PyTorch's time over the backend's in each case. part: of a
    record, "seconds" or "kernels"."""
    groups: dict[tuple, list[float]] = {}
    for r in records:
        direction = "backward" if r["op"].endswith("_backward") else "forward"
        for name, seconds in r.get(part, {}).items():
            backend, *variant = name.split()
            peer = r[part].get(" ".join((TORCH, *variant)))
            if backend in BACKENDS and peer:
                group = (r["family"], direction, r["dtype"], *variant, backend)
                groups.setdefault(group, []).append(peer / seconds)
    return groups


def _mean_and_worst(found: list[float]) -> str:
    return f"geometric mean {geometric_mean(found):.2f}, worst {min(found):.2f}"


# What is told of the machine, and the distributions whose release it is.
_PACKAGES = (
    ("numpy", "numpy"), ("numba", "numba"), ("numba-cuda", "numba-cuda"),
    ("cupy", "cupy-cuda13x", "cupy-cuda12x", "cupy"), ("torch", "torch"),
)  # fmt: skip


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _machine(torch, device: str) -> dict[str, str]:
    about = {"device": torch.cuda.get_device_name() if device == "cuda" else device}
    for name, *packages in _PACKAGES:
        about[name] = next((found for found in map(_version, packages) if found), "unknown")
    return about | {"CUDA of torch": str(torch.version.cuda), "date": f"{datetime.now(UTC):%Y-%m-%d}"}


def slug(device: str) -> str:
    """A device's name as a file's."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def save(about: dict, launches: dict, records: list[dict], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug(about['device'])}.json"
    text = json.dumps(about | {"command": "make gpu-check", "launches": launches, "peers": records}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
