"""XOR: the problem that a perceptron cannot solve, a hidden layer can, and ten sigmoid layers cannot again.

    python examples/xor.py [--epochs 2000] [--seed 0] [--out xor.png]

Three networks, trained alike by gradient descent with momentum. One hidden layer solves XOR. Of ten hidden layers those
with ReLU learn, and those with the sigmoid stay at the loss log 2 = 0.6931, the loss of "one half" for all four inputs:
the sigmoid's derivative is at most 1/4, so that going back each layer takes most of what is left of the gradient. The
picture shows the loss, and the norm of the gradient of each layer's weights before the first step.
"""

import common
import numpy as np

from tilewise import nn, sigmoid

X = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
Y = np.array([[0], [1], [1], [0]])
WIDTH = 32
DEEP = 10
NETWORKS = {"1 sigmoid layer": (1, "sigmoid"), "10 sigmoid layers": (DEEP, "sigmoid"), "10 ReLU layers": (DEEP, "relu")}
INIT = {"sigmoid": "xavier_normal", "relu": "he_normal"}  # that each activation asks for


def first_gradients(model: nn.Module) -> list[float]:
    """The norm of the gradient of each layer's weights, from the input to the output."""
    loss = nn.BCEWithLogitsLoss()
    loss(model(X), Y)
    model.backward(loss.backward())
    return [norm for name, norm in nn.gradient_norms(model).items() if name.endswith("weight")]


def main(arguments: list[str] | None = None) -> dict[str, tuple[float, float]]:
    options = common.Arguments(__doc__, "xor.png", epochs=2000).parse(arguments)
    results, losses, gradients = {}, {}, {}
    for name, (layers, activation) in NETWORKS.items():
        sizes = (2, *[WIDTH] * layers, 1)
        model = nn.models.mlp(sizes, activation=activation, init=INIT[activation], rng=options.seed)
        gradients[name] = first_gradients(model)
        history = nn.fit(
            model, nn.BCEWithLogitsLoss(), nn.SGD(model.parameters(), lr=0.05, momentum=0.9), X, Y,
            epochs=options.epochs, batch_size=len(X), rng=options.seed, progress=not options.quiet,
        )  # fmt: skip
        losses[name] = history.loss
        probabilities = sigmoid(nn.predict(model, X)).round(3)  # so that the last bits of 0.500 do not decide
        accuracy = float(((probabilities > 0.5) == Y).mean())
        results[name] = (history.loss[-1], accuracy)
        print(f"{name}: loss {history.loss[-1]:.4f}, probabilities {probabilities[:, 0]}, accuracy {accuracy:.2f}")
        first, *_, last = gradients[name]
        print(f"  the gradient's norm before the first step: {first:.1e} in the first layer, {last:.1e} in the last")

    figure, (descent, norms) = common.panels(2)
    common.curves(descent, losses, "binary cross-entropy")
    common.curves(norms, gradients, "norm of the gradient at the start", "layer, from the input")
    norms.set_yscale("log")
    figure.savefig(options.out)
    print(f"losses and gradients are drawn in {options.out}")
    return results


if __name__ == "__main__":
    main()
