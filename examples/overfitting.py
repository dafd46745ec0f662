"""Overfitting, and what helps against it: dropout, L1, L2, augmentation, early stopping.

    python examples/overfitting.py [--epochs 60] [--seed 0] [--out overfitting.png] [--quiet]

500 of scikit-learn's digits under heavy noise: 60 % to train on, 20 % for validation, 20 % for the test. A network with
far more weights than samples learns its 300 digits by heart: the training loss falls to 0, and the validation loss,
after a few epochs, rises. Each remedy is used alone. Early stopping watches the validation loss, ends the training when
it has not fallen for some epochs, and brings the best epoch's weights back.
"""

from typing import Any

import common
import numpy as np

from tilewise import nn

METHODS = ("nothing", "dropout", "L1", "L2", "augmentation", "early stopping")


def load_data(rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    """(x, y) for training, validation and test, x (N, 1, 8, 8)."""
    x, y = (array[:500] for array in common.digits())
    return nn.split(nn.augment.Noise(0.7)(x, rng), y, (0.6, 0.2, 0.2), rng=rng)


def network(method: str, seed: int) -> nn.Sequential:
    dropout = 0.5 if method == "dropout" else 0.0
    return nn.Sequential(nn.Flatten(), *nn.models.mlp((64, 256, 256, 10), dropout=dropout, rng=seed))


def remedy(method: str, model: nn.Module) -> dict[str, Any]:
    """What `fit` is told besides."""
    if method == "L1":
        weights = [parameter for name, parameter in model.named_parameters() if name.endswith("weight")]
        return {"before_step": lambda: nn.l1_penalty_(weights, 5e-4)}
    if method == "augmentation":
        return {"augment": nn.augment.Compose(nn.augment.Zoom(0.9, 1.1), nn.augment.Noise(0.5))}
    if method == "early stopping":
        return {"early_stopping": nn.EarlyStopping(patience=5)}
    return {}


def main(arguments: list[str] | None = None) -> dict[str, tuple[float, float]]:
    options = common.Arguments(__doc__, "overfitting.png", epochs=60, needs=("sklearn",)).parse(arguments)
    training, validation, test = load_data(np.random.default_rng(options.seed))
    results, histories = {}, {}
    for method in METHODS:
        model, loss = network(method, options.seed), nn.CrossEntropyLoss()
        optimizer = nn.AdamW(model.parameters(), weight_decay=3.0 if method == "L2" else 0.0)
        history = histories[method] = nn.fit(
            model, loss, optimizer, *training, epochs=options.epochs, validation=validation, rng=options.seed,
            progress=not options.quiet, **remedy(method, model),
        )  # fmt: skip
        tested = nn.evaluate(model, loss, *test)
        assert tested.accuracy is not None
        results[method] = (tested.loss, tested.accuracy)
        print(
            f"{method}: {len(history)} epochs, training loss {history.loss[-1]:.3f}; "
            f"test loss {tested.loss:.3f}, test accuracy {tested.accuracy:.0%}"
        )

    figure, (left, right) = common.panels(2)
    common.curves(left, {name: history.loss for name, history in histories.items()}, "training loss")
    common.curves(right, {name: history.val_loss for name, history in histories.items()}, "validation loss")
    figure.savefig(options.out)
    print(f"the losses are drawn in {options.out}")
    return results


if __name__ == "__main__":
    main()
