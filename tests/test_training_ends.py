"""How training ends before its last epoch: early stopping, a loss that is not finite, targets that are wrong."""

import math

import numpy as np
import pytest

from tilewise import nn

RNG = np.random.default_rng(3)
X = RNG.standard_normal((40, 4)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)


def network(*between: nn.Module, seed: int = 0) -> nn.Sequential:
    rng = np.random.default_rng(seed)
    hidden = nn.Linear(4, 6, rng=rng), nn.BatchNorm1d(6), nn.Dropout(0.3, rng=rng)
    return nn.Sequential(*hidden, *between, nn.Linear(6, 2, rng=rng))


def train(model: nn.Module, x=X, y=Y, loss: nn.Loss | None = None, lr: float = 0.1, **options) -> nn.History:
    defaults = {"epochs": 8, "batch_size": 10, "rng": 0, "progress": False}
    optimizer = options.pop("optimizer", None) or nn.SGD(model.parameters(), lr)
    return nn.fit(model, loss or nn.CrossEntropyLoss(), optimizer, x, y, **defaults | options)


class Scripted(nn.Linear):
    """A layer whose bias becomes the next number of a script after each epoch; a metric reads it (99 is NaN)."""

    def __init__(self, values: list[float]):
        super().__init__(4, 2, rng=0)
        self.values = iter(values)

    def metric(self, prediction, y):
        score = float(self.bias.data[0])
        return math.nan if score == 99 else score

    def fit(self, **options) -> nn.History:
        self.bias.data[:] = next(self.values)

        def advance(history):
            self.bias.data[:] = next(self.values, 0.0)

        return train(self, lr=0.0, metrics={"score": self.metric}, after_epoch=advance, validation=(X, Y), **options)


