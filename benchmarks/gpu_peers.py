"""Every GPU kernel beside PyTorch (cuBLAS, cuDNN) on the same GPU: `make gpu-check` runs it after the tests.

Results are compared with PyTorch's before anything is timed, on the GPU. Times are of CUDA events around blocks of
calls, back to back on tensors that lie on the GPU; the median of the blocks. TF32 off, which is the same precision, and
on; images in both layouts. Prints a table and writes benchmarks/results/gpu/<device>.json, anew after every case.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np

import tilewise

from . import cases, engines, table
from .layers import Case, Conv, Linear, Matmul
from .timing import SEED, check_error

FAMILIES = ("gemm", "conv", "pool", "batchnorm", "activation")
HEADER = ("op, layer, shape", "dtype", "ours", "rate", "torch", "ratio", "TF32", "ratio", "NHWC", "ratio")
# name of a measurement -> that of PyTorch's which it is compared with
OURS, OURS_TF32, OURS_LAST, TORCH_TF32 = "ours", "ours TF32", "ours NHWC", "torch TF32"
PEERS = {OURS: engines.TORCH, OURS_TF32: TORCH_TF32, OURS_LAST: engines.TORCH_LAST}
BLOCKS = 5
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
    launches = launch_costs(torch, device, args.launches)
    for name, seconds in launches.items():
        print(f"{name}: {seconds * 1e6:.2f} us", flush=True)
    records: list[dict] = []
    path = save(about, launches, records, args.results)
    for record in _measured(torch, _chosen(args), args, device):
        records.append(record)
        save(about, launches, records, args.results)
    table.show([_row(r) for r in records], f"\nbeside PyTorch on {about['device']}; ratio: its time / ours", HEADER, 2)
    for line in _summary(records):
        print(line)
    print(f"written to {path}")
    failed = [r for r in records if r.get("error")]
    for record in failed:
        print(f"FAILED {record['key']} {record['dtype']}: {record['error']}", file=sys.stderr)
    return 1 if failed else 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tilewise.benchmarks.gpu_peers", description=__doc__)
    parser.add_argument("--only", default="", help="a regular expression that the case's name must contain")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=0.05, help="for each engine and case")
    parser.add_argument("--budget", type=float, default=180, help="seconds after which no new case is begun")
    parser.add_argument("--launches", type=int, default=5000)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def _chosen(args) -> Iterator[tuple[Case, str]]:
    """What matters most first, so that a budget that ends leaves out the least; products also in float16."""
    some = [LARGE, *(case for case in cases.ALL.values() if case.family in FAMILIES)]
    some = [c if isinstance(c, Matmul | Linear) else c.with_batch(args.batch) for c in some]
    some = [c for c in dict.fromkeys(some) if re.search(args.only, f"{c.key} {c.shape}")]
    products = [c for c in some if isinstance(c, Matmul | Linear | Conv) and not c.is_backward]
    for dtype in ("float32", "float16"):
        yield from ((case, dtype) for case in products)
    for case in sorted((c for c in some if c not in products), key=lambda case: case.is_backward):
        yield case, "float32"


# ---- what a launch costs


def launch_costs(torch, device: str, count: int) -> dict[str, float]:
    """Seconds of the host for a launch: of an empty kernel alone, of a whole call, and of PyTorch's."""
    from tilewise.kernels import device_arrays
    from tilewise.kernels.cuda import launch

    def nothing(x, y, z, n):
        pass

    elements, number = launch.ELEMENTS, launch.INT64
    nothing.__annotations__ = {"x": elements, "y": elements, "z": elements, "n": number}
    empty = launch.kernel(threads=32, name="nothing")(nothing)
    launch.KERNELS.remove(empty)  # it is not one of tilewise's
    x = torch.zeros(32, device=device)
    view: Any = device_arrays.device_view("launch_costs", "x", x) if device == "cuda" else _host_view()
    calls: dict[str, Callable] = {
        "launch of an empty kernel with four arguments": partial(empty, view.place, 1, view, view, view, 32),
        "tilewise.relu of 32 numbers": partial(tilewise.relu, x),
        "torch.relu of 32 numbers": partial(torch.relu, x),
    }
    costs = {}
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        costs[name] = (time.perf_counter() - start) / count
        torch.cuda.synchronize()
    return costs


def _host_view():
    from tilewise.kernels.device_arrays import host_place

    return host_place().copy_in(np.zeros(32, np.float32))


# ---- cases


