"""Transfer learning: a network that finds the digits 0 to 4 anywhere in a picture learns 5 to 9 from ten samples each.

    python examples/transfer_learning.py [--samples 10] [--epochs 100] [--seed 0] [--out transfer_learning.png]

scikit-learn's digits, each somewhere in a picture of 16x16. Of 0 to 4 there are thousands of such pictures, from which
a convolutional network learns what strokes are, and that it does not matter where they lie. Ten pictures of a digit do
not show that. So the features are frozen by name, the head is replaced by a new one for 5 to 9, and trained; then all
is unfrozen and tuned at a small learning rate. The same network from scratch has the same samples and as many epochs.
Both are tested on all the pictures of 5 to 9 that were not among the samples.
"""

from functools import partial

import common
import numpy as np

from tilewise import nn

SIZE = 16
PLACES = 10  # pictures of each digit from 0 to 4


def placed(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The images (N, 1, 8, 8), each at a random place of its picture (N, 1, SIZE, SIZE)."""
    pictures = np.zeros((len(x), 1, SIZE, SIZE), np.float32)
    for picture, image, (row, column) in zip(pictures, x, rng.integers(0, SIZE - 8 + 1, (len(x), 2)), strict=True):
        picture[:, row : row + 8, column : column + 8] = image
    return pictures


def few_of_each(y: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """The places of `count` samples of every class."""
    return np.concatenate([rng.permutation(np.flatnonzero(y == label))[:count] for label in np.unique(y)])


def network(rng: np.random.Generator) -> nn.Sequential:
    features = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, rng=rng), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, rng=rng), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * (SIZE // 4) ** 2, 64, rng=rng), nn.ReLU(),
    )  # fmt: skip
    return nn.Sequential({"features": features, "fc": nn.Linear(64, 5, rng=rng)})


def accuracy(model: nn.Module, test: tuple[np.ndarray, np.ndarray]) -> float:
    x, y = test
    return nn.accuracy(nn.predict(model, x), y)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = common.Arguments(__doc__, "transfer_learning.png", epochs=100, needs=("sklearn",))
    parser.add_argument("--samples", type=parser.at_least(1), default=10, help="of each of 5 to 9 (default 10)")
    options = parser.parse(arguments)
    rng = np.random.default_rng(options.seed)
    x, y = common.digits()
    known = y < 5
    x_known, y_known = placed(np.tile(x[known], (PLACES, 1, 1, 1)), rng), np.tile(y[known], PLACES)
    x_new, y_new = placed(x[~known], rng), y[~known] - 5
    few = few_of_each(y_new, options.samples, rng)
    test = np.delete(x_new, few, axis=0), np.delete(y_new, few)
    train = partial(nn.fit, loss=nn.CrossEntropyLoss(), rng=rng, progress=not options.quiet)
    train_few = partial(train, x=x_new[few], y=y_new[few])

    model, scratch = network(rng), network(rng)
    train(model, optimizer=nn.Adam(model.parameters(), 2e-3), x=x_known, y=y_known, epochs=2)
    train_few(scratch, optimizer=nn.Adam(scratch.parameters()), epochs=options.epochs)
    results = {"from scratch": accuracy(scratch, test)}

    model.freeze("features").fc = nn.Linear(64, 5, rng=rng)
    head_epochs = (options.epochs + 1) // 2
    train_few(model, optimizer=nn.Adam(model.fc.parameters(), 1e-2), epochs=head_epochs)
    results["new head"] = accuracy(model, test)
    model.unfreeze()
    train_few(model, optimizer=nn.Adam(model.parameters(), 5e-4), epochs=max(1, options.epochs - head_epochs))
    results["new head, then fine-tuned"] = accuracy(model, test)

    print(f"{options.samples} samples each of 5 to 9; accuracy on {len(test[0])} others:")
    figure, (axes, pictures) = common.panels(2)
    for name, share in results.items():
        print(f"{share:.1%} {name}")
        axes.bar(name.replace(", ", ",\n"), share)
    axes.set(ylabel="accuracy on 5 to 9")
    pictures.imshow(common.mosaic(x_new[few_of_each(y_new, 5, rng), 0], columns=5), cmap="gray")
    pictures.set(xticks=[], yticks=[], title="5 to 9, five of each")
    figure.savefig(options.out)
    print(f"the accuracies are drawn in {options.out}")
    return results


if __name__ == "__main__":
    main()
