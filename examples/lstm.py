"""LSTMs read digits and draw them: a sequence to a vector, and a vector to a sequence.

    python examples/lstm.py [--epochs 20] [--seed 0] [--out lstm.png] [--quiet]

scikit-learn's digits, 8x8, as sequences of eight rows. The reader takes a digit row by row and says at the end which
one it was. The drawer goes the other way: it gets a digit's name once for each step, and draws row after row. For it
a label has many pictures, so the best that it can do is draw the mean of each digit.
"""

import common
import numpy as np

from tilewise import nn

HIDDEN = 64


def reader(rng: np.random.Generator) -> nn.Sequential:
    """(N, 8 rows, 8 pixels) to logits (N, 10): what the LSTM knows after the last row."""
    return nn.Sequential(nn.LSTM(8, HIDDEN, batch_first=True, returns="last", rng=rng), nn.Linear(HIDDEN, 10, rng=rng))


def drawer(rng: np.random.Generator) -> nn.Sequential:
    """A digit's name (N, 10), one-hot, to rows (N, 8, 8)."""
    return nn.Sequential(
        nn.Repeat(8, batch_first=True),
        nn.LSTM(10, HIDDEN, batch_first=True, returns="sequence", rng=rng),
        nn.Linear(HIDDEN, 8, rng=rng),
    )


def distance_to_means(drawn: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """The share of the variance between the mean digits that the drawn ones (10, 8, 8) miss: none is 0, a blur 1."""
    means = np.stack([x[y == digit].mean(0) for digit in range(10)])
    return float(((drawn - means) ** 2).sum() / ((means - means.mean(0)) ** 2).sum())


def main(arguments: list[str] | None = None) -> dict[str, float]:
    options = common.Arguments(__doc__, "lstm.png", epochs=20, needs=("sklearn",)).parse(arguments)
    rng = np.random.default_rng(options.seed)
    images, labels = common.digits()  # (N, 1, 8, 8), of which (N, 8, 8) are rows of pixels: steps of features
    (x, y), test = nn.split(images[:, 0], labels, (0.8, 0.2), rng=rng)
    reads, draws = reader(rng), drawer(rng)
    settings = {"epochs": options.epochs, "rng": rng, "progress": not options.quiet}

    history = nn.fit(
        reads, nn.CrossEntropyLoss(), nn.Adam(reads.parameters(), lr=0.005), x, y,
        validation=test, **settings,
    )  # fmt: skip
    names = nn.one_hot(y)
    nn.fit(draws, nn.MSELoss(), nn.Adam(draws.parameters(), lr=0.005), names, x, **settings)
    drawn = nn.predict(draws, np.eye(10, dtype=np.float32))
    results = {"accuracy": history.val_accuracy[-1], "missed": distance_to_means(drawn, x, y)}
    print(f"reading: {results['accuracy']:.2%} of {len(test[0])} digits that were not trained on")
    print(f"drawing: {results['missed']:.1%} of what tells the mean digits from each other is missed")

    figure, (accuracy, picture) = common.panels(2)
    common.curves(accuracy, {"training": history.accuracy, "test": history.val_accuracy}, "accuracy of the reader")
    picture.imshow(common.mosaic(drawn, columns=5), cmap="gray")
    picture.set(xticks=[], yticks=[], title="drawn from 0, 1, ..., 9")
    figure.savefig(options.out)
    print(f"the accuracy and the drawn digits are in {options.out}")
    return results


if __name__ == "__main__":
    main()
