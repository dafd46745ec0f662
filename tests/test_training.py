"""The training loop: that networks learn, what the history holds, reproducibility, and the calls that are wrong."""

import sys

import numpy as np
import pytest

import tilewise
from tilewise import nn

XOR_X = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
XOR_Y = np.array([0, 1, 1, 0])


def blobs(samples: int = 90, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three clouds in the plane and their numbers."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, samples)
    centres = np.array([[0, 2], [2, -1], [-2, -1]])
    return (centres[y] + 0.5 * rng.standard_normal((samples, 2))).astype(np.float32), y


def small_model(seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    rng = np.random.default_rng(seed)
    hidden = nn.Linear(2, 16, rng=rng), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout, rng=rng)
    return nn.Sequential(*hidden, nn.Linear(16, 3, rng=rng))


def train(model: nn.Module, lr: float = 0.02, seed: int = 0, loss: nn.Loss | None = None, data=None, **options):
    x, y = blobs() if data is None else data
    defaults = {"epochs": 3, "batch_size": 20, "rng": seed, "progress": False}
    loss = loss or nn.CrossEntropyLoss()
    return nn.fit(model, loss, nn.Adam(model.parameters(), lr), x, y, **(defaults | options))


class TestLearning:
    @pytest.mark.parametrize("activation", ["ReLU", "Tanh", "Sigmoid"])
    def test_mlp_learns_xor(self, activation):
        rng = np.random.default_rng(1)
        hidden = nn.Linear(2, 8, init="xavier_normal", rng=rng), getattr(nn, activation)()
        model = nn.Sequential(*hidden, nn.Linear(8, 2, init="xavier_normal", rng=rng))
        train(model, 0.05, data=(XOR_X, XOR_Y), epochs=300, batch_size=4)
        loss, accuracy = nn.evaluate(model, nn.CrossEntropyLoss(), XOR_X, XOR_Y)
        assert accuracy == 1
        assert loss < 0.05
        np.testing.assert_array_equal(nn.predict(model, XOR_X).argmax(1), XOR_Y)

    def test_one_linear_layer_cannot_learn_xor(self):
        model = nn.Linear(2, 2, rng=0)
        train(model, 0.05, data=(XOR_X, XOR_Y), epochs=300, batch_size=4)
        assert nn.evaluate(model, nn.CrossEntropyLoss(), XOR_X, XOR_Y).loss == pytest.approx(np.log(2), abs=1e-3)

    def test_zero_weights_do_not_learn_xor(self):
        """Hidden units that start equal stay equal, so that the network is no more than one unit."""
        model = nn.Sequential(nn.Linear(2, 8, init="zeros"), nn.Tanh(), nn.Linear(8, 2, init="zeros"))
        train(model, 0.05, data=(XOR_X, XOR_Y), epochs=100, batch_size=4)
        assert nn.evaluate(model, nn.CrossEntropyLoss(), XOR_X, XOR_Y).loss == pytest.approx(np.log(2), abs=1e-6)

    def test_gradient_descent_arrives_at_the_least_squares_line(self):
        """The lectures' hours and marks: y = 2.3 x + 79, predictions 83.6, 88.2, 92.8, 97.4."""
        hours, marks = np.array([[2.0], [4], [6], [8]]), np.array([[81.0], [93], [91], [97]])
        model = nn.Linear(1, 1, rng=0, dtype=np.float64)
        optimizer = nn.SGD(model.parameters(), lr=0.02, momentum=0.9)
        nn.fit(model, nn.MSELoss(), optimizer, hours, marks, epochs=1000, batch_size=4, progress=False)
        assert model.bias is not None
        np.testing.assert_allclose([model.weight.data.item(), model.bias.data.item()], [2.3, 79], rtol=1e-9)
        np.testing.assert_allclose(nn.predict(model, hours)[:, 0], [83.6, 88.2, 92.8, 97.4], rtol=1e-9)

    def test_logistic_regression_separates_those_who_pass(self):
        """The lectures' hours 2, 4, ..., 14, passed from 8 on."""
        hours = np.arange(2.0, 15, 2)[:, None]
        passed = (hours >= 8).astype(np.int64)
        model = nn.Linear(1, 1, init="zeros", dtype=np.float64)
        optimizer = nn.Adam(model.parameters(), 0.2)
        history = nn.fit(
            model, nn.BCEWithLogitsLoss(), optimizer, hours, passed, epochs=500, batch_size=7, progress=False
        )
        assert history.loss[0] == pytest.approx(np.log(2))
        assert history.loss[-1] < 0.05
        np.testing.assert_array_equal(nn.predict(nn.Sequential(model, nn.Step()), hours), passed)
        chance = nn.predict(nn.Sequential(model, nn.Sigmoid()), hours)[:, 0]
        assert chance[2] < 0.1 < 0.9 < chance[3]

    def test_three_classes_with_batch_norm_and_dropout(self):
        model = small_model(dropout=0.2)
        history = train(model, epochs=15, validation=blobs(60, seed=1))
        assert history.val_accuracy[-1] > 0.95
        assert history.val_loss[-1] < history.val_loss[0]


class TestHistory:
    def test_one_entry_for_each_epoch(self):
        x, y = blobs(60, seed=1)
        model = small_model()
        history = train(model, epochs=4, validation=(x, y))
        lists = (history.loss, history.accuracy, history.val_loss, history.val_accuracy, history.seconds)
        assert [len(values) for values in lists] == [4] * 5 == [len(history)] * 5
        assert all(type(value) is float for values in lists for value in values)
        assert (history.val_loss[-1], history.val_accuracy[-1]) == nn.evaluate(
            model, nn.CrossEntropyLoss(), x, y, batch_size=20
        )

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_is_a_mean_over_samples_also_with_a_smaller_last_batch(self, reduction):
        model, (x, y) = nn.Linear(2, 3, rng=0), blobs(50)
        history = train(model, 0.0, data=(x, y), loss=nn.CrossEntropyLoss(reduction=reduction), epochs=1, batch_size=32)
        expected = nn.evaluate(model, nn.CrossEntropyLoss(), x, y, batch_size=50)
        assert history.loss[0] == pytest.approx(expected.loss, rel=1e-5)
        assert history.accuracy[0] == pytest.approx(expected.accuracy)

    def test_accuracy_of_one_hot_targets_and_only_where_it_makes_sense(self):
        x, y = blobs()
        one_hot = np.eye(3, dtype=np.float32)[y]
        assert train(small_model(), data=(x, one_hot)).accuracy == train(small_model()).accuracy
        assert train(small_model(), data=(x, one_hot), loss=nn.MSELoss()).accuracy == []
        assert len(train(small_model(), data=(x, one_hot), loss=nn.MSELoss(), accuracy=True).accuracy) == 3
        assert train(small_model(), accuracy=False).accuracy == []
        with pytest.raises(ValueError, match=r"accuracy needs predictions \(N, classes, ...\), got shape \(20, 1\)"):
            train(nn.Linear(2, 1), data=(x, one_hot[:, :1]), loss=nn.MSELoss(), accuracy=True)

    def test_ignored_targets_count_in_neither(self):
        x, y = blobs(60)
        half, model = np.where(np.arange(60) % 2, y, -100), small_model()
        expected = nn.evaluate(model, nn.CrossEntropyLoss(), x[1::2], y[1::2])
        actual = nn.evaluate(model, nn.CrossEntropyLoss(), x, half)
        assert actual == pytest.approx(expected)
        assert 0 < actual.accuracy < 1

    def test_plot_writes_a_picture(self, tmp_path):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: plot)")
        for name, history in (
            ("both.png", train(small_model(), validation=blobs(30, seed=1))),
            ("loss.png", nn.History(loss=[3.0, 2.0])),
        ):
            history.plot(tmp_path / name)
            assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    def test_plot_without_matplotlib_names_the_extra(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match=r'matplotlib: pip install "tilewise\[plot\]"'):
            nn.History(loss=[1.0]).plot(tmp_path / "history.png")


