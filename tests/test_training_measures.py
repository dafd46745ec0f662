"""What is measured and on which samples: splits, validation shares, metrics, and the history in all its forms."""

import sys

import numpy as np
import pytest

from tilewise import nn

RNG = np.random.default_rng(0)
X = np.arange(100, dtype=np.float32)[:, None]
Y = np.repeat(np.arange(4), (61, 20, 12, 7))


class TestSplit:
    @pytest.mark.parametrize("stratify", [False, True])
    @pytest.mark.parametrize("samples", [100, 97, 5])
    def test_every_sample_goes_to_one_part_with_its_target(self, samples, stratify):
        parts = nn.split(X[:samples], Y[:samples], stratify=stratify, rng=0)
        assert [len(x) for x, _ in parts] == {100: [60, 20, 20], 97: [58, 20, 19], 5: [3, 1, 1]}[samples]
        together = np.concatenate([x[:, 0] for x, _ in parts]).astype(int)
        assert sorted(together) == list(range(samples))
        for x, y in parts:
            np.testing.assert_array_equal(y, Y[x[:, 0].astype(int)])

    @pytest.mark.parametrize("stratify", [False, True])
    def test_at_random_by_the_seed(self, stratify):
        first, second, other = (nn.split(X, Y, stratify=stratify, rng=seed)[0][0][:, 0].tolist() for seed in (0, 0, 1))
        assert first == second != other
        assert sorted(first) != first != sorted(first, reverse=True)
        assert set(first) != set(other)

    def test_stratified_gives_every_class_the_same_shares(self):
        counts = np.bincount(Y)
        for seed in range(20):
            parts = nn.split(X, Y, (0.5, 0.3, 0.2), stratify=True, rng=seed)
            found = np.stack([np.bincount(y, minlength=4) for _, y in parts])
            assert np.abs(found - np.outer((0.5, 0.3, 0.2), counts)).max() <= 1.0001
        plain = [np.bincount(nn.split(X, Y, rng=seed)[0][1], minlength=4)[0] for seed in range(20)]
        assert np.ptp(plain) > 3  # what stratify is there for

    def test_stratified_many_small_classes(self):
        """No part gets all its samples from the rounding of the others."""
        y = np.repeat(np.arange(40), 3)
        parts = nn.split(np.zeros((120, 1)), y, stratify=True, rng=0)
        assert [len(part) for _, part in parts] == [72, 24, 24]
        assert len(np.unique(parts[0][1])) == 40

    @pytest.mark.parametrize(
        ("arguments", "options", "error", "message"),
        [
            ((X, Y[:-1]), {}, ValueError, r"same length, got shapes \(100, 1\) and \(99,\)"),
            ((X.tolist(), Y), {}, TypeError, "x must be a NumPy array, got list"),
            ((X, Y, (0.5, 0.6)), {}, ValueError, r"above 0 and together 1, got \(0\.5, 0\.6\)"),
            ((X, Y, (1.0, 0.0)), {}, ValueError, "above 0 and together 1"),
            ((X, Y, ()), {}, ValueError, "above 0 and together 1"),
            ((X[:2], Y[:2]), {}, ValueError, r"shares \(0\.6, 0\.2, 0\.2\) of 2 samples leave a part empty"),
            ((X[:0], Y[:0]), {}, ValueError, "of 0 samples leave a part empty"),
            ((X, X), {"stratify": True}, ValueError, r"stratify needs classes \(N,\), got y of shape \(100, 1\)"),
        ],
    )
    def test_wrong_calls(self, arguments, options, error, message):
        with pytest.raises(error, match=f"split: .*{message}"):
            nn.split(*arguments, **options)


class Recorder(nn.Module):
    """A linear layer that notes what it saw in training and in evaluation."""

    def __init__(self):
        self.linear = nn.Linear(1, 4, init="zeros")
        self.seen: dict[bool, list[int]] = {True: [], False: []}

    def forward(self, x):
        self.seen[self.training] += x[:, 0].astype(int).tolist()
        return self.linear(x)

    def backward(self, grad):
        return self.linear.backward(grad)


