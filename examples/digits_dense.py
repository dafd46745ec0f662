"""A dense network on scikit-learn's 1,797 handwritten digits: the first network for images, without a convolution.

    python examples/digits_dense.py [--epochs 12] [--seed 0] [--out digits_dense.png] [--log FOLDER]

Flatten, a dense layer of 512 with ReLU, a dense layer of 10 with softmax (which is part of the loss), Adam, batches of
256, a quarter of the digits held out for validation, 12 epochs, and a plot of loss and accuracy on both parts; with
--log also as event files: tensorboard --logdir FOLDER. examples/digits.py does it with convolutions; examples/mnist.py
on the user's MNIST.
"""

from pathlib import Path

import common
import numpy as np

from tilewise import nn


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = common.Arguments(__doc__, "digits_dense.png", epochs=12, needs=("sklearn",))
    parser.add_argument("--log", type=Path, help="a folder for TensorBoard's event files (needs the extra log)")
    options = parser.parse(arguments)
    rng = np.random.default_rng(options.seed)
    x, y = common.digits()
    model = nn.Sequential(nn.Flatten(), nn.Linear(8 * 8, 512, rng=rng), nn.ReLU(), nn.Linear(512, 10, rng=rng))
    print(nn.summary(model, (1, 1, 8, 8)))
    history = nn.fit(
        model, nn.CrossEntropyLoss(), nn.Adam(model.parameters(), lr=2e-3), x, y,
        epochs=options.epochs, batch_size=256, validation=0.25, rng=rng, progress=not options.quiet,
        after_epoch=nn.TensorBoard(options.log) if options.log else (),
    )  # fmt: skip
    history.plot(options.out)
    print(
        f"after {len(history)} epochs: accuracy {history.accuracy[-1]:.2%} in training, "
        f"{history.val_accuracy[-1]:.2%} on the quarter held out"
    )
    print(f"the history is drawn in {options.out}")
    return {"accuracy": history.accuracy[-1], "val_accuracy": history.val_accuracy[-1]}


if __name__ == "__main__":
    main()