class Recorder(nn.Module):
    """A linear layer that notes the first column of what it saw."""

    def __init__(self):
        self.linear = nn.Linear(1, 2, rng=0)
        self.seen: list[list[int]] = []

    def forward(self, x):
        self.seen.append(x[:, 0].astype(int).tolist())
        return self.linear(x)

    def backward(self, grad):
        return self.linear.backward(grad)


class TestBatches:
    def seen(self, **options) -> list[list[int]]:
        model = Recorder()
        train(model, data=(np.arange(10, dtype=np.float32)[:, None], np.arange(10) % 2), batch_size=4, **options)
        return model.seen

    def test_in_order(self):
        assert self.seen(shuffle=False, epochs=2) == 2 * [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]

    def test_shuffled_anew_each_epoch(self):
        batches = self.seen(epochs=2)
        first, second = np.concatenate(batches[:3]).tolist(), np.concatenate(batches[3:]).tolist()
        assert sorted(first) == sorted(second) == list(range(10))
        assert first != second != list(range(10)) != first

    def test_drop_last(self):
        assert [len(batch) for batch in self.seen(drop_last=True, epochs=1)] == [4, 4]

    def test_prediction_does_not_depend_on_them(self):
        model, (x, _) = small_model(), blobs()
        train(model)
        for batch_size in (1, 7, 90, 1000):
            np.testing.assert_allclose(nn.predict(model, x, batch_size=batch_size), model.eval()(x), rtol=1e-5)
            model.train()


