"""Every script in examples/: what it shows is so, in short settings; its picture, its command line, its place in the
README. Each result comes from main(), as from the command line."""

import math
import re
import subprocess
import sys

import example_scripts
import numpy as np
import pytest
from installation import ROOT

pytestmark = pytest.mark.usefixtures("example_extras")


def test_least_squares_arrives_at_the_worked_numbers(run_example):
    result = run_example("least_squares")
    assert result["slope"] == pytest.approx(2.3, abs=1e-3)
    assert result["intercept"] == pytest.approx(79, abs=5e-3)
    assert result["loss"] == pytest.approx(8.3, abs=1e-4)


def test_least_squares_knows_the_errors_of_a_guess():
    script = example_scripts.load("least_squares")
    assert script.solved(script.HOURS, script.MARKS) == pytest.approx((2.3, 79))
    assert script.errors(3, 76) == pytest.approx((11, 3.3166), abs=1e-4)


def test_logistic_regression_separates(run_example):
    result = run_example("logistic_regression")
    assert result["accuracy"] == 1
    assert 6 < result["boundary"] < 8


def test_xor_defeats_ten_sigmoid_layers_but_not_relu(run_example):
    result = run_example("xor", "--epochs", "1500")
    loss, accuracy = result["10 sigmoid layers"]
    assert loss == pytest.approx(math.log(2), abs=1e-3)
    assert accuracy == 0.5
    for name in ("1 sigmoid layer", "10 ReLU layers"):
        loss, accuracy = result[name]
        assert loss < 0.1
        assert accuracy == 1


def test_gradients_vanish_in_sigmoid_layers():
    script = example_scripts.load("xor")
    deep = {}
    for activation in ("sigmoid", "relu"):
        model = script.nn.models.mlp((2, *[32] * 10, 1), activation=activation, init=script.INIT[activation], rng=0)
        deep[activation] = script.first_gradients(model)
        assert len(deep[activation]) == 11
    assert deep["sigmoid"][0] < 1e-5 * deep["sigmoid"][-1]
    assert deep["relu"][0] > 0.01 * deep["relu"][-1]


def test_iris_is_learned_better_with_relu(run_example):
    result = run_example("iris")
    assert result["relu"][0] < 0.5 * result["sigmoid"][0]
    assert result["relu"][1] > max(0.9, result["sigmoid"][1])


def test_initial_values_decide(run_example):
    result = run_example("initial_values")
    for name in ("zeros", "normal, 0.01"):
        assert result[name][0] == pytest.approx(math.log(10), abs=2e-3)
    assert result["Xavier"][0] < 1
    for name in ("He", "He, both directions"):
        assert result[name][0] < 0.3
        assert result[name][1] > 0.9


def test_convolutions_by_hand_are_the_worked_numbers():
    script = example_scripts.load("convolution")
    assert [script.by_hand(*case).tolist() for case in script.CASES.values()] == [
        [[12, 18], [17, 15]],
        [[7, 6, 10, 13], [8, 12, 18, 13], [8, 17, 15, 13], [6, 10, 10, 20]],
        [[9, 10], [7, 20]],
        [[2, 1, 1], [0, 2, 2], [0, 1, 1]],
    ]


def test_pooling_makes_features_less_sensitive_to_small_shifts(run_example):
    result = run_example("convolution")
    for kind in ("max", "average"):
        steps = [result["no pooling"], *(result[f"{kind} {size}x{size}"] for size in (2, 4, 16))]
        assert steps == sorted(steps, reverse=True)
        assert steps[0] > 0.5
        assert steps[-1] < 0.01
    assert result["weighted average 4x4, stride 2"] < result["average 2x2"]


def test_architectures(tmp_path, capsys):
    script = example_scripts.load("architectures")
    picture = tmp_path / "lenet5.svg"
    script.NETWORKS = {name: script.NETWORKS[name] for name in ("lenet5", "mobilenet_v2", "resnet18")}
    parameters = script.main(["--model", "lenet5", "--out", str(picture)])
    assert parameters == {"lenet5": 61_706, "mobilenet_v2": 3_504_872, "resnet18": 11_689_512}
    assert "<svg" in picture.read_text()
    assert "(1, 16, 10, 10)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        script.main(["--out", str(tmp_path / "lenet5.png")])
    assert "must end in .svg" in capsys.readouterr().err


def test_digits_dense(run_example):
    result = run_example("digits_dense")
    assert result["val_accuracy"] > 0.9


def test_digits_dense_writes_for_tensorboard(run_example, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra: log)")
    run_example("digits_dense", "--epochs", "1", "--log", str(tmp_path / "log"))
    for part in ("training", "validation"):
        assert list((tmp_path / "log" / part).glob("events*"))


