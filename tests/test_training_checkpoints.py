"""Checkpoints: a training that was interrupted comes to the same bits, and nothing is lost when anything is wrong."""

import os
import re
import signal
import subprocess
import sys
import textwrap
from functools import partial

import numpy as np
import pytest

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


CASES = [*((optimizer, "StepLR") for optimizer in OPTIMIZERS), *(("SGD", schedule) for schedule in SCHEDULES)]


class TestGoingOn:
    @pytest.mark.parametrize(("optimizer", "schedule"), dict.fromkeys(CASES), ids=lambda name: name)
    def test_same_bits_as_without_an_interruption(self, optimizer, schedule, tmp_path):
        """Interrupted in the middle of the fourth epoch, and continued with other objects, whose seeds differ."""
        whole = Training(optimizer, schedule)
        expected = whole.fit()
        with pytest.raises(KeyboardInterrupt):
            Training(optimizer, schedule).fit(tmp_path / "run.npz", before_step=interrupt_in(4, 3))
        again = Training(optimizer, schedule, seed=1, rng=99)
        history = again.fit(tmp_path / "run.npz")
        assert_same_bits(again, whole)
        assert without_seconds(history) == without_seconds(expected)
        assert len(history.seconds) == 6

    def test_with_the_same_objects_from_an_older_checkpoint(self, tmp_path):
        """The checkpoint is of epoch 2, the objects have gone on to epoch 4."""
        whole, training = Training(), Training()
        expected = whole.fit()
        checkpoint = nn.Checkpoint(tmp_path / "run.npz", every=2)
        with pytest.raises(KeyboardInterrupt):
            training.fit(checkpoint, before_step=interrupt_in(4, 5))
        assert len(checkpoint.load()["history"]["loss"]) == 2
        history = training.fit(checkpoint)
        assert_same_bits(training, whole)
        assert without_seconds(history) == without_seconds(expected)

    def test_from_the_start_when_interrupted_in_the_first_epoch(self, tmp_path):
        whole, training = Training(), Training()
        whole.fit()
        with pytest.raises(KeyboardInterrupt):
            training.fit(tmp_path / "run.npz", before_step=interrupt_in(1, 4))
        training.fit(tmp_path / "run.npz")
        assert_same_bits(training, whole)

    @pytest.mark.parametrize("kind", [np.random.PCG64, np.random.Philox, np.random.MT19937, np.random.SFC64])
    def test_with_every_generator_of_numpy(self, kind, tmp_path):
        def training():
            return Training(rng=np.random.Generator(kind(5)))

        whole = training()
        whole.fit()
        with pytest.raises(KeyboardInterrupt):
            training().fit(tmp_path / "run.npz", before_step=interrupt_in(3, 1))
        again = training()
        again.fit(tmp_path / "run.npz")
        assert_same_bits(again, whole)

    def test_more_epochs(self, tmp_path):
        whole, training = Training(), Training()
        whole.fit(early_stopping=None)
        training.fit(tmp_path / "run.npz", epochs=2, early_stopping=None)
        training.fit(tmp_path / "run.npz", early_stopping=None)
        assert_same_bits(training, whole)

    def test_a_finished_training_is_not_trained_again(self, tmp_path):
        training, again = Training(), Training(seed=1)
        history = training.fit(tmp_path / "run.npz")
        before = (tmp_path / "run.npz").read_bytes()
        assert again.fit(tmp_path / "run.npz") == history
        assert_same_bits(again, training)
        assert (tmp_path / "run.npz").read_bytes() == before

    def test_a_training_that_after_epoch_ended_is_not_trained_again(self, tmp_path):
        def second(history):
            return len(history) == 2

        for _ in range(2):
            assert len(Training().fit(tmp_path / "run.npz", after_epoch=second)) == 2

    def test_the_best_weights_are_restored_from_before_the_interruption(self, tmp_path):
        """The validation loss only rises, because the schedule makes wild steps: the first epoch is best."""

        def training(**options):
            made = Training("SGD", "ExponentialLR", **options)
            made.stopping, made.schedule.gamma = nn.EarlyStopping(patience=3), 2.0
            return made

        whole, again = training(), training(seed=1)
        expected = whole.fit(epochs=30)
        assert whole.stopping.stopped
        stop = len(expected)
        with pytest.raises(KeyboardInterrupt):
            training().fit(tmp_path / "run.npz", epochs=30, before_step=interrupt_in(stop, 2))
        assert len(again.fit(tmp_path / "run.npz", epochs=30)) == stop
        assert_same_bits(again, whole)

    def test_in_another_process_that_a_signal_interrupts(self, tmp_path):
        """A real Ctrl-C, whose handler runs wherever the interpreter happens to be, and a new interpreter."""
        script = """
            import os, signal, sys
            sys.path.insert(0, sys.argv[2])
            import numpy as np
            from test_training_checkpoints import Training
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
            calls = iter(range(100))
            def press():
                if next(calls) == int(sys.argv[3]):
                    os.kill(os.getpid(), signal.SIGINT)
            training = Training()
            try:
                training.fit(sys.argv[1], before_step=press)  # __main__.press in both processes
            except KeyboardInterrupt:
                sys.exit(9)
            np.savez(sys.argv[1] + ".weights.npz", **training.model.state_dict())
        """
        path = tmp_path / "run.npz"
        folder = os.path.dirname(__file__)
        for at, code in ((12, 9), (-1, 0)):
            command = [sys.executable, "-c", textwrap.dedent(script), str(path), folder, str(at)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == code, done.stderr
        whole = Training()
        whole.fit()
        with np.load(f"{path}.weights.npz") as weights:
            for name, value in whole.model.state_dict().items():
                np.testing.assert_array_equal(weights[name], value, err_msg=name)

    def test_what_was_unfrozen_stays_so(self, tmp_path):
        """Parameters by name and a whole batch norm, frozen before and unfrozen in the callback of the first epoch."""

        def training(path, **options):
            made = Training(**options)
            made.model.freeze("0", "1", "5.bias")

            def thaw(history):
                if len(history) == 1:
                    made.model.unfreeze("1", "5.bias")

            return made, lambda epochs: made.fit(path, epochs=epochs, after_epoch=[made.schedule, thaw])

        whole, fit = training(None)
        fit(4)
        training(tmp_path / "run.npz")[1](2)
        again, fit = training(tmp_path / "run.npz", seed=1)
        fit(4)
        assert_same_bits(again, whole)
        trained = {name: p.requires_grad for name, p in again.model.named_parameters()}
        assert [name for name, on in trained.items() if not on] == ["0.weight", "0.bias"]
        assert again.model[1].frozen is False


class TestInterruption:
    def test_the_state_is_that_of_the_last_whole_step(self):
        """Batch norm's statistics and dropout's calls of the batch that was not finished are taken back."""
        done, interrupted = Training(validation=None), Training(validation=None)
        with pytest.raises(KeyboardInterrupt):
            interrupted.fit(early_stopping=None, before_step=interrupt_in(1, 3), shuffle=False, augment=None)
        nn.fit(
            done.model, nn.CrossEntropyLoss(), done.optimizer, X[:16], Y[:16], epochs=1, batch_size=8, shuffle=False,
            progress=False,
        )  # fmt: skip
        assert_same_bits(interrupted, done)
        assert [layer.calls for layer in interrupted.model if isinstance(layer, nn.Dropout)] == [2, 2]

    def test_a_step_is_made_whole_before_ctrl_c_counts(self, monkeypatch):
        """The signal comes between the first and the second parameter of the optimiser's step."""
        training, reference = Training(validation=None), Training(validation=None)
        update, updated = training.optimizer.update, []

        def pressing(data, grad, state):
            update(data, grad, state)
            updated.append(data)
            if len(updated) == 1:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(training.optimizer, "update", pressing)
        handler = signal.default_int_handler  # also where the tests run in the background, which ignores Ctrl-C
        before = signal.signal(signal.SIGINT, handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                training.fit(early_stopping=None, shuffle=False, augment=None)
            assert signal.getsignal(signal.SIGINT) is handler
        finally:
            signal.signal(signal.SIGINT, before)
        assert len(updated) == len(training.model.parameters())
        nn.fit(
            reference.model, nn.CrossEntropyLoss(), reference.optimizer, X[:8], Y[:8], epochs=1, batch_size=8,
            shuffle=False, progress=False,
        )  # fmt: skip
        assert_same_bits(training, reference)

    def test_an_interrupted_write_leaves_the_checkpoint_before(self, tmp_path, monkeypatch):
        path = tmp_path / "run.npz"
        Training().fit(path, epochs=1)
        before = path.read_bytes()

        def pressed(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", pressed)
        with pytest.raises(KeyboardInterrupt):
            Training().fit(path, epochs=2)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["run.npz"]


class TestWhen:
    def test_every_so_many_epochs_and_at_the_end(self, tmp_path):
        seen = []
        checkpoint = nn.Checkpoint(tmp_path / "run.npz", every=2)

        def look(history):
            seen.append(len(checkpoint.load()["history"].get("loss", [])))

        Training().fit(checkpoint, epochs=5, after_epoch=[look, lambda history: None])
        assert seen == [0, 0, 2, 2, 4]
        assert len(checkpoint.load()["history"]["loss"]) == 5

    def test_a_folder_that_is_missing_is_found_before_training(self, tmp_path):
        training = Training()
        before = training.model.state_dict()
        with pytest.raises(FileNotFoundError, match="nowhere"):
            training.fit(tmp_path / "nowhere" / "run.npz")
        np.testing.assert_array_equal(training.model.state_dict()["7.weight"], before["7.weight"])


def test_weights_of_a_checkpoint(tmp_path):
    training, other = Training(), network(1)
    training.fit(tmp_path / "run.npz", early_stopping=None)
    other.load_state_dict(nn.Checkpoint(tmp_path / "run.npz").load()["model"])
    np.testing.assert_array_equal(other.state_dict()["0.weight"], training.model.state_dict()["0.weight"])


def test_the_best_epoch_s_weights_in_a_checkpoint(tmp_path):
    training, other = Training("SGD", "ExponentialLR"), network(1)
    training.schedule.gamma, training.stopping = 3.0, nn.EarlyStopping(patience=2)
    training.fit(tmp_path / "run.npz", epochs=30)
    assert training.stopping.stopped
    other.load_state_dict(nn.Checkpoint(tmp_path / "run.npz").load()["early_stopping"]["best_state"])
    np.testing.assert_equal(other.state_dict(), training.model.state_dict())


def test_what_is_written_comes_back(tmp_path):
    checkpoint = nn.Checkpoint(tmp_path / "state.npz")
    state = {
        "numbers": [1, -0.1, np.inf, 2**130, True, None, "é"],
        "tuple": (1, (2.5, [np.float32(0.1), np.int64(3), np.True_])),
        "arrays": {"a.b": np.arange(3), "0": [np.float64([[1]])], "structure": np.zeros((0, 2), np.float16)},
        "empty": {},
    }
    checkpoint.save(state)
    loaded = checkpoint.load()
    np.testing.assert_equal(loaded, state)
    assert loaded["numbers"] == state["numbers"]
    assert type(loaded["tuple"]) is tuple
    assert loaded["arrays"]["structure"].dtype == np.float16


@pytest.mark.parametrize(
    "state",
    [
        {"a": {"b": np.zeros(2)}, "a.b": np.ones(2), "a.b'": np.full(2, 2.0)},
        {"structure": np.arange(3)},
        {"list": [np.zeros(1)], "list.0": np.ones(1), ".list.0": np.full(1, 2.0)},
    ],
    ids=lambda state: ", ".join(state),
)
def test_arrays_whose_dotted_names_are_equal(tmp_path, state):
    checkpoint = nn.Checkpoint(tmp_path / "state.npz")
    checkpoint.save(state)
    np.testing.assert_equal(checkpoint.load(), state)


class TestWrong:
    """Whatever is wrong, model, optimiser and generator stay as they are, and so does the file."""

    def refused(self, path, message: str, training: Training, error=ValueError, **options):
        rng = options.pop("rng", np.random.default_rng(8))
        state, content = rng.bit_generator.state, path.read_bytes()
        model, optimizer = training.model.state_dict(), training.optimizer.state_dict()
        with pytest.raises(error, match=message):
            training.fit(path, rng=rng, **options)
        np.testing.assert_equal(rng.bit_generator.state, state)
        np.testing.assert_equal(training.model.state_dict(), model)
        np.testing.assert_equal(training.optimizer.state_dict(), optimizer)
        assert training.schedule.last_epoch == 0
        assert path.read_bytes() == content

    @pytest.fixture
    def path(self, tmp_path):
        Training().fit(tmp_path / "run.npz", epochs=3)
        return tmp_path / "run.npz"

    @pytest.mark.parametrize("part", [0, 10, 0.5, 0.99], ids=str)
    def test_a_file_that_is_cut_off(self, path, part):
        content = path.read_bytes()
        path.write_bytes(content[: part if isinstance(part, int) else int(part * len(content))])
        self.refused(path, r"fit: cannot go on from '.*run\.npz': load: '.*' is damaged or not an npz file", Training())

    def test_a_file_of_something_else(self, path):
        nn.save(network().state_dict(), path)
        self.refused(
            path, r"Checkpoint: '.*run\.npz' is not a checkpoint of a training: it has no 'structure'", Training()
        )

    def test_a_state_without_a_part(self, path):
        checkpoint = nn.Checkpoint(path)
        state = checkpoint.load()
        del state["ended"]  # the last one that is looked for
        checkpoint.save(state)
        self.refused(path, r"fit: cannot go on from '.*run\.npz': it has no 'ended'", Training())

    def test_an_optimizer_s_state_that_does_not_fit(self, path):
        checkpoint = nn.Checkpoint(path)
        state = checkpoint.load()
        state["optimizer"]["state"][3]["mean"] = np.zeros(4)
        checkpoint.save(state)
        self.refused(path, r"cannot go on .*: Adam: mean of parameter 3 has shape \(4,\), expected", Training())

    def test_another_model(self, path):
        wider, tanh = Training(), Training()
        wider.model = network(hidden=9)
        wider.optimizer = nn.Adam(wider.model.parameters())
        tanh.model = network(activation=nn.Tanh)
        tanh.optimizer = nn.Adam(tanh.model.parameters())
        self.refused(path, r"5\.weight is float32 \(8, 48\) there and float32 \(9, 48\) here", wider)
        self.refused(path, "layer 2 is ReLU there and Tanh here", tanh)

    def test_another_model_with_many_differences(self, path):
        training = Training()
        training.model = nn.Sequential(nn.Flatten(), nn.Linear(72, 3))
        training.optimizer = nn.Adam(training.model.parameters())
        self.refused(path, r"layer 0 is Conv2d there and Flatten here; .*; and \d\d more differences$", training)

    def test_other_parameters_in_the_optimizer(self, path):
        training = Training()
        training.optimizer = nn.Adam(training.model.parameters()[::-1])
        self.refused(path, r"optimizer's parameter 0 is 0\.weight there and 7\.bias here", training)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 10}, "batch_size is 8 there and 10 here"),
            ({"shuffle": False}, "shuffle is True there and False here"),
            ({"validation": 0.3}, "validation is 0.2 there and 0.3 here"),
            (
                {"validation": (X, Y)},
                r"validation is 0.2 there and float32 \(50, 2, 6, 6\) of crc32 \w{8} and int64 \(50,\) of crc32 \w{8}",
            ),
            (
                {"before_step": None},
                r"before_step is \w*\.?test_training_checkpoints\.interrupt_in.* there and None here",
            ),
            ({"before_step": partial(int, 3)}, r"before_step is .*<locals>\.press there and functools\.partial here"),
            ({"early_stopping": None}, "early_stopping is val_loss there and None here"),
            ({"augment": None}, "augment is Compose there and None here"),
            ({"after_epoch": ()}, "after_epoch 0 is StepLR there and missing here"),
            ({"rng": np.random.Generator(np.random.SFC64(0))}, "rng is PCG64 there and SFC64 here"),
            ({"epochs": 2}, "it is of 3 epochs, more than the 2 asked for"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_another_training(self, path, options, message):
        self.refused(path, rf"fit: cannot go on from '.*run\.npz': {message}", Training(), **options)

    @pytest.mark.parametrize("which", ["x", "y"])
    def test_other_numbers_in_the_data(self, path, which):
        """Of the same shape and dtype."""
        data = {"x": X.copy(), "y": Y.copy()}
        data[which][-1] = 1 - data[which][-1]
        kind = re.escape(f"{data[which].dtype} {data[which].shape}") + r" of crc32 \w{8}"
        self.refused(path, rf"run\.npz': {which} is {kind} there and {kind} here$", Training(**data))

    @pytest.mark.parametrize("which", [0, 1])
    def test_other_numbers_in_the_validation_data(self, tmp_path, which):
        path, pair = tmp_path / "run.npz", [X[::2], Y[::2]]
        Training(validation=pair).fit(path, epochs=1)
        Training(validation=[X[::2].copy(), Y[::2].copy()]).fit(path, epochs=2)  # however it lies in memory
        pair[which] = 1 - pair[which]
        self.refused(path, r"run\.npz': validation is float32 .* there and float32", Training(validation=tuple(pair)))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"reduction": "sum"}, "reduction is mean there and sum here"),
            ({"ignore_index": 1}, "ignore_index is -100 there and 1 here"),
            ({"label_smoothing": 0.1}, r"label_smoothing is 0\.0 there and 0\.1 here"),
            ({"weight": [1.0, 2, 1]}, r"weight is None there and float64 \(3,\) of crc32 \w{8} here"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_another_loss(self, path, options, message):
        loss = nn.CrossEntropyLoss(**options)
        self.refused(path, rf"run\.npz': loss's {message}$", Training(loss=loss))

    def test_early_stopping_keeps_what_it_saw(self, path, tmp_path):
        training = Training()
        training.fit(epochs=3)
        seen = training.stopping.state_dict()
        assert seen["best_state"]
        path.write_bytes(path.read_bytes()[:-9])
        missing = tmp_path / "nowhere" / "run.npz"
        for file, error in ((path, ValueError), (missing, FileNotFoundError)):
            with pytest.raises(error):
                training.fit(file)
            np.testing.assert_equal(training.stopping.state_dict(), seen)

    def test_another_optimizer(self, path):
        self.refused(path, "optimizer is Adam there and AdamW here", Training("AdamW"))

    def test_other_data(self, path):
        training, before = Training(), path.read_bytes()
        with pytest.raises(ValueError, match=r"x is float32 \(50, 2, 6, 6\) .* there and float32 \(40, 2, 6, 6\) "):
            nn.fit(
                training.model, nn.CrossEntropyLoss(), training.optimizer, X[:40], Y[:40], epochs=6, batch_size=8,
                validation=0.2, after_epoch=training.schedule, checkpoint=path, progress=False,
            )  # fmt: skip
        assert path.read_bytes() == before

    def test_a_schedule_that_refuses_its_state(self, path):
        checkpoint = nn.Checkpoint(path)
        state = checkpoint.load()
        state["after_epoch"] = [{"base_lr": 1.0}]
        checkpoint.save(state)
        self.refused(path, r"StepLR: the state has \['base_lr'\]", Training())

    def test_a_state_that_cannot_be_written(self, tmp_path):
        class Callback:
            def __call__(self, history):
                pass

            def state_dict(self):
                return {"model": {"inside": object()}}

            def load_state_dict(self, state):
                pass

        with pytest.raises(TypeError, match=r"after_epoch\.0\.model\.inside is a object, which cannot be written"):
            Training().fit(tmp_path / "run.npz", after_epoch=Callback())
        assert os.listdir(tmp_path) == []

    def test_arguments(self):
        with pytest.raises(ValueError, match=r"Checkpoint: 'run.pth' must end in \.npz"):
            nn.Checkpoint("run.pth")
        with pytest.raises(ValueError, match="Checkpoint: every must be at least 1, got 0"):
            nn.Checkpoint("run.npz", every=0)
