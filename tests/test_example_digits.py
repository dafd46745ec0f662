"""examples/digits.py: it reaches 98 %, writes its plot, and is seeded."""

import example_scripts
import numpy as np
import pytest


@pytest.fixture(scope="module")
def digits():
    return example_scripts.load("digits")


def test_reaches_98_percent(digits, example_extras):
    """How long it takes is for `make targets` to measure."""
    result = digits.train(epochs=25, seed=0, progress=False)
    assert result.tested == 359
    assert result.accuracy >= 0.98
    assert len(result.history) == 25


def test_command_line_writes_the_plot(digits, example_extras, tmp_path, capsys):
    out = tmp_path / "history.png"
    assert len(digits.main(["--epochs", "1", "--seed", "3", "--out", str(out), "--quiet"]).history) == 1
    printed = capsys.readouterr()
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "% on 359 digits" in printed.out
    assert "1 epochs in" in printed.out
    assert printed.err == ""


def test_same_seed_same_bits(digits, example_extras):
    first, second = (digits.train(epochs=1, seed=1, progress=False).model.state_dict() for _ in range(2))
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])


def test_a_fifth_is_held_out_and_never_trained_on(digits, example_extras):
    (x, y), (x_test, y_test) = digits.load_data(np.random.default_rng(0))
    assert x.shape == (1438, 1, 32, 32)
    assert x_test.shape == (359, 1, 32, 32)
    assert x.dtype == x_test.dtype == np.float32
    trained = {image.tobytes() for image in x}
    assert len(trained) >= 1430  # the scans differ, so that the next line can fail
    assert not any(image.tobytes() in trained for image in x_test)
    assert (float(x.mean()), float(x.std())) == pytest.approx((0, 1), abs=1e-5)
    np.testing.assert_array_equal(np.bincount(y, minlength=10) + np.bincount(y_test, minlength=10), COUNTS)


COUNTS = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # of each digit among the 1,797


def test_enlarged_keeps_means_and_places(digits):
    image = np.zeros((1, 8, 8))
    image[0, 2, 5] = 1
    large = digits.enlarged(image)[0]
    assert large.shape == (32, 32)
    assert large.sum() == pytest.approx(16)  # one pixel became sixteen
    rows, columns = np.mgrid[:32, :32] + 0.5
    assert (large * rows).sum() / 16 == pytest.approx(2.5 * 4)
    assert (large * columns).sum() / 16 == pytest.approx(5.5 * 4)
    np.testing.assert_allclose(digits.enlarged(np.full((2, 8, 8), 7.0)), 7)