def test_optimizers(run_example):
    result = run_example("optimizers", "--epochs", "5")
    assert list(result) == ["SGD", "momentum", "Nesterov", "AdaGrad", "RMSProp", "Adam", "AdamW"]
    plain, accuracy = result.pop("SGD")
    for name, (loss, other) in result.items():
        assert loss < 0.5 * plain, name
        assert other > max(0.8, accuracy), name


def test_momentum_comes_to_take_ten_steps_at_once():
    steps = example_scripts.load("optimizers").steps_of_momentum(100)
    assert steps[0] == pytest.approx(1)
    assert steps[1] == pytest.approx(1.9)
    assert steps[-1] == pytest.approx(10, rel=1e-3)


def test_every_remedy_helps_against_overfitting(run_example):
    result = run_example("overfitting")
    loss, _ = result.pop("nothing")
    assert list(result) == ["dropout", "L1", "L2", "augmentation", "early stopping"]
    for remedy, (other, accuracy) in result.items():
        assert other < 0.9 * loss, remedy
        assert accuracy > 0.4, remedy


def test_batch_norm_lets_a_deep_sigmoid_network_learn(run_example):
    result = run_example("batch_norm", "--epochs", "5")
    assert result["without batch norm"][1] < 0.3
    assert result["with batch norm"][1] > 0.9


def test_transfer_gains(run_example):
    result = run_example("transfer_learning")
    assert result["new head"] > result["from scratch"] + 0.1
    assert result["new head, then fine-tuned"] > result["from scratch"] + 0.1


def test_softmax_regression_of_wines(run_example):
    assert run_example("softmax_regression")["accuracy"] > 0.9


def test_learning_rules(run_example):
    result = run_example("learning_rules")
    assert result["AND"] == result["OR"] == (1, 1)
    assert max(result["XOR"]) < 1
    assert result["a, or b and c"] == (1, 7 / 8)


def test_rnn_adds_longer_numbers_than_it_saw(run_example):
    assert run_example("rnn") == {"short": 1, "long": 1}


def test_rnn_is_asked_for_sums(rng):
    x, y = example_scripts.load("rnn").sums(50, 12, rng)
    first, second = (x * 2.0 ** np.arange(12)[:, None]).sum(1).T
    np.testing.assert_array_equal(first + second, (y[..., 0] * 2.0 ** np.arange(12)).sum(1))
    assert x.sum() > 200


def test_lstm_reads_and_draws(run_example):
    result = run_example("lstm")
    assert result["accuracy"] > 0.9
    assert result["missed"] < 0.1


def test_deep_belief_network_is_a_better_start(run_example):
    result = run_example("deep_belief")
    assert result["last_error"] < 0.7 * result["first_error"]
    assert result["pretrained"] > result["ordinary"] + 0.2


# ---- the command line that all share


def test_runs_as_a_script(tmp_path):
    picture = tmp_path / "rules.svg"
    done = subprocess.run(
        [sys.executable, "examples/learning_rules.py", "--out", picture], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "XOR: 50% right by the delta rule" in done.stdout
    assert "<svg" in picture.read_text()


@pytest.mark.parametrize("name", example_scripts.NAMES)
def test_help_shows_the_docstring(name, capsys):
    script = example_scripts.load(name)
    assert f"python examples/{name}.py" in script.__doc__
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    assert script.__doc__.strip().splitlines()[0] in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(example_scripts.TRAINING - {"mnist"}))
def test_a_wrong_call_is_refused(name, capsys):
    script = example_scripts.load(name)
    for arguments, message in (
        (["--epochs", "0"], "--epochs: must be at least 1, got 0"),
        (["--seed", "-1"], "--seed: must be at least 0, got -1"),
        (["--out", "/no/such/folder/plot.png"], "--out: there is no folder /no/such/folder"),
    ):
        with pytest.raises(SystemExit, match="2"):
            script.main(arguments)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (["sklearn"], r'scikit-learn not installed: pip install "tilewise[train]"'),
        (["matplotlib"], r'matplotlib not installed: pip install "tilewise[plot]"'),
        (["sklearn", "matplotlib"], r'scikit-learn and matplotlib not installed: pip install "tilewise[train,plot]"'),
    ],
)
def test_missing_extras_are_named(monkeypatch, capsys, missing, message):
    for module in missing:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match="1"):
        example_scripts.load("iris").main([])
    assert message in capsys.readouterr().err


# ---- the README


def test_the_readme_lists_every_example_and_no_other():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("\n## Examples\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `examples/(\w+)\.py` \|", section, re.MULTILINE)
    assert sorted(listed) == example_scripts.NAMES
