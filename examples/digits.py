"""Train a LeNet-5 on scikit-learn's 1,797 handwritten digits, and plot the history.

    python examples/digits.py [--epochs 5] [--seed 0] [--out digits.png] [--quiet]

The digits are real (Alpaydin and Kaynak 1998, UCI), 8x8 pixels with 17 grey levels. They are enlarged to LeNet-5's
32x32, and a fifth of them, chosen by the seed, is held out for the test. The rest is trained on by mini-batches with
Adam, each digit in five places: as it is, and shifted by two pixels to each side. The same seed gives the same weights
on the same machine. Needs the extras train and plot: pip install "tilewise[train,plot]".
"""

import argparse
import importlib
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tilewise import nn

NEEDED = {"sklearn": ("scikit-learn", "train"), "matplotlib": ("matplotlib", "plot")}  # module -> distribution, extra
BATCH_SIZE = 32
LEARNING_RATE = 2e-3  # at first
SHIFTS = ((0, 0), (-2, 0), (2, 0), (0, -2), (0, 2))  # (down, right); two of 32 pixels are half a pixel of the scan


class Result(NamedTuple):
    accuracy: float  # on the test digits
    tested: int
    seconds: float  # of training, with validation after each epoch
    compile_seconds: float  # before that, for the kernels; short where they were in the cache
    history: nn.History
    model: nn.Sequential


def enlarged(images: np.ndarray, size: int = 32) -> np.ndarray:
    """(N, H, W) by bilinear interpolation to (N, size, size); pixel centres keep their places, edges are continued."""

    def weights(n: int) -> np.ndarray:
        """(size, n): row i says which pixels the new pixel i is made of."""
        places = (np.arange(size) + 0.5) * n / size - 0.5
        return np.stack([np.interp(places, np.arange(n), column) for column in np.eye(n)], axis=1)

    rows, columns = weights(images.shape[1]), weights(images.shape[2])
    return rows @ images @ columns.T


def shifted(x: np.ndarray, down: int, right: int) -> np.ndarray:
    """The images (N, 1, H, W) moved by some pixels; their edge pixels are repeated."""
    rows = np.clip(np.arange(x.shape[2]) - down, 0, x.shape[2] - 1)
    columns = np.clip(np.arange(x.shape[3]) - right, 0, x.shape[3] - 1)
    return x[:, :, rows[:, None], columns]


def load_data(rng: np.random.Generator):
    """((x, y) to train on, (x, y) to test with); x (N, 1, 32, 32) float32 of mean 0 and variance 1, y the digits.

    The split comes first: no test digit, shifted or not, is trained on.
    """
    from sklearn.datasets import load_digits

    scans, y = (np.asarray(array) for array in load_digits(return_X_y=True))
    x = enlarged(scans.reshape(-1, 8, 8))[:, None]
    order = rng.permutation(len(x))
    test, train = np.split(order, [len(x) // 5 + 1])
    x = (x - x[train].mean()) / x[train].std()
    x = x.astype(np.float32)
    augmented = np.concatenate([shifted(x[train], *shift) for shift in SHIFTS])
    return (augmented, np.tile(y[train], len(SHIFTS))), (x[test], y[test])


def train(epochs: int, seed: int, progress: bool) -> Result:
    rng = np.random.default_rng(seed)
    training, test = load_data(rng)
    model = nn.models.lenet5(init="he_normal", dropout=0.5, rng=rng)
    loss, optimizer = nn.CrossEntropyLoss(), nn.Adam(model.parameters(), LEARNING_RATE)

    def lower_rate(history: nn.History):
        """eta0 * 10**(-t/n): large steps first, fine ones in the end."""
        optimizer.lr = LEARNING_RATE * 10 ** (-len(history) / epochs)

    # The test digits are looked at after each epoch, for the plot; nothing is chosen by them.
    begin = time.perf_counter()
    compile_kernels(training, test, progress)
    compiled = time.perf_counter()
    history = nn.fit(
        model, loss, optimizer, *training,
        epochs=epochs, batch_size=BATCH_SIZE, validation=test, after_epoch=lower_rate, rng=rng, progress=progress,
    )  # fmt: skip
    seconds = time.perf_counter() - compiled
    accuracy = nn.evaluate(model, loss, *test).accuracy
    assert accuracy is not None
    return Result(accuracy, len(test[0]), seconds, compiled - begin, history, model)


def compile_kernels(training: tuple, test: tuple, progress: bool):
    """An epoch over two batches, with a network that is thrown away, so that no compilation is in the times.

    The second batch is as small as the last one of an epoch: small problems take kernels of their own.
    """
    if progress:
        print("compiling the kernels; the second run finds them in the cache", file=sys.stderr)
    x, y = (array[: BATCH_SIZE + len(array) % BATCH_SIZE] for array in training)
    model = nn.models.lenet5(rng=0)
    optimizer = nn.Adam(model.parameters())
    nn.fit(
        model, nn.CrossEntropyLoss(), optimizer, x, y, epochs=1, batch_size=BATCH_SIZE, validation=test, progress=False
    )  # fmt: skip


def missing_extras() -> str | None:
    """What to install, if anything."""
    missing = []
    for module, needed in NEEDED.items():
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(needed)
    if not missing:
        return None
    names, extras = zip(*missing, strict=True)
    return f'{" and ".join(names)} not installed: pip install "tilewise[{",".join(extras)}]"'


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a LeNet-5 on scikit-learn's handwritten digits.")
    parser.add_argument("--epochs", type=int, default=5, help="how often every digit is seen (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the order (default 0)")
    parser.add_argument("--out", type=Path, default=Path("digits.png"), help="the plot (default digits.png)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {options.epochs}")
    if options.seed < 0:
        parser.error(f"--seed must not be negative, got {options.seed}")
    if not options.out.parent.is_dir():
        parser.error(f"--out: there is no folder {options.out.parent}")
    if problem := missing_extras():
        print(f"digits: {problem}", file=sys.stderr)
        return 1
    result = train(options.epochs, options.seed, not options.quiet)
    result.history.plot(options.out)
    print(f"test accuracy {result.accuracy:.2%} on {result.tested} digits that were not trained on")
    print(f"{options.epochs} epochs in {result.seconds:.1f} s, after {result.compile_seconds:.1f} s for the kernels")
    print(f"the history is drawn in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