class TestReproducibility:
    def test_same_seeds_same_bits(self):
        models = [small_model(seed, dropout=0.3) for seed in (0, 0, 1)]
        histories = [train(model, seed=4, validation=blobs(30, seed=1)) for model in models]
        assert histories[0].loss == histories[1].loss != histories[2].loss
        assert histories[0].val_loss == histories[1].val_loss
        for name, value in models[0].state_dict().items():
            np.testing.assert_array_equal(value, models[1].state_dict()[name])

    def test_the_order_depends_on_the_seed(self):
        assert train(small_model(), seed=4).loss != train(small_model(), seed=5).loss

    def test_the_number_of_threads_does_not_change_a_bit(self, rng):
        x, y = rng.standard_normal((64, 1, 32, 32)).astype(np.float32), rng.integers(0, 10, 64)
        states = []
        for threads in (1, 2, 3):
            model = nn.models.lenet5(rng=0)
            with tilewise.using(threads=threads):
                train(model, 1e-3, data=(x, y), epochs=1, batch_size=32)
            states.append(model.state_dict())
        for state in states[1:]:
            for name, value in state.items():
                np.testing.assert_array_equal(value, states[0][name])


class TestAfterEpoch:
    @pytest.mark.parametrize("kind", [bool, np.bool_])
    def test_stops_when_it_returns_true(self, kind):
        assert len(train(small_model(), epochs=9, after_epoch=lambda history: kind(len(history) == 2))) == 2

    def test_may_change_the_learning_rate(self):
        model, (x, y) = nn.Linear(2, 3, rng=0), blobs()
        optimizer = nn.SGD(model.parameters(), lr=0.1)
        rates = []

        def schedule(history):
            rates.append(optimizer.lr)
            optimizer.lr = 0.1 * 10 ** (-len(history) / 4)

        nn.fit(model, nn.CrossEntropyLoss(), optimizer, x, y, epochs=3, after_epoch=schedule, progress=False)
        np.testing.assert_allclose(rates, 0.1 * 10 ** (-np.arange(3) / 4))


def test_modes_are_as_they_were():
    model, (x, y) = small_model(), blobs()
    model.eval()
    model[0].training = True
    modes = [module.training for _, module in model.modules()]
    train(model, validation=(x, y))
    nn.evaluate(model, nn.CrossEntropyLoss(), x, y)
    nn.predict(model, x)
    assert [module.training for _, module in model.modules()] == modes
    with pytest.raises(ValueError, match="must be from 0 to 2"):
        train(model, data=(x, y + 1))
    assert [module.training for _, module in model.modules()] == modes


