"""Small trainings with everything that has state, for the tests of checkpoints."""

import numpy as np

from tilewise import nn

RNG = np.random.default_rng(7)
X = RNG.standard_normal((50, 2, 6, 6)).astype(np.float32)
Y = (X[:, 0].mean((1, 2)) > 0).astype(np.int64) + (X[:, 1, 0, 0] > 0)

OPTIMIZERS = {
    "SGD": lambda p: nn.SGD(p, 0.05),
    "momentum": lambda p: nn.SGD(p, 0.02, 0.9, weight_decay=1e-3),
    "Nesterov": lambda p: nn.SGD(p, 0.02, 0.9, nesterov=True),
    "Adagrad": lambda p: nn.Adagrad(p, 0.02),
    "RMSprop": lambda p: nn.RMSprop(p, 0.005),
    "RMSprop with momentum": lambda p: nn.RMSprop(p, 0.005, momentum=0.5),
    "Adam": lambda p: nn.Adam(p, 0.01),
    "AdamW": lambda p: nn.AdamW(p, 0.01),
}
SCHEDULES = {
    "DecadeLR": lambda o: nn.DecadeLR(o, 6),
    "StepLR": lambda o: nn.StepLR(o, 3),
    "ExponentialLR": lambda o: nn.ExponentialLR(o, 0.8),
    "CosineAnnealingLR": lambda o: nn.CosineAnnealingLR(o, 8),
    "ReduceLROnPlateau": lambda o: nn.ReduceLROnPlateau(o, factor=0.5, patience=0),
}


def network(seed: int = 0, hidden: int = 8, activation=nn.ReLU) -> nn.Sequential:
    rng = np.random.default_rng(seed)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, rng=rng),
        nn.BatchNorm2d(3),
        activation(),
        nn.Dropout(0.2, rng=rng),
        nn.Flatten(),
        nn.Linear(48, hidden, rng=rng),
        nn.Dropout(0.3, rng=rng),
        nn.Linear(hidden, 3, rng=rng),
    )


class Training:
    """A model with everything around it, all with state: batch norm, dropout, a schedule, augmentation, shuffling."""

    def __init__(self, optimizer: str = "Adam", schedule: str = "StepLR", seed: int = 0, **options):
        self.model = network(seed)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.schedule = SCHEDULES[schedule](self.optimizer)
        self.stopping = nn.EarlyStopping(patience=20)
        self.options = {"epochs": 6, "batch_size": 8, "validation": 0.2, "rng": 3} | options

    def fit(self, path=None, **options) -> nn.History:
        augment = nn.augment.Compose(nn.augment.Shift(1), nn.augment.Flip(), nn.augment.Noise(0.05))
        everything = {
            "augment": augment,
            "after_epoch": self.schedule,
            "early_stopping": self.stopping,
            "checkpoint": path,
            "before_step": interrupt_in(10**6, 1),  # the same function in all, which a checkpoint wants
            "progress": False,
            **self.options,
            **options,
        }
        x, y, loss = (everything.pop(name, usual) for name, usual in (("x", X), ("y", Y), ("loss", None)))
        return nn.fit(self.model, loss or nn.CrossEntropyLoss(), self.optimizer, x, y, **everything)


def interrupt_in(epoch: int, batch: int):
    """A before_step that is Ctrl-C in this batch (from 1) of this epoch, of five batches."""
    calls = iter(range(10**6))

    def press():
        if next(calls) + 1 == (epoch - 1) * 5 + batch:
            raise KeyboardInterrupt

    return press


def assert_same_bits(actual: Training, expected: Training):
    for name, value in expected.model.state_dict().items():
        np.testing.assert_array_equal(actual.model.state_dict()[name], value, err_msg=name, strict=True)
    for one, other in zip(
        actual.optimizer.state_dict()["state"], expected.optimizer.state_dict()["state"], strict=True
    ):
        assert set(one) == set(other)
        for key, value in other.items():
            np.testing.assert_array_equal(one[key], value, err_msg=key, strict=True)
    assert actual.optimizer.state_dict()["options"] == expected.optimizer.state_dict()["options"]
    assert actual.schedule.state_dict() == expected.schedule.state_dict()
    assert actual.stopping.best == expected.stopping.best


def without_seconds(history: nn.History) -> dict[str, list[float]]:
    return {name: values for name, values in history.as_dict().items() if name != "seconds"}