def train(model: nn.Module, x=X, y=Y, loss: nn.Loss | None = None, lr: float = 0.0, **options) -> nn.History:
    defaults = {"epochs": 3, "batch_size": 32, "rng": 0, "progress": False}
    optimizer = nn.SGD(model.parameters(), lr)
    return nn.fit(model, loss or nn.CrossEntropyLoss(), optimizer, x, y, **defaults | options)


class TestValidationShare:
    def test_is_held_out_from_training_in_every_epoch(self):
        model = Recorder()
        history = train(model, validation=0.25)
        trained, held_out = np.unique(model.seen[True]), np.unique(model.seen[False])
        assert (len(trained), len(held_out)) == (75, 25)
        assert not set(trained) & set(held_out)
        assert (len(model.seen[True]), len(model.seen[False])) == (3 * 75, 3 * 25)
        assert len(history.val_loss) == len(history.val_accuracy) == 3

    def test_a_list_is_a_pair_too(self):
        assert train(Recorder(), validation=[X, Y]).val_loss == train(Recorder(), validation=(X, Y)).val_loss

    def test_by_the_seed(self):
        held_out = []
        for seed in (0, 0, 1):
            model = Recorder()
            train(model, validation=0.1, rng=seed)
            held_out.append(set(model.seen[False]))
        assert held_out[0] == held_out[1] != held_out[2]

    def test_drop_last_counts_what_is_left(self):
        model = Recorder()
        train(model, validation=0.25, drop_last=True, epochs=1, batch_size=50)
        assert len(model.seen[True]) == 50
        with pytest.raises(ValueError, match="drop_last leaves no batch of 80 out of 75 samples"):
            train(Recorder(), validation=0.25, drop_last=True, batch_size=80)

    @pytest.mark.parametrize(
        ("validation", "error", "message"),
        [
            (1.0, ValueError, r"share must be between 0 and 1, got 1\.0"),
            (0, ValueError, "share must be between 0 and 1, got 0"),
            (0.001, ValueError, "of 100 samples leave a part empty"),
            ("half", TypeError, r"validation must be a pair \(x, y\) or a share, got str"),
            ((X, Y, X), ValueError, r"validation must be a pair \(x, y\) or a share, got 3 arrays"),
        ],
    )
    def test_wrong_shares(self, validation, error, message):
        with pytest.raises(error, match=message):
            train(Recorder(), validation=validation)


