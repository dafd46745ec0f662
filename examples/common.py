"""What the examples share: their command lines, and the pictures they write."""

import argparse
import importlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXTRAS = {"sklearn": ("scikit-learn", "train"), "matplotlib": ("matplotlib", "plot")}  # module -> distribution, extra


class Arguments(argparse.ArgumentParser):
    """--seed and --out, for a script that trains also --epochs and --quiet. A script may add its own.

    Args:
        description: the script's docstring.
        out: the picture's name.
        epochs: how many by default; None: there is nothing to choose.
        needs: modules of extras besides matplotlib.
    """

    def __init__(self, description: str | None, out: str, epochs: int | None = None, needs: tuple[str, ...] = ()):
        super().__init__(
            description=inspect.cleandoc(description or ""), formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.needs = ("matplotlib", *needs)
        self.add_argument("--seed", type=self.at_least(0), default=0, help="of all that is drawn (default 0)")
        self.add_argument("--out", type=Path, default=Path(out), help=f"the picture (default {out})")
        if epochs is not None:
            self.add_argument(
                "--epochs", type=self.at_least(1), default=epochs, help=f"how often all is seen (default {epochs})"
            )
            self.add_argument("--quiet", action="store_true", help="no progress bar")

    @staticmethod
    def at_least(minimum: int):
        """The type of an argument: an int from `minimum` on."""

        def integer(text: str) -> int:
            value = int(text)
            if value < minimum:
                raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
            return value

        return integer

    def parse(self, arguments: list[str] | None = None) -> argparse.Namespace:
        """The options; sys.argv's where arguments is None. Leaves the program with 1 where an extra is missing."""
        options = self.parse_args(arguments)
        if not options.out.parent.is_dir():
            self.error(f"--out: there is no folder {options.out.parent}")
        if missing := [EXTRAS[module] for module in self.needs if not _installed(module)]:
            names, extras = zip(*sorted(missing, reverse=True), strict=True)
            self.exit(1, f'{" and ".join(names)} not installed: pip install "tilewise[{",".join(extras)}]"\n')
        return options


def _installed(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits (Alpaydin and Kaynak 1998, UCI): x (N, 1, 8, 8) from 0 to 1, and y."""
    from sklearn.datasets import load_digits

    images, y = (np.asarray(array) for array in load_digits(return_X_y=True))
    return (images.reshape(-1, 1, 8, 8) / 16).astype(np.float32), y


def standardised(training: tuple, *others: tuple) -> list[tuple[np.ndarray, np.ndarray]]:
    """The parts (x, y) of the data, with each feature of mean 0 and variance 1 in training; the others scaled alike."""
    mean, std = training[0].mean(0), training[0].std(0)
    std = np.where(std == 0, 1, std)
    return [(((x - mean) / std).astype(np.float32), y) for x, y in (training, *others)]


def panels(columns: int = 1, rows: int = 1) -> tuple["Figure", np.ndarray]:
    """An empty picture, and its axes (rows * columns,), row by row; `figure.savefig(path)` writes it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * columns, 3.6 * rows), layout="constrained", dpi=120)
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def curves(axes: Any, lines: dict[str, list[float]], ylabel: str = "loss", xlabel: str = "epoch"):
    """A line for each name, over 1, 2, ..."""
    for name, values in lines.items():
        axes.plot(range(1, len(values) + 1), values, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()


def draw_training(losses: dict[str, list[float]], accuracies: dict[str, list[float]], out: Path):
    """Write the picture of several trainings: their losses, and beside them their accuracies on test samples."""
    figure, (left, right) = panels(2)
    curves(left, losses, "training loss")
    curves(right, accuracies, "test accuracy")
    figure.savefig(out)


def mosaic(images: np.ndarray, columns: int) -> np.ndarray:
    """Images (N, H, W) side by side in rows of `columns`, with a dark line of one pixel around each."""
    rows = np.pad(images, ((0, 0), (1, 1), (1, 1)), constant_values=images.min()).reshape(
        -1, columns, images.shape[1] + 2, images.shape[2] + 2
    )
    return np.vstack([np.hstack(list(row)) for row in rows])
