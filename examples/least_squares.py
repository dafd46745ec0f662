"""Least squares: the line through four students' hours of study and marks, solved and found by gradient descent.

    python examples/least_squares.py [--epochs 2000] [--out least_squares.png]

The line y = a x + b of least mean squared error has a formula. A dense layer of one input and one output is the same
line, and gradient descent on the mean squared error, all four students at once, arrives at the same a and b.
"""

import common
import numpy as np

from tilewise import nn

HOURS = np.array([[2], [4], [6], [8]], np.float32)
MARKS = np.array([[81], [93], [91], [97]], np.float32)


def solved(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(slope, intercept): the covariance of x and y over the variance of x; the line goes through the means."""
    slope = float(np.cov(x.ravel(), y.ravel(), ddof=0)[0, 1] / np.var(x))
    return slope, float(y.mean()) - slope * float(x.mean())


def descended(x: np.ndarray, y: np.ndarray, options) -> tuple[float, float, list[float]]:
    """(slope, intercept, the loss in each epoch)

    The learning rate must be below 2 / the largest curvature, 61.7 here; and momentum helps along the other
    direction, whose curvature is 185 times smaller.
    """
    line = nn.Linear(1, 1, rng=options.seed)
    optimizer = nn.SGD(line.parameters(), lr=0.02, momentum=0.9)
    history = nn.fit(
        line, nn.MSELoss(), optimizer, x, y, epochs=options.epochs, batch_size=len(x), progress=not options.quiet
    )
    assert line.bias is not None
    return line.weight.data.item(), line.bias.data.item(), history.loss


def errors(slope: float, intercept: float) -> tuple[float, float]:
    """(mean squared error, its root) of a line."""
    prediction = np.float32(slope) * HOURS + np.float32(intercept)
    return float(nn.MSELoss()(prediction, MARKS)), float(nn.RMSELoss()(prediction, MARKS))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    options = common.Arguments(__doc__, "least_squares.png", epochs=2000).parse(arguments)
    slope, intercept, losses = descended(HOURS, MARKS, options)
    lines = {"solved": solved(HOURS, MARKS), "gradient descent": (slope, intercept), "a guess": (3.0, 76.0)}

    figure, (points, descent) = common.panels(2)
    points.plot(HOURS, MARKS, "ko", label="students")
    for name, (a, b) in lines.items():
        mse, rmse = errors(a, b)
        marks = ", ".join(f"{mark:.1f}" for mark in (a * HOURS + b).ravel())
        print(f"{name}: y = {a:.4f} x + {b:.4f}, marks {marks}; MSE {mse:.4f}, RMSE {rmse:.4f}")
        style = "--" if name == "gradient descent" else "-"  # it hides what lies below it otherwise
        points.plot(HOURS, a * HOURS + b, style, label=f"{name}: {a:.2f} x + {b:.1f}")
    points.set(xlabel="hours of study", ylabel="marks")
    points.legend()
    common.curves(descent, {"gradient descent": losses}, "mean squared error")
    descent.set(xscale="log", yscale="log")
    figure.savefig(options.out)
    print(f"the lines and the descent are drawn in {options.out}")
    return {"slope": slope, "intercept": intercept, "loss": losses[-1]}


if __name__ == "__main__":
    main()
