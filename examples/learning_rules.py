"""Two rules older than backpropagation: the perceptron's delta rule, and Hebb's.

    python examples/learning_rules.py [--seed 0] [--out learning_rules.png]

A neuron gives step(w x + b). The delta rule changes it by its error, w += rate (target - y) x, until all is right,
which comes to pass wherever a line separates the classes (Rosenblatt 1958). Hebb's rule knows no error: w += target x,
once for each sample, with -1 and 1 for false and true (Hebb 1949); it strengthens what is active together.

Both learn AND and OR, and neither XOR, which no line separates. "a, or b and c" has a separating plane: the delta rule
finds it, Hebb's rule does not.
"""

import itertools

import common
import numpy as np

from tilewise import nn

FUNCTIONS = {
    "AND": (2, lambda a, b: a & b),
    "OR": (2, lambda a, b: a | b),
    "XOR": (2, lambda a, b: a ^ b),
    "a, or b and c": (3, lambda a, b, c: a | b & c),
}
RATE = 0.5


def samples(inputs: int, function) -> tuple[np.ndarray, np.ndarray]:
    """All combinations of 0 and 1, and the function's values (N, 1)."""
    x = np.array(list(itertools.product((0, 1), repeat=inputs)))
    return x.astype(np.float32), np.array([[function(*row)] for row in x], np.float32)


def neuron(inputs: int, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 1, init="zeros"), activation)


def delta_rule(model: nn.Sequential, x: np.ndarray, y: np.ndarray, rng: np.random.Generator, epochs: int = 50):
    """Changes the neuron by its errors, sample by sample; returns the number of errors in each epoch."""
    line, errors = model[0], []
    for _ in range(epochs):
        errors.append(0)
        for i in rng.permutation(len(x)):
            error = y[i] - model(x[i])
            line.weight.data += RATE * error * x[i]
            line.bias.data += RATE * error
            errors[-1] += int(error.any())
        if not errors[-1]:
            break
    return errors


def hebbian_rule(model: nn.Sequential, x: np.ndarray, y: np.ndarray):
    """What is active together is connected more strongly: each sample adds target * x. x and y are -1 and 1."""
    for sample, target in zip(x, y, strict=True):
        model[0].weight.data += target * sample
        model[0].bias.data += target


def main(arguments: list[str] | None = None) -> dict[str, tuple[float, float]]:
    options = common.Arguments(__doc__, "learning_rules.png").parse(arguments)
    rng = np.random.default_rng(options.seed)
    results, errors = {}, {}
    for name, (inputs, function) in FUNCTIONS.items():
        x, y = samples(inputs, function)
        delta, hebb = neuron(inputs, nn.Step()), neuron(inputs, nn.Sign())
        errors[name] = delta_rule(delta, x, y, rng)
        hebbian_rule(hebb, 2 * x - 1, 2 * y - 1)
        results[name] = (float((delta(x) == y).mean()), float((hebb(2 * x - 1) == 2 * y - 1).mean()))
        print(f"{name}: {results[name][0]:.0%} right by the delta rule, {results[name][1]:.0%} by Hebb's")

    figure, (axes,) = common.panels()
    common.curves(axes, errors, "wrong answers of the delta rule")
    figure.savefig(options.out)
    print(f"the delta rule's errors are drawn in {options.out}")
    return results


if __name__ == "__main__":
    main()
