"""Checkpoints that do not fit, and files that are none: an error, and nothing is lost."""

import os
import re
from functools import partial

import numpy as np
import pytest
from trainings import Training, X, Y, network

from tilewise import nn


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
                r"before_step is \w*\.?trainings\.interrupt_in.* there and None here",
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
