"""Train a LeNet-5 on scikit-learn's 1,797 handwritten digits, and plot the history.

    python examples/digits.py [--epochs 25] [--seed 0] [--out digits.png] [--quiet]

The digits are real (Alpaydin and Kaynak 1998, UCI), 8x8 pixels with 17 grey levels. They are enlarged to LeNet-5's
32x32, and a fifth of them, chosen by the seed, is held out for the test. The rest is trained on by mini-batches with
Adam, each digit shifted anew in every epoch by up to two pixels, half a pixel of the scan; the learning rate falls to a
tenth, in equal steps. The same seed gives the same weights on the same machine. Needs the extras train and plot:
pip install "tilewise[train,plot]".
"""

import sys
import time
from typing import NamedTuple

import common
import numpy as np

from tilewise import nn

BATCH_SIZE = 32
LEARNING_RATE = 2e-3  # at first


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


def load_data(rng: np.random.Generator):
    """[(x, y) to train on, (x, y) to test with]; x (N, 1, 32, 32), of mean 0 and variance 1 in training."""
    images, digits = common.digits()
    (x, y), (x_test, y_test) = nn.split(enlarged(images[:, 0])[:, None], digits, (0.8, 0.2), rng=rng)
    mean, std = x.mean(), x.std()
    return [(((part - mean) / std).astype(np.float32), labels) for part, labels in ((x, y), (x_test, y_test))]


def train(epochs: int, seed: int, progress: bool) -> Result:
    rng = np.random.default_rng(seed)
    training, test = load_data(rng)
    model = nn.models.lenet5(init="he_normal", dropout=0.5, rng=rng)
    loss, optimizer = nn.CrossEntropyLoss(), nn.Adam(model.parameters(), LEARNING_RATE)

    # The test digits are looked at after each epoch, for the plot; nothing is chosen by them.
    begin = time.perf_counter()
    compile_kernels(training, test, progress)
    compiled = time.perf_counter()
    history = nn.fit(
        model, loss, optimizer, *training,
        epochs=epochs, batch_size=BATCH_SIZE, validation=test, augment=nn.augment.Shift(2),
        after_epoch=nn.DecadeLR(optimizer, n=epochs), rng=rng, progress=progress,
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


def main(arguments: list[str] | None = None) -> Result:
    options = common.Arguments(__doc__, "digits.png", epochs=25, needs=("sklearn",)).parse(arguments)
    result = train(options.epochs, options.seed, not options.quiet)
    result.history.plot(options.out)
    print(f"test accuracy {result.accuracy:.2%} on {result.tested} digits that were not trained on")
    print(f"{options.epochs} epochs in {result.seconds:.1f} s, after {result.compile_seconds:.1f} s for the kernels")
    print(f"the history is drawn in {options.out}")
    return result


if __name__ == "__main__":
    main()
