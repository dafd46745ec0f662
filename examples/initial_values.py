"""Initial values: the same deep network from zeros, from small random numbers, from Xavier's and from He's.

    python examples/initial_values.py [--epochs 5] [--seed 0] [--out initial_values.png] [--quiet]

Eight hidden ReLU layers on scikit-learn's digits. With zeros all hidden units are and stay equal, and only the last
bias learns: how frequent each digit is. With a standard deviation of 0.01 the signal shrinks in every layer, and so
does the gradient. Xavier's variance 2 / (n_in + n_out) keeps both as they are in linear layers; He's 2 / n_in makes up
for ReLU's half of zeros as well. 4 / (n_in + n_out), He's for both directions, is the mode "fan_avg".
"""

from functools import partial

import common
import numpy as np

from tilewise import nn

HIDDEN = (64,) * 8
INITS = {
    "zeros": "zeros",
    "normal, 0.01": partial(nn.init.normal, std=0.01),
    "Xavier": "xavier_normal",
    "He": "he_normal",
    "He, both directions": partial(nn.init.he_normal, mode="fan_avg"),
}


def spreads(model: nn.Sequential, x: np.ndarray) -> list[float]:
    """The standard deviation of what each dense layer gives."""
    found = []
    for layer in model.eval():
        x = layer(x)
        if isinstance(layer, nn.Linear):
            found.append(float(x.std()))
    return found


def main(arguments: list[str] | None = None) -> dict[str, tuple[float, float]]:
    options = common.Arguments(__doc__, "initial_values.png", epochs=5, needs=("sklearn",)).parse(arguments)
    x, y = common.digits()
    x = x.reshape(len(x), -1)
    results, losses, signals = {}, {}, {}
    for name, init in INITS.items():
        model = nn.models.mlp((64, *HIDDEN, 10), init=init, rng=options.seed)
        signals[name] = spreads(model, x)
        history = nn.fit(
            model, nn.CrossEntropyLoss(), nn.SGD(model.parameters(), lr=0.01, momentum=0.9), x, y,
            epochs=options.epochs, validation=0.2, rng=options.seed, progress=not options.quiet,
        )  # fmt: skip
        losses[name] = history.loss
        results[name] = (history.loss[-1], history.val_accuracy[-1])
        print(f"{name}: training loss {history.loss[-1]:.4f}, validation accuracy {history.val_accuracy[-1]:.1%}")

    figure, (left, right) = common.panels(2)
    common.curves(left, losses, "training loss")
    common.curves(right, signals, "standard deviation before training", "layer, from the input")
    right.set_yscale("log")
    figure.savefig(options.out)
    print(f"losses and signals are drawn in {options.out}")
    return results


if __name__ == "__main__":
    main()
