"""Every script in examples/: what it shows is so, in short settings; its picture, its command line, its place in the
README. Each result comes from main(), as from the command line."""

import gzip
import math
import re
import subprocess
import sys

import example_scripts
import numpy as np
import pytest
from installation import ROOT

import tilewise

# Those that train by nn.fit, with a progress bar.
QUIET = set(example_scripts.NAMES) - {"architectures", "convolution", "learning_rules"}


@pytest.fixture(autouse=True)
def extras():
    for module, distribution, extra in (("sklearn", "scikit-learn", "train"), ("matplotlib", "matplotlib", "plot")):
        pytest.importorskip(module, reason=f"{distribution} is not installed (extra: {extra})")


@pytest.fixture
def run(tmp_path, capsys):
    """run(name, *arguments): what main returns, after a look at the picture and at what was printed."""

    def call(name: str, *arguments: str):
        picture = tmp_path / f"{name}.png"
        quiet = ["--quiet"] if name in QUIET else []
        with tilewise.using(threads=1):  # the problems are small, and the machine may be busy
            result = example_scripts.load(name).main([*arguments, *quiet, "--out", str(picture)])
        printed = capsys.readouterr()
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert str(picture) in printed.out
        assert printed.err == ""
        return result

    return call


def test_least_squares_arrives_at_the_worked_numbers(run):
    result = run("least_squares")
    assert result["slope"] == pytest.approx(2.3, abs=1e-3)
    assert result["intercept"] == pytest.approx(79, abs=5e-3)
    assert result["loss"] == pytest.approx(8.3, abs=1e-4)


def test_least_squares_knows_the_errors_of_a_guess():
    script = example_scripts.load("least_squares")
    assert script.solved(script.HOURS, script.MARKS) == pytest.approx((2.3, 79))
    assert script.errors(3, 76) == pytest.approx((11, 3.3166), abs=1e-4)


def test_logistic_regression_separates(run):
    result = run("logistic_regression")
    assert result["accuracy"] == 1
    assert 6 < result["boundary"] < 8


def test_xor_defeats_ten_sigmoid_layers_but_not_relu(run):
    result = run("xor", "--epochs", "1500")
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


def test_iris_is_learned_better_with_relu(run):
    result = run("iris")
    assert result["relu"][0] < 0.5 * result["sigmoid"][0]
    assert result["relu"][1] > max(0.9, result["sigmoid"][1])


def test_initial_values_decide(run):
    result = run("initial_values")
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


def test_pooling_makes_features_less_sensitive_to_small_shifts(run):
    result = run("convolution")
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


def test_digits_dense(run):
    result = run("digits_dense")
    assert result["val_accuracy"] > 0.9


def test_digits_dense_writes_for_tensorboard(run, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra: log)")
    run("digits_dense", "--epochs", "1", "--log", str(tmp_path / "log"))
    for part in ("training", "validation"):
        assert list((tmp_path / "log" / part).glob("events*"))


def test_optimizers(run):
    result = run("optimizers", "--epochs", "5")
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


def test_every_remedy_helps_against_overfitting(run):
    result = run("overfitting")
    loss, _ = result.pop("nothing")
    assert list(result) == ["dropout", "L1", "L2", "augmentation", "early stopping"]
    for remedy, (other, accuracy) in result.items():
        assert other < 0.9 * loss, remedy
        assert accuracy > 0.4, remedy


def test_batch_norm_lets_a_deep_sigmoid_network_learn(run):
    result = run("batch_norm", "--epochs", "5")
    assert result["without batch norm"][1] < 0.3
    assert result["with batch norm"][1] > 0.9


def test_transfer_gains(run):
    result = run("transfer_learning")
    assert result["new head"] > result["from scratch"] + 0.1
    assert result["new head, then fine-tuned"] > result["from scratch"] + 0.1


def test_softmax_regression_of_wines(run):
    assert run("softmax_regression")["accuracy"] > 0.9


def zoo(header: bool, names: bool) -> str:
    """A CSV in the form of the animals': 16 features and 7 kinds, each with a feature of its own."""
    rng = np.random.default_rng(0)
    lines = ["# animals"]
    if header:
        lines.append(",".join([*(["animal"] if names else []), *(f"feature{i}" for i in range(16)), "type"]))
    for i in range(140):
        features = rng.integers(0, 2, 16)
        features[:7] = np.arange(7) == i % 7
        features[15] = 1  # one that says nothing, and has no variance
        lines.append(",".join([*([f"animal{i}"] if names else []), *map(str, features), str(i % 7 + 1)]))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("names", [False, True])
def test_softmax_regression_of_the_users_animals(run, tmp_path, header, names):
    path = tmp_path / "zoo.csv"
    path.write_text(zoo(header, names))
    features, kinds = example_scripts.load("softmax_regression").read_csv(path)
    assert features.shape == (140, 16)
    assert sorted(set(kinds)) == list("1234567")
    np.testing.assert_array_equal(features[:, :7].argmax(1) + 1, kinds.astype(int))
    if header and names:
        assert run("softmax_regression", "--csv", str(path), "--epochs", "60")["accuracy"] > 0.95


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there are no rows"),
        ("# nothing\n\n", "there are no rows"),
        ("1,2,a\n1,x,b\n", r"row 2 is not 2 numbers and a class: \['1', 'x', 'b'\]"),
        ("1,2,a\n1,2,3,b\n", "row 2 is not 2 numbers"),
        (None, "No such file"),
    ],
)
def test_softmax_regression_says_what_is_wrong_with_a_file(tmp_path, capsys, text, message):
    path = tmp_path / "zoo.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match="1"):
        example_scripts.load("softmax_regression").main(["--csv", str(path), "--out", str(tmp_path / "p.png")])
    assert re.search(message, capsys.readouterr().err)


