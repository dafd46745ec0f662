"""Optimisers: the same network, from the same initial values, with every optimiser of tilewise.nn.

    python examples/optimizers.py [--epochs 10] [--seed 0] [--out optimizers.png] [--quiet]

A small dense network on scikit-learn's digits. Momentum and Nesterov have plain gradient descent's learning rate: what
they gain is theirs, for under a constant gradient a momentum of 0.9 comes to take ten steps at once. The others adapt
the step of each weight, and have the rate that their authors recommend.
"""

import common
import numpy as np

from tilewise import nn

OPTIMIZERS = {
    "SGD": lambda p: nn.SGD(p, lr=0.01),
    "momentum": lambda p: nn.SGD(p, lr=0.01, momentum=0.9),
    "Nesterov": lambda p: nn.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "AdaGrad": lambda p: nn.Adagrad(p, lr=0.01),
    "RMSProp": lambda p: nn.RMSprop(p, lr=0.001),
    "Adam": lambda p: nn.Adam(p, lr=0.001),
    "AdamW": lambda p: nn.AdamW(p, lr=0.001, weight_decay=0.01),
}


def steps_of_momentum(count: int) -> list[float]:
    """How far each of the first steps goes under a constant gradient of 1, in steps of plain descent."""
    weight = nn.Parameter(np.zeros(1, np.float64))
    optimizer = nn.SGD([weight], lr=1, momentum=0.9)
    weight.grad = np.ones(1)
    places = [0.0]
    for _ in range(count):
        optimizer.step()
        places.append(weight.data.item())
    return list(-np.diff(places))


def main(arguments: list[str] | None = None) -> dict[str, tuple[float, float]]:
    options = common.Arguments(__doc__, "optimizers.png", epochs=10, needs=("sklearn",)).parse(arguments)
    training, test = nn.split(*common.digits(), (0.8, 0.2), rng=options.seed)
    results, losses = {}, {}
    for name, optimizer in OPTIMIZERS.items():
        model = nn.Sequential(nn.Flatten(), *nn.models.mlp((64, 64, 10), rng=options.seed))
        history = nn.fit(
            model, nn.CrossEntropyLoss(), optimizer(model.parameters()), *training,
            epochs=options.epochs, rng=options.seed, progress=not options.quiet,
        )  # fmt: skip
        accuracy = nn.evaluate(model, nn.CrossEntropyLoss(), *test).accuracy
        results[name], losses[name] = (history.loss[-1], accuracy), history.loss
        print(f"{name:>8}: training loss {history.loss[-1]:.4f}, test accuracy {accuracy:.2%}")

    figure, (descent, momentum) = common.panels(2)
    common.curves(descent, losses, "training loss")
    descent.set_yscale("log")
    common.curves(momentum, {"momentum 0.9": steps_of_momentum(50)}, "step / plain descent's step", "step")
    momentum.set_title("under a constant gradient")
    figure.savefig(options.out)
    print(f"the losses are drawn in {options.out}")
    return results


if __name__ == "__main__":
    main()