class TestMetrics:
    def test_are_means_over_samples_under_their_names(self):
        def first(prediction, y):
            return np.float32((y == 0).mean())

        history = train(
            nn.Linear(1, 4, rng=0), metrics={"zeros": first, "top4": nn.top_k_accuracy(4)}, validation=(X, Y)
        )
        assert history["zeros"] == pytest.approx([0.61] * 3)
        assert history["val_zeros"] == pytest.approx([0.61] * 3)
        assert history.metrics["val_top4"] == [1.0] * 3
        assert list(history.as_dict()) == [
            "loss", "accuracy", "val_loss", "val_accuracy", "seconds", "zeros", "top4", "val_zeros", "val_top4",
        ]  # fmt: skip

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("weight", [None, [0.5, 2.0, 1.0]], ids=["", "weight"])
    def test_the_batch_size_does_not_matter(self, weight, reduction):
        """Although the batches hold one and four targets that count, of other classes."""
        model = nn.Linear(3, 3, init="zeros")
        model.weight.data[:] = np.eye(3)
        x = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 2, 2, 2, 2]]
        y = np.array([0, -100, -100, -100, 0, 1, 0, 1])
        options = {"ignore_index": -100, "reduction": reduction}
        loss = nn.CrossEntropyLoss(weight, **options)
        results = [nn.evaluate(model, loss, x, y, batch_size=size) for size in (8, 4)]
        assert results[0].loss == pytest.approx(loss(model.eval()(x), y) / (1 if reduction == "mean" else 8))
        assert results[1].loss == pytest.approx(results[0].loss, rel=1e-6)
        assert [result.accuracy for result in results] == [0.2, 0.2]
        history = train(model.train(), x, y, loss, shuffle=False, batch_size=4, epochs=1)
        assert (history.loss, history.accuracy) == ([pytest.approx(results[0].loss, rel=1e-6)], [0.2])

    def test_accuracy_where_no_target_counts(self):
        loss = nn.CrossEntropyLoss(reduction="sum")
        assert nn.evaluate(nn.Linear(1, 4, rng=0), loss, X, np.full(100, -100)) == (0.0, 0.0)

    @pytest.mark.parametrize("k", [1, 2, 4])
    def test_top_k(self, k):
        prediction, y = RNG.standard_normal((50, 5)).astype(np.float32), RNG.integers(0, 5, 50)
        expected = np.mean(
            [label in sorted(range(5), key=lambda c: -row[c])[:k] for row, label in zip(prediction, y, strict=True)]
        )
        assert nn.top_k_accuracy(k)(prediction, y) == pytest.approx(expected)
        assert nn.top_k_accuracy(k)(prediction, nn.one_hot(y, 5)) == pytest.approx(expected)
        pixels = prediction.reshape(10, 5, 5).transpose(0, 2, 1), y.reshape(10, 5)
        assert nn.top_k_accuracy(k)(*pixels) == pytest.approx(expected)
        if k == 1:
            assert nn.accuracy(prediction, y) == pytest.approx(expected)

    def test_equal_predictions_are_no_success(self):
        """A network that says the same of all classes is as good as chance."""
        assert nn.top_k_accuracy(2)(np.zeros((8, 4)), np.arange(8) % 4) == 0.5
        assert nn.accuracy(np.zeros((8, 4)), np.arange(8) % 4) == 0.25
        assert nn.top_k_accuracy(1)(np.full((8, 4), np.nan), np.arange(8) % 4) == 0.25
        for label, expected in ((0, 1.0), (1, 1.0), (2, 0.0)):  # the first of equal ones count, as for argmax
            assert nn.top_k_accuracy(2)(np.zeros((1, 4)), np.array([label])) == expected

    @pytest.mark.parametrize(
        ("metrics", "error", "message"),
        [
            ({"loss": len}, ValueError, "a metric cannot have the name 'loss'"),
            ({"val_f1": len}, ValueError, "a metric cannot have the name 'val_f1'"),
            ({"f1": 3}, TypeError, r"metric 'f1' must be callable with \(prediction, y\), got 3"),
            ({"f1": lambda p, y: p[0]}, ValueError, r"metric 'f1' must give a number, got an array of shape \(4,\)"),
            ({"top": nn.top_k_accuracy(5)}, ValueError, "k must be at most the number of classes 4, got 5"),
        ],
    )
    def test_wrong_metrics(self, metrics, error, message):
        with pytest.raises(error, match=message):
            train(nn.Linear(1, 4), metrics=metrics)

    def test_wrong_calls(self):
        with pytest.raises(ValueError, match="top_k_accuracy: k must be at least 1, got 0"):
            nn.top_k_accuracy(0)
        with pytest.raises(ValueError, match=r"accuracy: predictions of shape \(4, 3\) do not fit y of shape \(3,\)"):
            nn.accuracy(np.zeros((4, 3)), np.zeros(3, int))


def example() -> nn.History:
    return nn.History([3.0, 2.0], [0.25, 0.5], [4.0, float("nan")], [0.1, 0.2], [1.5, 1.25], {"f1": [0.5, 0.75]})