def _measured(torch, chosen: Iterator[tuple[Case, str]], args, device: str) -> Iterator[dict]:
    end, left = time.monotonic() + args.budget, []
    for case, dtype in chosen:
        if time.monotonic() > end:
            left.append(f"{case.key} {dtype}")
            continue
        record = {"key": case.key, "op": case.op, "layer": case.layer, "family": case.family, "shape": case.shape}
        record |= {"dtype": dtype, "flops": case.flops, "bytes": case.bytes(np.dtype(dtype).itemsize)}
        record |= {"rate_unit": case.rate_unit}
        try:
            yield record | {"seconds": measure(torch, case, dtype, args.seconds, device)}
        except (NotImplementedError, ModuleNotFoundError) as error:
            yield record | {"missing": str(error)}
        except Exception as error:  # the others are to be measured all the same
            yield record | {"error": f"{type(error).__name__}: {error}"}
    if left:
        print(f"not measured, no time left: {', '.join(left)}", file=sys.stderr)


def measure(torch, case: Case, dtype: str, seconds: float, device: str = "cuda") -> dict[str, float]:
    """Seconds a call of each engine, after the results were compared."""
    args, options = case.arguments(np.random.default_rng(SEED), np.dtype(np.float32))
    args = tuple(a.astype(dtype) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a for a in args)
    peers = engines.torch_calls(case, args, options, device)
    layouts = {OURS: (args, options)}
    if isinstance(case, Conv):
        layouts[OURS_LAST] = engines.channels_last(case, args), options | {"layout": "NHWC"}
    _allow_tf32(torch, False)
    expected, measured = peers[engines.TORCH](), {}
    for name, (operands, chosen) in layouts.items():
        tensors = [torch.from_numpy(a.copy()).to(device) if isinstance(a, np.ndarray) else a for a in operands]
        call = partial(getattr(tilewise, case.op), *tensors, **chosen)
        _compare(case, dtype, call(), expected, name == OURS_LAST)
        measured[name] = time_call(torch, call, seconds)
        if name == OURS and dtype == "float32" and case.family in ("gemm", "conv"):
            with tilewise.using(tf32=True):
                _compare(case, "float16", call(), expected)  # it has as many bits of a number
                measured[OURS_TF32] = time_call(torch, call, seconds)
    measured |= {name: time_call(torch, call, seconds) for name, call in peers.items()}
    if OURS_TF32 in measured:
        _allow_tf32(torch, True)
        measured[TORCH_TF32] = time_call(torch, peers[engines.TORCH], seconds)
        _allow_tf32(torch, False)
    return measured


def _allow_tf32(torch, allowed: bool):
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


def _row(record: dict) -> tuple[str, ...]:
    name_and_dtype = f"{record['key']} {record['shape']}", record["dtype"]
    if "seconds" not in record:
        return (*name_and_dtype, "missing" if "missing" in record else "FAILED", *[""] * 7)
    seconds = record["seconds"]
    work = record["flops"] if record["rate_unit"] == "GFLOP/s" else record["bytes"]
    cells = [table.duration(seconds[OURS]), f"{work / seconds[OURS] / 1e9:.0f} {record['rate_unit']}"]
    cells.append(table.duration(seconds[engines.TORCH]))
    for name, peer in PEERS.items():
        if name in (OURS_TF32, OURS_LAST):
            cells.append(table.duration(seconds[name]) if name in seconds else "")
        cells.append(f"{seconds[peer] / seconds[name]:.2f}" if name in seconds and peer in seconds else "")
    return (*name_and_dtype, *cells)


def _summary(records: list[dict]) -> Iterator[str]:
    groups: dict[tuple, list[float]] = {}
    for r in records:
        direction = "backward" if r["op"].endswith("_backward") else "forward"
        for name, peer in PEERS.items():
            seconds = r.get("seconds", {})
            if name in seconds and peer in seconds:
                group = (r["family"], direction, r["dtype"], *name.split()[1:])
                groups.setdefault(group, []).append(seconds[peer] / seconds[name])
    for group, ratios in groups.items():
        yield f"{' '.join(group)}: geometric mean {geometric_mean(ratios):.2f}, worst {min(ratios):.2f}"


def _machine(torch, device: str) -> dict[str, str]:
    about = {"device": torch.cuda.get_device_name() if device == "cuda" else device}
    for name in ("numpy", "numba", "numba-cuda", "torch"):
        try:
            about[name] = version(name)
        except PackageNotFoundError:
            about[name] = "unknown"
    return about | {"CUDA of torch": str(torch.version.cuda), "date": f"{datetime.now(UTC):%Y-%m-%d}"}


def save(about: dict, launches: dict, records: list[dict], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', about['device'].lower()).strip('-')}.json"
    text = json.dumps(about | {"command": "make gpu-check", "launches": launches, "peers": records}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
