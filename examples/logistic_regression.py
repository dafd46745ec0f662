"""Logistic regression: does a student pass, after so many hours of study?

    python examples/logistic_regression.py [--epochs 2000] [--out logistic_regression.png]

A dense layer gives a number, the sigmoid makes a probability of it, and the binary cross-entropy is descended. The loss
takes the number before the sigmoid (BCEWithLogitsLoss), so that it cannot overflow.
"""

import common
import numpy as np

from tilewise import nn, sigmoid

HOURS = np.arange(2, 15, 2, dtype=np.float32)[:, None]
PASSED = np.array([[0], [0], [0], [1], [1], [1], [1]])


def main(arguments: list[str] | None = None) -> dict[str, float]:
    options = common.Arguments(__doc__, "logistic_regression.png", epochs=2000).parse(arguments)
    model = nn.Linear(1, 1, rng=options.seed)
    optimizer = nn.Adam(model.parameters(), lr=0.05)
    history = nn.fit(
        model, nn.BCEWithLogitsLoss(), optimizer, HOURS, PASSED,
        epochs=options.epochs, batch_size=len(HOURS), progress=not options.quiet,
    )  # fmt: skip

    probabilities = sigmoid(nn.predict(model, HOURS))
    for hours, probability, passed in zip(HOURS[:, 0], probabilities[:, 0], PASSED[:, 0], strict=True):
        print(f"{hours:2.0f} hours: passes with probability {probability:.3f} ({'passed' if passed else 'failed'})")
    accuracy = float(((probabilities > 0.5) == PASSED).mean())
    assert model.bias is not None
    boundary = -model.bias.data.item() / model.weight.data.item()  # where the number before the sigmoid is 0
    print(f"{accuracy:.0%} right; an even chance after {boundary:.2f} hours")

    figure, (curve, descent) = common.panels(2)
    x = np.linspace(0, 16, 200, dtype=np.float32)[:, None]
    curve.plot(HOURS, PASSED, "ko", label="students")
    curve.plot(x, sigmoid(nn.predict(model, x)), label="probability")
    curve.axvline(boundary, color="gray", linestyle="--", label=f"{boundary:.2f} hours")
    curve.set(xlabel="hours of study", ylabel="passes")
    curve.legend()
    common.curves(descent, {"training": history.loss}, "binary cross-entropy")
    figure.savefig(options.out)
    print(f"the curve is drawn in {options.out}")
    return {"accuracy": accuracy, "boundary": boundary, "loss": history.loss[-1]}


if __name__ == "__main__":
    main()
