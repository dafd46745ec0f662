"""What each kernel of a call takes on the GPU, ours and PyTorch's, by CUPTI (torch.profiler).

    python -m tilewise.benchmarks.gpu_kernels --only "conv2d vgg16" --backend cupy

Cases and variants are gpu_peers.py's. Prints the kernels of each call, with microseconds, and writes
benchmarks/results/gpu/kernels/<device>.json: of each case, measurement -> kernel -> [launches, microseconds] of a call.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import tilewise

from . import engines, gpu_peers
from .gpu_peers import BACKENDS, HALVES, LAST, RESULTS, TF32, TORCH

CALLS = 3
_LONGEST = 150  # characters of a kernel's name
_OF_THE_HOST = re.compile(r"cu(da)?[A-Z]")  # calls of the driver, which CUPTI reports as well


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tilewise.benchmarks.gpu_kernels", description=__doc__)
    parser.add_argument("--only", default="", help="a regular expression that the case's name must contain")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--backend", choices=BACKENDS, nargs="+", default=["cupy"])
    parser.add_argument("--budget", type=float, default=180, help="seconds after which no new case is begun")
    parser.add_argument("--results", type=Path, default=RESULTS / "kernels")
    args = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("PyTorch finds no GPU", file=sys.stderr)
        return 2
    torch.set_grad_enabled(False)
    about = {"device": torch.cuda.get_device_name(), "date": f"{datetime.now(UTC):%Y-%m-%d}", "batch": args.batch}
    about["command"] = "python -m tilewise.benchmarks.gpu_kernels"
    end, measured = time.monotonic() + args.budget, []
    for case, dtype in gpu_peers.chosen(args.only, args.batch):
        if dtype == HALVES[1] or time.monotonic() > end:  # bfloat16's kernels are float16's
            continue
        record = {"key": case.key, "shape": case.shape, "dtype": dtype}
        measured.append(record | measure(torch, case, dtype, args.backend))
        _show(measured[-1])
        save(args.results, about | {"cases": measured})
    return 0


def measure(torch, case, dtype: str, backends: Iterable[str]) -> dict[str, dict]:
    """Measurement ("cupy NHWC", "torch TF32") -> what `kernels_of` finds in a call."""
    arrays, options = gpu_peers.single(case)
    tensors = engines.torch_tensors(torch, arrays, "cuda", dtype)
    peers, found = engines.torch_calls(case, tensors, options), {}
    for variant in gpu_peers.variants_of(case, dtype):
        last = variant == LAST
        operands = engines.channels_last(case, tensors) if last else tensors
        call = partial(getattr(tilewise, case.op), *operands, **(engines.options_last(options) if last else options))
        for backend in backends:
            with tilewise.using(backend=backend, tf32=variant == TF32):
                found[f"{backend} {variant}".strip()] = kernels_of(torch, call)
        gpu_peers.allow_tf32(torch, variant == TF32)
        found[f"{TORCH} {variant}".strip()] = kernels_of(torch, peers[engines.TORCH_LAST if last else engines.TORCH])
        gpu_peers.allow_tf32(torch, False)
    return found


def kernels_of(torch, call: Callable) -> dict[str, tuple[float, float]]:
    """kernel -> (launches, microseconds) of a call, the mean of a few."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    results: Any = profiler.profiler
    events = results.kineto_results.events()
    return summed((e.name(), e.duration_ns()) for e in events if "CUDA" in str(e.device_type()))


def summed(events: Iterable[tuple[str, int]]) -> dict[str, tuple[float, float]]:
    """events: (name, nanoseconds) of CALLS calls."""
    found: dict[str, tuple[float, float]] = {}
    for name, nanoseconds in events:
        if not _OF_THE_HOST.match(name):
            launches, micros = found.get(name[:_LONGEST], (0.0, 0.0))
            found[name[:_LONGEST]] = launches + 1 / CALLS, micros + nanoseconds / 1e3 / CALLS
    return {name: (round(n, 2), round(us, 2)) for name, (n, us) in found.items()}


def _show(record: dict):
    print(f"{record['key']} {record['shape']} {record['dtype']}")
    for measurement, kernels in record.items():
        if isinstance(kernels, dict):
            parts = sorted(kernels.items(), key=lambda kernel: -kernel[1][1])
            told = "; ".join(f"{us:.1f} {name.partition('(')[0][-60:]}" for name, (_, us) in parts)
            print(f"  {measurement:12} {sum(us for _, (_, us) in parts):9.1f} us: {told[:200]}", flush=True)


def save(folder: Path, result: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{gpu_peers.slug(result['device'])}.json"
    path.write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