def test_what_evaluation_prepared_is_let_go_with_it():
    """It would be a second copy of the weights while training goes on."""
    conv = nn.Conv2d(1, 3, 3, rng=0)
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(12, 3, rng=0))
    x = np.ones((4, 1, 4, 4), np.float32)
    nn.predict(model, x)
    nn.evaluate(model, nn.CrossEntropyLoss(), x, np.zeros(4, int))
    assert (conv._prepared, model._program) == (None, None)
    nn.predict(model.eval(), x)  # which stays in evaluation mode, and keeps it
    assert None not in (conv._prepared, model._program)


def test_only_the_unfrozen_head_is_trained():
    model = small_model()
    for parameter in model[:4].parameters():
        parameter.requires_grad = False
    model[1].frozen = True
    before = model.state_dict()
    train(model)
    changed = [name for name, value in model.state_dict().items() if (value != before[name]).any()]
    assert changed == ["4.weight", "4.bias"]


class TestProgress:
    def test_bar(self, capsys):
        pytest.importorskip("tqdm", reason="tqdm is not installed (extra: train)")
        train(small_model(), progress=True)
        shown = capsys.readouterr()
        assert "epoch 3/3: 100%" in shown.err
        assert "15/15" in shown.err  # 90 samples in batches of 20, three times
        assert shown.out == ""

    def test_lines_where_tqdm_is_missing(self, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "tqdm", None)
        history = train(small_model(), progress=True, validation=blobs(30, seed=1))
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 3
        assert lines[2].startswith(
            f"epoch 3/3: loss {history.loss[2]:.4f}, accuracy {history.accuracy[2]:.4f}, val_loss"
        )

    def test_silence(self, capsys):
        train(small_model(), progress=False)
        assert capsys.readouterr() == ("", "")


X, Y = blobs()
WRONG = {
    "lengths": ({"data": (X, Y[:-1])}, ValueError, r"same length, got shapes \(90, 2\) and \(89,\)"),
    "validation": ({"validation": (X, Y[:5])}, ValueError, r"fit \(validation\): x and y must have the same length"),
    "no samples": ({"data": (X[:0], Y[:0])}, ValueError, "fit: x has no samples"),
    "list": ({"data": (X.tolist(), Y)}, TypeError, "fit: x must be a NumPy array, got list"),
    "list of targets": ({"data": (X, Y.tolist())}, TypeError, "fit: y must be a NumPy array, got list"),
    "dtype": (
        {"data": (X.astype(float), Y)},
        TypeError,
        r"x is float64 but .* 0\.weight is float32; use x\.astype",
    ),
    "epochs": ({"epochs": 0}, ValueError, "fit: epochs must be at least 1, got 0"),
    "batch size": ({"batch_size": 2.5}, TypeError, r"fit: batch_size must be an int, got 2\.5"),
    "reduction": ({"loss": nn.CrossEntropyLoss(reduction="none")}, ValueError, 'must have reduction "mean" or "sum"'),
    "loss": ({"loss": abs}, TypeError, "fit: loss must be a Loss, such as CrossEntropyLoss"),
    "no batch": ({"batch_size": 100, "drop_last": True}, ValueError, "drop_last leaves no batch of 100 out of 90"),
    "rng": ({"rng": "seed"}, TypeError, "rng must be a numpy.random.Generator"),
}


@pytest.mark.parametrize(("options", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_calls(options, error, message):
    with pytest.raises(error, match=message):
        train(small_model(), **options)


def test_wrong_models():
    with pytest.raises(TypeError, match="predict: model must be a Module, got builtin_function_or_method"):
        nn.predict(abs, X)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="evaluate: y must be a NumPy array, got NoneType"):
        nn.evaluate(small_model(), nn.CrossEntropyLoss(), X, None)  # pyright: ignore[reportArgumentType]