class TestHistory:
    def test_as_dict_is_a_copy_of_what_is_there(self):
        history = nn.History(loss=[1.0])
        copied = history.as_dict()
        assert copied == {"loss": [1.0]}
        copied["loss"].append(2.0)
        assert history.loss == [1.0]
        assert example().as_dict()["f1"] == [0.5, 0.75]

    def test_lists_by_name(self):
        assert example()["f1"] == [0.5, 0.75]
        assert example()["val_accuracy"] == [0.1, 0.2]
        with pytest.raises(KeyError, match="the history has no 'f2'; it has loss, accuracy, val_loss"):
            example()["f2"]

    def test_plot_has_a_panel_for_each_metric(self, tmp_path):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: plot)")
        example().plot(tmp_path / "history.svg")
        nn.History(loss=[3.0, 2.0]).plot(tmp_path / "loss.svg")
        drawn = (tmp_path / "history.svg").read_text()
        assert drawn.count('id="axes_') == 3
        assert (tmp_path / "loss.svg").read_text().count('id="axes_') == 1


class TestTensorBoard:
    @pytest.fixture(autouse=True)
    def reader(self):
        pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra: log)")

    def read(self, folder) -> dict[str, list[tuple[int, float]]]:
        """(step, value) by tag, as TensorBoard itself reads the files."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder))
        events.Reload()
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    def test_a_history_in_two_runs(self, tmp_path):
        board = nn.TensorBoard(tmp_path / "new" / "run")
        board(example())
        board.close()
        assert self.read(board.folder / "training") == {
            "loss": [(1, 3.0), (2, 2.0)], "accuracy": [(1, 0.25), (2, 0.5)], "seconds": [(1, 1.5), (2, 1.25)],
            "f1": [(1, 0.5), (2, 0.75)],
        }  # fmt: skip
        validation = self.read(board.folder / "validation")
        assert set(validation) == {"loss", "accuracy"}
        assert validation["loss"][0] == (1, 4.0)
        assert np.isnan(validation["loss"][1][1])

    def test_while_training_each_epoch_is_on_disk(self, tmp_path):
        board, seen = nn.TensorBoard(tmp_path), []

        def look(history):
            seen.append([step for step, _ in self.read(tmp_path / "training")["loss"]])

        history = train(nn.Linear(1, 4, rng=0), lr=1e-4, after_epoch=[board, look])
        board.close()
        assert seen == [[1], [1, 2], [1, 2, 3]]
        values = [value for _, value in self.read(tmp_path / "training")["loss"]]
        assert values == [np.float32(value) for value in history.loss]

    def test_goes_on_where_the_checkpoint_goes_on(self, tmp_path):
        """Epoch 4 was logged but is in no checkpoint: TensorBoard shows the one that took its place."""

        def training(**options):
            model, board = nn.Linear(1, 4, rng=0), nn.TensorBoard(tmp_path / "log")
            checkpoint = nn.Checkpoint(tmp_path / "run.npz", every=2)
            calls = {"after_epoch": board, "checkpoint": checkpoint, "before_step": press}
            return board, lambda: train(model, lr=1e-4, epochs=5, **calls | options)

        def press():
            steps.append(None)
            if len(steps) == 4 * 4 + 2:  # in the fifth epoch of four batches; the checkpoint before is of epoch 3
                raise KeyboardInterrupt

        steps: list[None] = []
        board, run = training(checkpoint=nn.Checkpoint(tmp_path / "run.npz", every=3))
        with pytest.raises(KeyboardInterrupt):
            run()
        board.close()
        assert len(self.read(tmp_path / "log" / "training")["loss"]) == 4
        board, run = training()
        history = run()
        board.close()
        read = self.read(tmp_path / "log" / "training")["loss"]
        assert read == [(i + 1, np.float32(value)) for i, value in enumerate(history.loss)]
        assert len(nn.Checkpoint(tmp_path / "run.npz").load()["history"]["loss"]) == 5

    def test_without_tensorboard_the_extra_is_named(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
        with pytest.raises(ImportError, match=r'tensorboard: pip install "tilewise\[log\]"'):
            nn.TensorBoard(tmp_path)