def test_learning_rules(run):
    result = run("learning_rules")
    assert result["AND"] == result["OR"] == (1, 1)
    assert max(result["XOR"]) < 1
    assert result["a, or b and c"] == (1, 7 / 8)


def test_rnn_adds_longer_numbers_than_it_saw(run):
    assert run("rnn") == {"short": 1, "long": 1}


def test_rnn_is_asked_for_sums(rng):
    x, y = example_scripts.load("rnn").sums(50, 12, rng)
    first, second = (x * 2.0 ** np.arange(12)[:, None]).sum(1).T
    np.testing.assert_array_equal(first + second, (y[..., 0] * 2.0 ** np.arange(12)).sum(1))
    assert x.sum() > 200


def test_lstm_reads_and_draws(run):
    result = run("lstm")
    assert result["accuracy"] > 0.9
    assert result["missed"] < 0.1


def test_deep_belief_network_is_a_better_start(run):
    result = run("deep_belief")
    assert result["last_error"] < 0.7 * result["first_error"]
    assert result["pretrained"] > result["ordinary"] + 0.2


# ---- MNIST from files


def idx(array: np.ndarray) -> bytes:
    head = bytes((0, 0, 8, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist_files(tmp_path):
    """28x28 images with a bright stripe whose place is the label; two files as they are, two with gzip."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "mnist"
    folder.mkdir()
    for part, count in (("train", 400), ("t10k", 100)):
        labels = rng.integers(0, 10, count)
        images = rng.integers(0, 50, (count, 28, 28))
        for image, label in zip(images, labels, strict=True):
            image[2 * label + 4 : 2 * label + 6] += 150
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return folder


@pytest.mark.parametrize("model", ["dense", "lenet5"])
def test_mnist_from_the_users_files(run, mnist_files, model):
    result = run("mnist", str(mnist_files), "--model", model, "--epochs", {"dense": "8", "lenet5": "30"}[model])
    assert result["test_accuracy"] > 0.9


def test_mnist_goes_on_from_a_checkpoint(run, mnist_files, tmp_path):
    checkpoint = tmp_path / "mnist.npz"
    whole = run("mnist", str(mnist_files), "--epochs", "4")
    run("mnist", str(mnist_files), "--epochs", "2", "--checkpoint", str(checkpoint))
    assert checkpoint.is_file()
    assert run("mnist", str(mnist_files), "--epochs", "4", "--checkpoint", str(checkpoint)) == whole


def rewrite(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


DAMAGE = {
    "missing": (lambda f: (f / "t10k-images-idx3-ubyte").unlink(), "neither t10k-images-idx3-ubyte nor .*gz"),
    "magic": (
        lambda f: rewrite(f, "train-images-idx3-ubyte", lambda b: b"\0\0\x0d\x03" + b[4:]),
        "train-images-idx3-ubyte: begins with 00 00 0d 03, an IDX file of this kind with 00 00 08 03",
    ),
    "empty": (lambda f: rewrite(f, "train-images-idx3-ubyte", lambda b: b""), "begins with , an IDX file"),
    "truncated": (
        lambda f: rewrite(f, "train-images-idx3-ubyte", lambda b: b[:-5]),
        r"313611 bytes, but shape \(400, 28, 28\) takes 313616",
    ),
    "too long": (lambda f: rewrite(f, "t10k-images-idx3-ubyte", lambda b: b + b"x"), "78417 bytes, but shape"),
    "only a head": (lambda f: rewrite(f, "t10k-images-idx3-ubyte", lambda b: b[:7]), "7 bytes, but shape"),
    "truncated gzip": (
        lambda f: rewrite(f, "t10k-labels-idx1-ubyte.gz", lambda b: b[:-9]),
        "t10k-labels-idx1-ubyte.gz: Compressed file ended",
    ),
    "no gzip": (lambda f: rewrite(f, "t10k-labels-idx1-ubyte.gz", gzip.decompress), "gz: Not a gzipped file"),
    "labels of another part": (
        lambda f: (f / "train-labels-idx1-ubyte.gz").write_bytes((f / "t10k-labels-idx1-ubyte.gz").read_bytes()),
        "400 images and 100 labels of the part 'train'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_mnist_says_what_is_wrong_with_the_files(mnist_files, tmp_path, capsys, damage):
    change, message = DAMAGE[damage]
    change(mnist_files)
    with pytest.raises(SystemExit, match="1"):
        example_scripts.load("mnist").main([str(mnist_files), "--out", str(tmp_path / "p.png")])
    assert re.search(f"mnist: .*{message}", capsys.readouterr().err)


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


@pytest.mark.parametrize("name", sorted(QUIET - {"mnist"}))
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
