"""A dense network on scikit-learn's 1,797 handwritten digits: the first network for images, without a convolution.

    python examples/digits_dense.py [--epochs 12] [--seed 0] [--out digits_dense.png] [--quiet]

Flatten, a dense layer of 512 with ReLU, a dense layer of 10 with softmax (which is part of the loss), Adam, batches of
256, a quarter of the digits held out for validation, 12 epochs, and a plot of loss and accuracy on both parts.
examples/digits.py does it with convolutions; examples/mnist.py on the user's MNIST.
"""

import common
import numpy as np

from tilewise import nn


def network(rng: np.random.Generator) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(8 * 8, 512, rng=rng), nn.ReLU(), nn.Linear(512, 10, rng=rng))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    options = common.Arguments(__doc__, "digits_dense.png", epochs=12, needs=("sklearn",)).parse(arguments)
    rng = np.random.default_rng(options.seed)
    training, validation = common.digits(rng, held_out=1 / 4)
    model = network(rng)
    print(nn.summary(model, (1, 1, 8, 8)))
    history = nn.fit(
        model, nn.CrossEntropyLoss(), nn.Adam(model.parameters(), lr=2e-3), *training,
        epochs=options.epochs, batch_size=256, validation=validation, rng=rng, progress=not options.quiet,
    )  # fmt: skip
    history.plot(options.out)
    print(
        f"after {len(history)} epochs: accuracy {history.accuracy[-1]:.2%} in training, "
        f"{history.val_accuracy[-1]:.2%} on {len(validation[0])} digits held out"
    )
    print(f"the history is drawn in {options.out}")
    return {"accuracy": history.accuracy[-1], "val_accuracy": history.val_accuracy[-1]}


if __name__ == "__main__":
    main()
