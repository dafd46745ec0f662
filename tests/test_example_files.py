"""Examples that read the user's files: MNIST's IDX files, and a CSV of animals."""

import gzip
import re

import example_scripts
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("example_extras")


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
def test_softmax_regression_of_the_users_animals(run_example, tmp_path, header, names):
    path = tmp_path / "zoo.csv"
    path.write_text(zoo(header, names))
    features, kinds = example_scripts.load("softmax_regression").read_csv(path)
    assert features.shape == (140, 16)
    assert sorted(set(kinds)) == list("1234567")
    np.testing.assert_array_equal(features[:, :7].argmax(1) + 1, kinds.astype(int))
    if header and names:
        assert run_example("softmax_regression", "--csv", str(path), "--epochs", "60")["accuracy"] > 0.95


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there are no rows"),
        ("# nothing\n\n", "there are no rows"),
        ("1,2,a\n1,x,b\n", r"row 2 is not 2 numbers and a class: \['1', 'x', 'b'\]"),
        ("1,2,a\n1,2,3,b\n", "row 2 is not 2 numbers"),
        ("1,2,a\n", "of 1 samples leave a part empty"),
        ("1,x,a\n1,2,b\n", "row 1 is not 2 numbers"),
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
def test_mnist_from_the_users_files(run_example, mnist_files, model):
    result = run_example("mnist", str(mnist_files), "--model", model, "--epochs", {"dense": "8", "lenet5": "30"}[model])
    assert result["test_accuracy"] > 0.9


def test_mnist_goes_on_from_a_checkpoint(run_example, mnist_files, tmp_path):
    checkpoint = tmp_path / "mnist.npz"
    whole = run_example("mnist", str(mnist_files), "--epochs", "4")
    run_example("mnist", str(mnist_files), "--epochs", "2", "--checkpoint", str(checkpoint))
    assert checkpoint.is_file()
    assert run_example("mnist", str(mnist_files), "--epochs", "4", "--checkpoint", str(checkpoint)) == whole


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
