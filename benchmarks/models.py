"""Whole networks beside PyTorch (eager, both memory formats) and ONNX Runtime, in one process. `make bench-models`.

Inference is `model.eval()(x)`; a training step is forward, loss, backward and the optimiser's update on one batch.

    ratio = time of the peer (PyTorch: in whichever memory format is faster) / our time            (more is better)

The same numbers are in every engine's network, and results are compared before anything is timed; engines take turns in
blocks with a pause between (timing.py).
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tilewise import nn

from . import engines, model_peers, report, table
from .peers import pinned
from .timing import SEED, Timing, measure

RESULTS = report.RESULTS / "models"
BEGIN, END = "<!-- models:begin -->", "<!-- models:end -->"
HEADER = ("network", "work", "threads", "ours", "PyTorch", "ch.last", "ORT", "PyTorch / ours", "ORT / ours", "spread")
NOTE = (
    "ours, PyTorch, ch.last (channels_last), ORT (ONNX Runtime): best of several calls, in ms; the ratio to PyTorch is "
    "to its faster memory format; spread: interquartile range / median of our calls"
)
# Of the largest result. Rounding grows with depth, and Winograd's is larger; a wrong layer is off by far more.
TOLERANCE = 1e-3
MOVED = 0.05  # of what a step moves the loss by: some ten times the rounding of the losses
ENGINES = (engines.OURS, engines.TORCH, engines.TORCH_LAST, engines.ONNX)


@dataclass(frozen=True)
class Work:
    """Inference of a network, or a training step."""

    network: str
    build: Callable[..., nn.Module]
    shape: tuple[int, ...]
    training: bool = False

    @property
    def text(self) -> str:
        kind = "training step" if self.training else "inference"
        return f"{kind}, {'x'.join(map(str, self.shape))}"


def _lstm(rng, features: int = 64, hidden: int = 128) -> nn.Module:
    return nn.Sequential(nn.LSTM(features, hidden, returns="last", rng=rng), nn.Linear(hidden, 10, rng=rng))


def _images(batch: int, size: int = 224) -> tuple[int, ...]:
    return batch, 3, size, size


ALL = (
    Work("ResNet-18", nn.models.resnet18, _images(1)),
    Work("ResNet-18", nn.models.resnet18, _images(8)),
    Work("ResNet-50", nn.models.resnet50, _images(1)),
    Work("ResNet-50", nn.models.resnet50, _images(8)),
    Work("VGG-11", nn.models.vgg11, _images(1)),
    Work("GoogLeNet", nn.models.googlenet, _images(1)),
    Work("GoogLeNet", nn.models.googlenet, _images(8)),
    Work("MobileNetV2", nn.models.mobilenet_v2, _images(1)),
    Work("MobileNetV2", nn.models.mobilenet_v2, _images(8)),
    Work("LSTM", _lstm, (50, 32, 64)),
    Work("LSTM of 128 units", partial(_lstm, features=32), (50, 1, 32)),
    Work("LSTM of 512 units", partial(_lstm, features=256, hidden=512), (30, 64, 256)),
    Work("LSTM of 256 units", partial(_lstm, features=128, hidden=256), (200, 16, 128)),
    Work("LSTM", _lstm, (100, 32, 64), training=True),
    Work("LSTM of 256 units", partial(_lstm, features=128, hidden=256), (200, 16, 128), training=True),
    Work("LeNet-5", nn.models.lenet5, (32, 1, 32, 32), training=True),
    Work("ResNet-18", nn.models.resnet18, _images(32, 64), training=True),
)


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    chosen = [work for work in ALL if re.search(args.only, f"{work.network} {work.text}")]
    if not chosen:
        print("no network matches", file=sys.stderr)
        return 2
    records = []
    for threads in args.threads:
        with pinned(threads):
            for work in chosen:
                print(f"{work.network} {work.text}, {threads} threads ...", file=sys.stderr, flush=True)
                records.append(record(work, threads, measured(work, threads, args.seconds)))
    result = _machine() | {"command": "make bench-models", "models": records}
    table.show(list(map(row, records)), title(result), HEADER, left=2)
    print(NOTE)
    if args.json:
        path = report.result_file(result, args.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"saved as {path}")
    if args.readme:
        args.readme.write_text(fill(args.readme.read_text(encoding="utf-8"), args.json or RESULTS), encoding="utf-8")
        print(f"{args.readme}: table filled")
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tilewise.benchmarks.models", description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", default="", help='a regular expression, such as "ResNet-18 inference"')
    parser.add_argument("--seconds", type=float, default=1.0, help="for each engine and network")
    folder: dict[str, Any] = {"nargs": "?", "const": RESULTS, "metavar": "FOLDER"}
    parser.add_argument("--json", type=Path, **folder, help=f"write all times to a file there; default: {RESULTS}")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put the saved tables between its markers")
    args = parser.parse_args(argv)
    # now, not after minutes of timing
    if args.json and (args.only or args.json.is_file()):
        parser.error("--json writes a file for all networks into a folder: not with --only, nor to a file")
    if args.readme and not (args.readme.is_file() and BEGIN in args.readme.read_text(encoding="utf-8")):
        parser.error(f"--readme: there is no file {args.readme} with the line {BEGIN}")
    return args


def _machine() -> dict:
    of = report.machine()
    of["versions"] |= report.versions("torch", "onnxruntime")
    return of


def measured(work: Work, threads: int, seconds: float) -> dict[str, Timing]:
    rng = np.random.default_rng(SEED)
    model = work.build(rng=rng)
    x = rng.standard_normal(work.shape, dtype=np.float32)
    if work.training:
        calls = training_steps(model, x, rng.integers(0, 10, x.shape[0 if x.ndim == 4 else 1]))
    else:
        with_statistics(model, rng)
        calls = inference(model.eval(), x, threads)
    agree(work, calls)
    return measure(calls, seconds)


def with_statistics(model: nn.Module, rng: np.random.Generator):
    """Batch norms as after training: with means, variances, weights and biases of their own."""
    for _, module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for array, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 2.0),
                *((p.data, low, low + 0.4) for p, low in ((module.weight, 0.8), (module.bias, -0.2)) if p is not None),
            ):
                array[...] = rng.uniform(low, high, array.shape)


def inference(model: nn.Module, x: np.ndarray, threads: int) -> dict[str, Callable[[], Any]]:
    calls: dict[str, Callable[[], Any]] = {engines.OURS: partial(model, x)}
    try:
        import torch
    except ImportError:
        pass
    else:
        network = model_peers.torch_network(model).eval()
        calls[engines.TORCH] = _without_gradients(network, torch.from_numpy(x))
        if x.ndim == 4:
            last: Any = {"memory_format": torch.channels_last}
            network = model_peers.torch_network(model).eval().to(**last)
            calls[engines.TORCH_LAST] = _without_gradients(network, torch.from_numpy(x).contiguous(**last))
    if x.ndim == 4:
        try:
            calls[engines.ONNX] = model_peers.onnx_session(model, x, threads)
        except ImportError:
            print("ONNX Runtime or onnx is not installed (extra: peers)", file=sys.stderr)
    return calls


def _without_gradients(network, x) -> Callable[[], Any]:
    import torch

    def run():
        with torch.inference_mode():
            return network(x)

    return run


def training_steps(model: nn.Module, x: np.ndarray, labels: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Each call makes a step of SGD with momentum, and returns the loss before it."""
    options: Any = {"lr": 1e-3, "momentum": 0.9}
    calls: dict[str, Callable[[], Any]] = {}
    try:
        import torch
    except ImportError:
        pass
    else:
        for name, form in ((engines.TORCH, torch.contiguous_format), (engines.TORCH_LAST, torch.channels_last)):
            if x.ndim != 4 and form == torch.channels_last:
                continue  # of images only
            network = model_peers.torch_network(model).to(memory_format=form)
            images = torch.from_numpy(x).contiguous(memory_format=form)
            optimizer = torch.optim.SGD(network.parameters(), **options)
            calls[name] = partial(_torch_step, network, optimizer, images, torch.from_numpy(labels))
    loss, optimizer = nn.CrossEntropyLoss(), nn.SGD(model.parameters(), **options)

    def step():
        value = loss(model(x), labels)
        optimizer.zero_grad()
        model.backward_parameters(loss.backward())
        optimizer.step()
        return value

    return {engines.OURS: step} | calls


