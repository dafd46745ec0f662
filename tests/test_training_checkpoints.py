"""Checkpoints: a training that was interrupted comes to the same bits, and nothing is lost when anything is wrong."""

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from trainings import OPTIMIZERS, SCHEDULES, Training, X, Y, assert_same_bits, interrupt_in, network, without_seconds

from tilewise import nn

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
            from trainings import Training
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
