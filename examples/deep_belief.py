"""A deep belief network: restricted Boltzmann machines, stacked, learn digits without labels; then labels are added.

    python examples/deep_belief.py [--epochs 30] [--labels 100] [--seed 0] [--out deep_belief.png]

A restricted Boltzmann machine is two layers of units that are 0 or 1, each unit with p = sigmoid(weights * the other
layer + bias). Contrastive divergence (Hinton 2002) makes it prefer the data v to what it dreams of v, one step away:
v -> h -> v' -> h', weight += rate (h v^T - h' v'^T). The next machine learns on the hidden layer of the one before
(Hinton, Osindero and Teh 2006). Their weights are the initial values of a deep sigmoid network, which is trained on a
few labelled digits only: the same network with Xavier's initial values does not get there.
"""

from itertools import pairwise

import common
import numpy as np

from tilewise import linear, matmul, nn, sigmoid

SIZES = (64, 128, 128, 128)  # pixels, and three hidden layers


class RestrictedBoltzmannMachine:
    """weight (hidden, visible) as a dense layer has it, and a bias for the units of either layer."""

    def __init__(self, visible: int, hidden: int, rng: np.random.Generator):
        self.weight = nn.Parameter(nn.init.normal((hidden, visible), rng, std=0.05))
        self.hidden_bias = nn.Parameter(np.zeros(hidden, np.float32))
        self.visible_bias = nn.Parameter(np.zeros(visible, np.float32))
        self.rng = rng
        self.optimizer = nn.SGD([self.weight, self.hidden_bias, self.visible_bias], lr=0.05, momentum=0.9)

    def hidden(self, v: np.ndarray) -> np.ndarray:
        """The probabilities of the hidden units, given the visible ones."""
        return sigmoid(linear(v, self.weight.data, self.hidden_bias.data))

    def visible(self, h: np.ndarray) -> np.ndarray:
        return sigmoid(linear(h, self.weight.data.T, self.visible_bias.data))

    def step(self, v: np.ndarray) -> float:
        """One step of contrastive divergence on v (N, visible); returns the mean squared error of the dream."""
        h = self.hidden(v)
        states = (self.rng.random(h.shape) < h).astype(v.dtype)
        v_dream = self.visible(states)
        h_dream = self.hidden(v_dream)
        self.weight.grad = (matmul(h_dream.T, v_dream) - matmul(h.T, v)) / np.float32(len(v))
        self.hidden_bias.grad = (h_dream - h).mean(0)
        self.visible_bias.grad = (v_dream - v).mean(0)
        self.optimizer.step()
        return float(((v - v_dream) ** 2).mean())

    def fit(self, v: np.ndarray, epochs: int, batch_size: int = 32) -> list[float]:
        """The error in each epoch."""
        errors = []
        for _ in range(epochs):
            batches = np.array_split(self.rng.permutation(len(v)), len(v) // batch_size)
            errors.append(float(np.mean([self.step(v[batch]) for batch in batches])))
        return errors


def pretrained(x: np.ndarray, epochs: int, rng: np.random.Generator):
    """(the machines, each trained on the hidden layer of the one before, and their errors)"""
    machines, errors = [], []
    for visible, hidden in pairwise(SIZES):
        machine = RestrictedBoltzmannMachine(visible, hidden, rng)
        errors.append(machine.fit(x, epochs))
        machines.append(machine)
        x = machine.hidden(x)
    return machines, errors


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = common.Arguments(__doc__, "deep_belief.png", epochs=30, needs=("sklearn",))
    parser.add_argument("--labels", type=parser.at_least(1), default=100, help="how many are known (default 100)")
    options = parser.parse(arguments)
    rng = np.random.default_rng(options.seed)
    images, digits = common.digits()
    (x, y), test = nn.split(images.reshape(len(images), -1), digits, (0.8, 0.2), rng=rng)
    machines, errors = pretrained(x, options.epochs, rng)

    histories = {}
    for name in ("Xavier's initial values", "deep belief network"):
        model = nn.models.mlp((*SIZES, 10), activation="sigmoid", init="xavier_normal", rng=options.seed)
        if name == "deep belief network":
            for layer, machine in zip((m for m in model if isinstance(m, nn.Linear)), machines, strict=False):
                layer.load_state_dict({"weight": machine.weight.data, "bias": machine.hidden_bias.data})
        histories[name] = nn.fit(
            model, nn.CrossEntropyLoss(), nn.SGD(model.parameters(), lr=0.1, momentum=0.9),
            x[: options.labels], y[: options.labels], validation=test, epochs=2 * options.epochs,
            rng=options.seed, progress=not options.quiet,
        )  # fmt: skip
        print(f"{name}, {options.labels} labels: test accuracy {histories[name].val_accuracy[-1]:.1%}")

    figure, (dreams, features, accuracy) = common.panels(3)
    common.curves(dreams, {f"machine {i + 1}": e for i, e in enumerate(errors)}, "squared error of the dream")
    features.imshow(common.mosaic(machines[0].weight.data[:64].reshape(-1, 8, 8), columns=8), cmap="gray")
    features.set(xticks=[], yticks=[], title="weights of 64 hidden units")
    common.curves(accuracy, {name: history.val_accuracy for name, history in histories.items()}, "test accuracy")
    figure.savefig(options.out)
    print(f"errors, weights and accuracies are drawn in {options.out}")
    ordinary, deep = (history.val_accuracy[-1] for history in histories.values())
    return {"first_error": errors[0][0], "last_error": errors[0][-1], "ordinary": ordinary, "pretrained": deep}


if __name__ == "__main__":
    main()
