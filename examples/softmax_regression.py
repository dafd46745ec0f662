"""Softmax regression: several classes with one dense layer; your CSV of animals, or scikit-learn's wines.

    python examples/softmax_regression.py [--csv zoo.csv] [--epochs 300] [--out softmax_regression.png]

A row of the CSV is an animal: 16 features (hair, feathers, eggs, ..., legs, ...) and its kind in the last column, one
of 7. A heading, lines that begin with #, and a first column of names are passed over. Without a file, the 178 wines
of three vineyards with 13 measurements each are classified. The labels are one-hot, as the loss
-sum_k target_k log softmax(x)_k has them; a fifth of the rows is held out.
"""

import csv
from pathlib import Path
from typing import Any

import common
import numpy as np

from tilewise import nn


def read_csv(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(features (N, F), the last column (N,) as text); ValueError names the line that does not fit."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(line for line in file if line.strip() and not line.startswith("#"))
        rows = [[cell.strip() for cell in row] for row in reader]
    if rows and not any(map(_is_number, rows[0])):
        del rows[0]  # the heading
    if not rows or len(rows[0]) < 2:
        raise ValueError(f"{path}: there are no rows of features and a class")
    first = 0 if _is_number(rows[0][0]) else 1  # a first column of names
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]) or not all(map(_is_number, row[first:-1])):
            raise ValueError(f"{path}: row {number} is not {len(rows[0]) - 1 - first} numbers and a class: {row}")
    return np.array([[float(cell) for cell in row[first:-1]] for row in rows]), np.array([row[-1] for row in rows])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def load_data(path: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """(features (N, F), classes (N,))"""
    if path is not None:
        return read_csv(path)
    from sklearn.datasets import load_wine

    data: Any = load_wine()
    return data.data, data.target_names[data.target]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = common.Arguments(__doc__, "softmax_regression.png", epochs=300, needs=("sklearn",))
    parser.add_argument("--csv", type=Path, help="rows of features and a class; without it, wines")
    options = parser.parse(arguments)
    rng = np.random.default_rng(options.seed)
    try:
        features, classes = load_data(options.csv)
        kinds, labels = np.unique(classes, return_inverse=True)
        parts = nn.split(features, labels, (0.8, 0.2), stratify=True, rng=rng)
    except (OSError, ValueError) as error:
        parser.exit(1, f"softmax_regression: {error}\n")
    (x, y), (x_test, y_test) = common.standardised(*parts)

    model = nn.Linear(x.shape[1], len(kinds), rng=rng)
    history = nn.fit(
        model, nn.CrossEntropyLoss(), nn.SGD(model.parameters(), lr=0.1), x, nn.one_hot(y, len(kinds)),
        epochs=options.epochs, validation=(x_test, y_test), rng=rng, progress=not options.quiet,
    )  # fmt: skip
    history.plot(options.out)
    predicted = nn.predict(model, x_test).argmax(1)  # softmax does not change which is largest
    print(f"{len(x)} rows of {x.shape[1]} features and {len(kinds)} kinds to train on, {len(x_test)} held out")
    for number, kind in enumerate(kinds):
        own = y_test == number
        print(f"{kind}: {(predicted[own] == number).sum()} of {own.sum()} right")
    print(f"test accuracy {history.val_accuracy[-1]:.2%}; the history is drawn in {options.out}")
    return {"loss": history.loss[-1], "accuracy": history.val_accuracy[-1]}


if __name__ == "__main__":
    main()
