"""Batch normalisation, on and off: a deep sigmoid network on scikit-learn's digits that learns only with it.

    python examples/batch_norm.py [--epochs 10] [--seed 0] [--out batch_norm.png] [--quiet]

Each of the five hidden layers is a dense one and a sigmoid; with batch norm between them every layer gets inputs of
mean 0 and variance 1 over the mini-batch, scaled and shifted by what it learns. Initial values, data, order and
learning rate are the same. For the test the running statistics stand in for the batch's.
"""

import common

from tilewise import nn

HIDDEN = (64,) * 5


def main(arguments: list[str] | None = None) -> dict[str, tuple[float, float]]:
    options = common.Arguments(__doc__, "batch_norm.png", epochs=10, needs=("sklearn",)).parse(arguments)
    training, test = nn.split(*common.digits(), (0.8, 0.2), rng=options.seed)
    results, losses, accuracies = {}, {}, {}
    for name, batch_norm in (("without batch norm", False), ("with batch norm", True)):
        layers = nn.models.mlp((64, *HIDDEN, 10), activation="sigmoid", batch_norm=batch_norm, rng=options.seed)
        model = nn.Sequential(nn.Flatten(), *layers)
        history = nn.fit(
            model, nn.CrossEntropyLoss(), nn.SGD(model.parameters(), lr=0.1, momentum=0.9), *training,
            epochs=options.epochs, validation=test, rng=options.seed, progress=not options.quiet,
        )  # fmt: skip
        results[name] = (history.loss[-1], history.val_accuracy[-1])
        losses[name], accuracies[name] = history.loss, history.val_accuracy
        print(f"{name}: training loss {history.loss[-1]:.3f}, test accuracy {history.val_accuracy[-1]:.2%}")

    common.draw_training(losses, accuracies, options.out)
    print(f"both histories are drawn in {options.out}")
    return results


if __name__ == "__main__":
    main()
