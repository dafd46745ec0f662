"""What a model consists of, what it costs, and how its gradients are: for looking at, not for computing with."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from .hooks import observed
from .module import Module, Parameter, changes

Output = tuple[tuple[int, ...], int, int]  # shape, bytes, FLOPs
HEADINGS = ("layer", "kind", "output", "parameters", "MFLOP", "output MB")


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """A layer: its dotted name, class, and last output; its own parameters; FLOPs and output bytes of one forward."""

    name: str
    kind: str
    output_shape: tuple[int, ...]
    parameters: int
    flops: int
    output_bytes: int

    def cells(self) -> tuple[str, ...]:
        sizes = (f"{self.parameters:,}", f"{self.flops / 1e6:,.2f}", f"{self.output_bytes / 1e6:,.3f}")
        return (self.name, self.kind, str(self.output_shape), *sizes)


@dataclass(frozen=True, slots=True)
class Summary:
    """What `summary` found. str() and print() show a table; so does rich.print, in the terminal's width.

    trained, frozen: how many parameters. state_bytes: of parameters and buffers. output_bytes: of all layers' outputs,
    about what training keeps for backward.
    """

    layers: list[LayerSummary]
    trained: int
    frozen: int
    state_bytes: int

    @property
    def parameters(self) -> int:
        return self.trained + self.frozen

    @property
    def flops(self) -> int:
        return sum(layer.flops for layer in self.layers)

    @property
    def output_bytes(self) -> int:
        return sum(layer.output_bytes for layer in self.layers)

    def totals(self) -> str:
        frozen = f" ({self.frozen:,} of them frozen)" if self.frozen else ""
        return (
            f"{self.parameters:,} parameters{frozen}, {self.state_bytes / 1e6:,.2f} MB with buffers; one forward: "
            f"{self.flops / 1e9:,.3f} GFLOP, {self.output_bytes / 1e6:,.2f} MB of outputs"
        )

    def __str__(self):
        rows = [HEADINGS, *(layer.cells() for layer in self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "-" * len(lines[0]), self.totals()])

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(caption=self.totals())
        for i, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="left" if i < 3 else "right")
        for layer in self.layers:
            table.add_row(*layer.cells())
        return table


def summary(model: Module, input_shape: Sequence[int], *, dtype: DTypeLike | None = None) -> Summary:
    """The layers of a model in the order of its names, with what one forward of x = zeros(input_shape) gives and costs.

    The forward is made in evaluation mode; the model is left as it was. FLOPs are those of dense, convolution and
    recurrent layers: of each output (recurrent: gate) 2 for every weight that it is a sum of, as a multiply-add counts
    two, and the bias's addition.

    Args:
        input_shape: x's, with the batch: (1, 3, 224, 224).
        dtype: x's; None: that of the first parameter, float32 where there is none.

    Raises:
        TypeError: model is not a Module.
        ValueError, TypeError: x does not fit the model, from the layer that refuses it.
    """
    if not isinstance(model, Module):
        raise TypeError(f"summary: model must be a Module, got {type(model).__name__}")
    parameters, modules = model.parameters(), _modules(model)
    outputs = _outputs(model, input_shape, dtype)
    layers = [
        _layer(name or "(model)", module, outputs.get(id(module), []))
        for name, module in modules
        if _own_parameters(module) or not list(module.children())
    ]
    frozen = sum(parameter.size for parameter in parameters if not parameter.requires_grad)
    trained = sum(parameter.size for parameter in parameters) - frozen
    buffers = [getattr(module, name) for _, module in modules for name in module.buffers]
    state = [parameter.data for parameter in parameters] + buffers
    return Summary(layers, trained, frozen, sum(array.nbytes for array in state))


def output_shapes(model: Module, input_shape: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """The last output's shape of every module that a forward reaches, by the module's id; as `summary`."""
    return {module: outputs[-1][0] for module, outputs in _outputs(model, input_shape, None).items()}


def gradient_norms(model: Module) -> dict[str, float]:
    """The Euclidean norm of each parameter's gradient by the parameter's name, from the input to the output.

    After one backward they show whether gradients vanish on the way to the first layers. Frozen parameters have none.

    Raises:
        RuntimeError: no parameter has a gradient.
    """
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    norms = {name: float(np.linalg.norm(g.astype(np.float64))) for name, g in grads.items() if g is not None}
    if not norms:
        raise RuntimeError("gradient_norms: no parameter has a gradient; call forward and backward first")
    return norms


def plot_gradient_norms(model: Module, path: str | Path):
    """Write a picture of `gradient_norms`, on a logarithmic axis; the ending chooses PNG, SVG or PDF.

    Raises:
        ImportError: matplotlib is not installed.
        RuntimeError: no parameter has a gradient.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plot_gradient_norms needs matplotlib: pip install "tilewise[plot]"') from error
    norms = gradient_norms(model)
    figure = Figure(figsize=(max(4.0, 1 + 0.25 * len(norms)), 4), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(norms)), list(norms.values()))
    axes.set_xticks(range(len(norms)), list(norms), rotation=90)
    axes.set(ylabel="norm of the gradient")
    if any(norms.values()):
        axes.set_yscale("log")
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=150)


def _modules(model: Module) -> list[tuple[str, Module]]:
    """Each module once, with the first of its names. By identity: a dataclass has no hash."""
    found: dict[int, tuple[str, Module]] = {}
    for name, module in model.modules():
        found.setdefault(id(module), (name, module))
    return list(found.values())


def _outputs(model: Module, input_shape: Sequence[int], dtype: DTypeLike | None) -> dict[int, list[Output]]:
    """What every module, by its id, gives in one forward of zeros."""
    if dtype is None:
        dtype = next((parameter.dtype for parameter in model.parameters()), np.dtype(np.float32))
    with _recording([module for _, module in _modules(model)]) as outputs:
        model(np.zeros(tuple(input_shape), dtype))
    return outputs


@contextmanager
def _recording(modules: list[Module]) -> Iterator[dict[int, list[Output]]]:
    """The modules' outputs, in evaluation mode; afterwards they are as they were."""
    outputs: dict[int, list[Output]] = {}
    before = [(module, vars(module).get("training")) for module in modules]

    def record(module: Module, arguments: tuple, result: Any):
        y = result[0] if isinstance(result, tuple) else result
        flops = module._flops(arguments[0], y) if arguments else 0
        outputs.setdefault(id(module), []).append((y.shape, y.nbytes, flops))

    try:
        for module in modules:
            module.training = False
        with observed(modules, ("forward",), record):
            yield outputs
    finally:
        for module, mode in before:
            vars(module).pop("training", None)
            if mode is not None:
                module.training = mode
            module.release()
        changes.note()


def _own_parameters(module: Module) -> list[Parameter]:
    return [value for value in vars(module).values() if isinstance(value, Parameter)]


def _layer(name: str, module: Module, outputs: list[Output]) -> LayerSummary:
    """A layer that forward did not reach has output shape () and costs nothing."""
    return LayerSummary(
        name,
        type(module).__name__,
        outputs[-1][0] if outputs else (),
        sum(parameter.size for parameter in _own_parameters(module)),
        sum(flops for _, _, flops in outputs),
        sum(size for _, size, _ in outputs),
    )