class TestEarlyStopping:
    @pytest.mark.parametrize(
        ("mode", "values", "epochs", "best"),
        [
            ("min", [5, 4, 3, 4, 4, 0], 5, 3),
            ("min", [5, 5, 5, 1], 3, 1),
            ("min", [5, 6, 4, 6, 3, 6, 6, 0], 7, 5),
            ("min", [99, 3, 99, 99, 1], 4, 2),
            ("max", [1, 2, 1, 2, 9], 4, 2),
            ("max", [1, 2, 3, 4, 5, 6, 7, 8], 8, 8),
        ],
    )
    def test_after_two_epochs_without_an_improvement_with_the_best_weights(self, mode, values, epochs, best):
        model, stopping = Scripted(values), nn.EarlyStopping(2, monitor="val_score", mode=mode)
        history = model.fit(early_stopping=stopping)
        assert len(history) == epochs
        assert (stopping.best_epoch, stopping.best) == (best, values[best - 1])
        assert stopping.stopped == (epochs < 8)
        assert model.bias.data[0] == values[best - 1]

    def test_min_delta(self):
        stopping = nn.EarlyStopping(2, min_delta=0.5, monitor="val_score", mode="min")
        assert len(Scripted([5, 4.5, 4.5, 0]).fit(early_stopping=stopping)) == 3  # exactly min_delta is not enough
        assert stopping.best_epoch == 1
        model = Scripted([5, 4.75, 4, 3, 2.75, 2.5])
        assert len(model.fit(early_stopping=stopping)) == 6
        assert stopping.best_epoch == 4

    def test_without_restoring(self):
        model = Scripted([3, 4, 5, 6])
        model.fit(early_stopping=nn.EarlyStopping(2, monitor="val_score", mode="min", restore_best=False))
        assert model.bias.data[0] == 6

    def test_no_finite_value_at_all_restores_nothing(self):
        model = Scripted([99] * 9)
        assert len(model.fit(early_stopping=nn.EarlyStopping(3, monitor="val_score", mode="min"))) == 3

    def test_restores_buffers_too_and_the_validation_loss_is_the_best(self):
        """A schedule that makes the steps wilder and wilder: the last epoch is not the best."""
        model = network()
        optimizer = nn.SGD(model.parameters(), 0.1)
        states = []

        def keep(history):
            states.append(model.state_dict())
            optimizer.lr *= 2

        stopping = nn.EarlyStopping(3)
        history = train(
            model, optimizer=optimizer, validation=0.3, early_stopping=stopping, after_epoch=keep, epochs=50
        )  # fmt: skip
        assert stopping.stopped
        assert stopping.best_epoch == len(history) - 3 == int(np.argmin(history.val_loss)) + 1
        assert (states[-1]["1.running_mean"] != states[-4]["1.running_mean"]).any()
        np.testing.assert_equal(model.state_dict(), states[-4])

    def test_is_new_for_each_training(self):
        stopping = nn.EarlyStopping(2, monitor="val_score", mode="min")
        Scripted([1, 2, 3]).fit(early_stopping=stopping)
        assert len(Scripted([8, 7, 6, 5]).fit(early_stopping=stopping, epochs=4)) == 4
        assert stopping.best == 5

    @pytest.mark.parametrize(
        ("monitor", "mode"),
        [("val_loss", "min"), ("loss", "min"), ("val_accuracy", "max"), ("accuracy", "max")],
    )
    def test_the_mode_follows_from_the_name(self, monitor, mode):
        stopping = nn.EarlyStopping(3, monitor=monitor)
        assert stopping.mode == mode
        assert repr(stopping).startswith(f"EarlyStopping(patience=3, min_delta=0.0, monitor='{monitor}', mode='{mode}'")
        train(network(), validation=0.2, early_stopping=stopping)
        assert math.isfinite(stopping.best)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: nn.EarlyStopping(0), "patience must be at least 1, got 0"),
            (lambda: nn.EarlyStopping(min_delta=-1.0), "min_delta must be at least 0"),
            (lambda: nn.EarlyStopping(monitor="val_f1"), "mode must be .* for the monitor 'val_f1', got ''"),
            (lambda: nn.EarlyStopping(mode="up"), "mode must be .* got 'up'"),
            (
                lambda: train(network(), early_stopping=nn.EarlyStopping()),
                "early_stopping watches 'val_loss', but the history will have loss, accuracy; there is no validation",
            ),
            (
                lambda: train(network(), validation=0.5, early_stopping=nn.EarlyStopping(monitor="f", mode="max")),
                "watches 'f', but the history will have loss, accuracy, val_loss, val_accuracy$",
            ),
            (
                lambda: nn.EarlyStopping(monitor="loss").load_state_dict(nn.EarlyStopping().state_dict()),
                "EarlyStopping: the state is of val_loss, not of loss",
            ),
        ],
    )
    def test_wrong_calls(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()


class Spoiled(nn.Module):
    """The identity, which makes a number infinite on the way forward or back, in one call (from 1)."""

    def __init__(self, forward_call: int = 0, backward_call: int = 0):
        self.at = {"forward": forward_call, "backward": backward_call}
        self.scale = nn.Parameter(np.ones(1, np.float32))
        self.calls = 0

    counters = ("calls",)

    def _spoiled(self, array, direction):
        if self.calls == self.at[direction]:
            array = array.copy()
            array[1] = np.inf
        return array

    def forward(self, x):
        self.calls += self.training
        return self._spoiled(x, "forward")

    def backward(self, grad):
        return self._spoiled(grad, "backward")


class TestNotFinite:
    def stopped(self, model: nn.Module, message: str, layer: str | None, steps: int, **options):
        """The error, and that everything is as a training of so many steps leaves it."""
        optimizer = options.pop("optimizer", None) or nn.Adam(model.parameters(), 0.1)
        states = [model.state_dict()]

        def step(original=optimizer.step):
            original()
            states.append(model.state_dict())

        optimizer.step = step
        with pytest.raises(nn.NonFiniteError, match=message) as caught:
            train(model, optimizer=optimizer, **options)
        assert isinstance(caught.value, FloatingPointError)
        assert caught.value.layer == layer
        assert len(states) == steps + 1
        np.testing.assert_equal(model.state_dict(), states[-1])
        assert [m.calls for _, m in model.modules() if isinstance(m, nn.Dropout)] == [steps]
        assert "forward" not in vars(model[0])

    @pytest.mark.parametrize("call", [1, 3, 6])
    def test_names_the_first_layer_whose_output_is_not(self, call):
        """Batch norm after it gives NaN everywhere, but is not the first."""
        model = network(Spoiled(call), nn.BatchNorm1d(6), nn.ReLU())
        epoch, batch = (call - 1) // 4 + 1, (call - 1) % 4 + 1
        message = (
            rf"fit: the loss is (nan|inf) in epoch {epoch}, batch {batch}: the first output that is not finite is that "
            r"of layer 3 \(Spoiled\), called with x of shape \(10, 6\); the weights are those before this step"
        )
        self.stopped(model, message, "3", call - 1)

    def test_inside_containers_by_the_full_name(self):
        branch = nn.Sequential({"fc": nn.Linear(6, 6, rng=0), "bad": Spoiled(2)})
        model = network(nn.Sequential({"block": nn.Residual(branch)}))
        self.stopped(model, r"layer 3\.block\.main\.bad \(Spoiled\)", "3.block.main.bad", 1)

    @pytest.mark.parametrize("call", [1, 4])
    def test_names_the_first_layer_whose_gradient_is_not(self, call):
        model = network(nn.ReLU(), Spoiled(backward_call=call), nn.ReLU())
        message = (
            rf"a gradient is not finite in epoch 1, batch {call}: on the way back the first that is not finite is that "
            r"of layer 4 \(Spoiled\)"
        )
        self.stopped(model, message, "4", call - 1)

    def test_names_the_layer_of_a_parameter_whose_gradient_is_not(self):
        """What it hands back is finite, so that layers before it look well."""

        class Own(Spoiled):
            def backward(self, grad):
                self.scale.accumulate(np.full(1, np.nan, np.float32))
                return grad

        self.stopped(network(nn.ReLU(), Own(), nn.ReLU()), r"that is not finite is that of layer 4 \(Own\)", "4", 0)

    @pytest.mark.parametrize("seed", range(4))
    def test_dropout_makes_the_same_choice_when_the_layer_is_looked_for(self, seed):
        class Divided(nn.Identity):
            def forward(self, x):
                with np.errstate(divide="ignore", invalid="ignore"):
                    return x / abs(x[0, 0]) if self.training else x

        model = network(Divided(), seed=seed)
        with pytest.raises(nn.NonFiniteError, match=r"that of layer 3 \(Divided\)"):
            train(model, epochs=50, lr=1e-5)

    def test_weights_that_were_spoilt_between_two_steps(self):
        model = network()

        def spoil(history):
            model[3].weight.data[0, 0] = np.inf

        message = r"layer 3 \(Linear\), called with x of shape \(10, 6\), whose weight held such a number before"
        with pytest.raises(nn.NonFiniteError, match=message):
            train(model, after_epoch=spoil)

    def test_numbers_in_the_data(self):
        x = X.copy()
        x[25, 2] = np.nan
        self.stopped(network(), "in epoch 1, batch 3: x holds a number that is not finite", None, 2, x=x, shuffle=False)
        y = Y[:, None].repeat(2, 1).astype(np.float32)
        y[35] = np.inf
        options = {"x": X, "y": y, "loss": nn.MSELoss(), "shuffle": False}
        self.stopped(network(), "batch 4: y holds a number that is not finite", None, 3, **options)

    def test_the_loss_itself(self):
        class Overflowing(nn.MSELoss):
            def forward(self, prediction, target):
                super().forward(prediction, target)
                return math.inf

        y = Y[:, None].repeat(2, 1).astype(np.float32)
        message = "the loss is inf .* every layer's output is finite, so it was made by Overflowing itself"
        self.stopped(network(), message, None, 0, y=y, loss=Overflowing())

        class Steep(nn.MSELoss):
            def derivative(self, factors, kept):
                return super().derivative(factors, kept) * np.float32(math.inf)

        with np.errstate(invalid="ignore"):
            self.stopped(network(), "a gradient .*: it was made by Steep itself", None, 0, y=y, loss=Steep())

    def test_before_step(self):
        model = network()

        def divide():
            model[0].weight.grad[0, 0] = np.nan

        self.stopped(model, "every layer's gradient is finite, so before_step made it", None, 0, before_step=divide)

    def test_a_learning_rate_that_is_much_too_large(self):
        """What a user meets: the error comes, and the weights are finite."""
        model = nn.Sequential(nn.Linear(4, 8, rng=0), nn.ReLU(), nn.Linear(8, 2, rng=0))
        y = Y[:, None].repeat(2, 1).astype(np.float32)
        with pytest.raises(nn.NonFiniteError, match=r"layer [02] \(Linear\)"), np.errstate(all="ignore"):
            train(model, y=y, loss=nn.MSELoss(), lr=1e6, epochs=50)
        assert all(np.isfinite(value).all() for value in model.state_dict().values())

    def test_the_checkpoint_before_stays(self, tmp_path):
        model = network(Spoiled(6))
        with pytest.raises(nn.NonFiniteError):
            train(model, checkpoint=tmp_path / "run.npz")
        assert len(nn.Checkpoint(tmp_path / "run.npz").load()["history"]["loss"]) == 1


class TestStepsThatCannotBeMade:
    @pytest.mark.parametrize("spoiled", ["lr", "parameter"])
    def test_leave_everything_as_the_last_whole_step_did(self, spoiled):
        """Batch norm's statistics and dropout's calls too."""
        model = network()
        optimizer, states = nn.Adam(model.parameters(), 0.1), []

        def spoil():
            states.append(model.state_dict())
            if len(states) == 3 and spoiled == "lr":
                optimizer.lr = math.nan
            elif len(states) == 3:
                model[3].weight.data.flags.writeable = False

        message = "Adam: lr must be at least 0" if spoiled == "lr" else r"Adam: parameter 4 \(2, 6\) is read-only"
        with pytest.raises(ValueError, match=message):
            train(model, optimizer=optimizer, before_step=spoil)
        parameters = dict(model.named_parameters())
        for name, value in model.state_dict().items():
            if name in parameters:
                np.testing.assert_array_equal(value, states[2][name], err_msg=name)
        assert (model[1].num_batches_tracked, model[2].calls) == (2, 2)
        assert {state["step"] for state in optimizer.state} == {2}


class TestWrongTargets:
    @pytest.mark.parametrize("where", ["training", "validation"])
    @pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.NLLLoss])
    def test_are_found_before_the_first_step(self, loss, where):
        """Although the wrong label comes with the last batch, or after the first epoch."""
        model, wrong = network(), Y.copy()
        wrong[-1] = 2
        before = model.state_dict()
        y, validation = (wrong, None) if where == "training" else (Y, (X, wrong))
        with pytest.raises(ValueError, match=f"{loss.__name__}: classes must be from 0 to 1, got 0 to 2"):
            train(model, y=y, validation=validation, loss=loss(), shuffle=False)
        np.testing.assert_equal(model.state_dict(), before)

    def test_ignored_labels_and_probabilities_are_welcome(self):
        ignored = np.where(np.arange(40) % 3, Y, -100)
        assert len(train(network(), y=ignored, epochs=1)) == 1
        assert len(train(network(), y=nn.one_hot(Y, 2), epochs=1)) == 1

    def test_floats_are_no_classes(self):
        with pytest.raises(TypeError, match="CrossEntropyLoss: classes must be integers, got float64"):
            train(network(), y=Y.astype(float))

    def test_an_error_in_the_middle_of_an_epoch_takes_its_batch_back(self):
        """Of targets that only the batch's own check can find."""
        model, y = network(), nn.one_hot(Y, 2)
        y[-1] = 7
        states = []
        with pytest.raises(ValueError, match=r"targets must be from 0 to 1, got 0\.0 to 7\.0"):
            train(
                model, y=y, loss=nn.BCEWithLogitsLoss(), shuffle=False, epochs=1,
                before_step=lambda: states.append(model.state_dict()),
            )  # fmt: skip
        assert len(states) == 3
        assert model[1].num_batches_tracked == 3
        assert model[2].calls == 3