def _torch_step(network, optimizer, x, labels) -> float:
    import torch

    with torch.enable_grad():
        loss = torch.nn.functional.cross_entropy(network(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def agree(work: Work, calls: dict[str, Callable[[], Any]]):
    """AssertionError where results differ. Steps are made twice: the second loss is that after one update."""
    results, before = _agreeing(work, calls), {}
    if work.training:
        results, before = _agreeing(work, calls), results
    for name, loss in before.items():
        moved, moved_ours = results[name] - loss, results[engines.OURS] - before[engines.OURS]
        assert abs(moved - moved_ours) <= MOVED * abs(moved_ours), (
            f"{work.network} {work.text}: {name}'s step moves the loss by {moved:.3g}, ours by {moved_ours:.3g}"
        )


def _agreeing(work: Work, calls: dict[str, Callable[[], Any]]) -> dict[str, np.ndarray]:
    results = {name: np.asarray(call(), np.float64) for name, call in calls.items()}
    ours = results[engines.OURS]
    for name, result in results.items():
        worst = np.abs(result - ours).max() / np.abs(ours).max()
        assert worst <= TOLERANCE, f"{work.network} {work.text}: {name} is off by {worst:.3g} of the largest result"
    return results


def record(work: Work, threads: int, times: dict[str, Timing]) -> dict:
    return {
        "network": work.network,
        "work": work.text,
        "threads": threads,
        "seconds": {name: timing.best for name, timing in times.items()},
        "spread": {name: timing.spread for name, timing in times.items()},
    }


def row(of: dict) -> tuple[str, ...]:
    seconds, ours = of["seconds"], of["seconds"][engines.OURS]
    torch = min((seconds[name] for name in (engines.TORCH, engines.TORCH_LAST) if name in seconds), default=None)
    ratios = (f"{peer / ours:.2f}" if peer else "" for peer in (torch, seconds.get(engines.ONNX)))
    shown = (f"{seconds[name] * 1e3:.3g}" if name in seconds else "" for name in ENGINES)
    return (of["network"], of["work"], str(of["threads"]), *shown, *ratios, f"{of['spread'][engines.OURS]:.0%}")


def title(result: dict) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return f"{result['device']} ({result['cores']} cores), {versions}, {result['date']}"


def fill(page: str, folder: Path) -> str:
    """The page with a table for each saved result between the markers: the rows of the most threads."""
    parts = []
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        most = max(record["threads"] for record in result["models"])
        rows = [row(record) for record in result["models"] if record["threads"] == most]
        parts += [f"{title(result)}; printed by `{result['command']}`. {NOTE}.", table.markdown(rows, HEADER, left=2)]
    return report.between(page, BEGIN, END, "\n\n".join(parts), "page")


if __name__ == "__main__":
    sys.exit(main())
