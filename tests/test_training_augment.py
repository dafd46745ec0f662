"""Data augmentation: every image by its definition, pixel by pixel, and that nothing else changes."""

import numpy as np
import pytest

from tilewise import nn

SHAPE = (40, 2, 5, 7)
ALL = {
    "Shift": nn.augment.Shift((1, 3)),
    "Shift, filled": nn.augment.Shift(2, fill=-1.0),
    "Flip": nn.augment.Flip(),
    "Flip, rows": nn.augment.Flip(0.3, axis=2),
    "Noise": nn.augment.Noise(0.5),
    "Zoom": nn.augment.Zoom(0.5, 2.0),
    "Zoom, filled": nn.augment.Zoom(0.5, 1.0, fill=3.0),
    "Compose": nn.augment.Compose(nn.augment.Flip(), nn.augment.Shift(1), nn.augment.Zoom(0.8, 1.2)),
}


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def rng() -> np.random.Generator:
    return np.random.default_rng(1)


def moved(image: np.ndarray, down: int, right: int, fill: float | None) -> np.ndarray:
    """One image (C, H, W), moved pixel by pixel."""
    result, (_, height, width) = np.empty_like(image), image.shape
    for i in range(height):
        for j in range(width):
            row, column = i - down, j - right
            inside = 0 <= row < height and 0 <= column < width
            nearest = image[:, min(max(row, 0), height - 1), min(max(column, 0), width - 1)]
            result[:, i, j] = nearest if inside or fill is None else fill
    return result


@pytest.mark.parametrize("fill", [None, 0.0, -1.5])
def test_shift_moves_each_image_by_its_own_pixels(x, fill):
    y = nn.augment.Shift((1, 3), fill=fill)(x, rng())
    found = set()
    for image, result in zip(x, y, strict=True):
        places = [
            (down, right)
            for down in range(-1, 2)
            for right in range(-3, 4)
            if np.array_equal(moved(image, down, right, fill), result)
        ]
        assert len(places) == 1
        found.add(places[0])
    assert len(found) > 10
    assert {down for down, _ in found} == {-1, 0, 1}
    assert {right for _, right in found} == {-3, -2, -1, 0, 1, 2, 3}


@pytest.mark.parametrize("axis", [2, 3])
def test_flip_mirrors_a_share_of_the_images(x, axis):
    y = nn.augment.Flip(0.25, axis=axis)(x, rng())
    mirrored = np.flip(x, axis)
    flipped = (y == mirrored).all((1, 2, 3))
    assert (flipped | (y == x).all((1, 2, 3))).all()
    assert 3 <= flipped.sum() <= 18  # of 40, expected 10 with a deviation of 2.7
    np.testing.assert_array_equal(nn.augment.Flip(0.0)(x, rng()), x)
    np.testing.assert_array_equal(nn.augment.Flip(1.0, axis=axis)(x, rng()), mirrored)


def test_noise_has_its_deviation_and_is_new_for_every_pixel(x):
    noise = nn.augment.Noise(0.5)(x, rng()) - x
    assert abs(noise.mean()) < 0.04  # 2800 numbers: the mean deviates by 0.0094
    assert noise.std() == pytest.approx(0.5, rel=0.06)
    assert len(np.unique(noise)) > 0.99 * noise.size
    np.testing.assert_array_equal(nn.augment.Noise(0.0)(x, rng()), x)


@pytest.mark.parametrize("fill", [None, 9.0])
@pytest.mark.parametrize("factor", [0.6, 1.0, 1.7, 2.0])
def test_zoom_is_bilinear_about_the_centre(x, factor, fill):
    x = x.astype(np.float64)
    y = nn.augment.Zoom(factor, factor, fill=fill)(x, rng())
    expected = np.empty(SHAPE)
    height, width = SHAPE[2:]
    for i, j in np.ndindex(height, width):
        row, column = ((k - (n - 1) / 2) / factor + (n - 1) / 2 for k, n in ((i, height), (j, width)))
        if fill is not None and not (0 <= row <= height - 1 and 0 <= column <= width - 1):
            expected[:, :, i, j] = fill
            continue
        row, column = min(max(row, 0), height - 1), min(max(column, 0), width - 1)
        top, left = int(row), int(column)
        bottom, right, a, b = min(top + 1, height - 1), min(left + 1, width - 1), row - top, column - left
        upper = x[:, :, top, left] * (1 - b) + x[:, :, top, right] * b
        lower = x[:, :, bottom, left] * (1 - b) + x[:, :, bottom, right] * b
        expected[:, :, i, j] = upper * (1 - a) + lower * a
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


def test_zoom_has_its_own_factor_for_every_image(x):
    ramp = np.broadcast_to(np.arange(7.0), SHAPE).astype(np.float64)
    y = nn.augment.Zoom(1.0, 2.0)(ramp, rng())
    factors = 1 / (y[:, 0, 0, 4] - y[:, 0, 0, 3])
    assert 1 <= factors.min() < 1.2
    assert 1.8 < factors.max() < 2
    assert len(np.unique(factors.round(6))) == len(x)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("augmentation", ALL.values(), ids=ALL)
def test_dtype_and_shape_stay_and_the_input_is_not_changed(augmentation, dtype, x):
    x = x.astype(dtype)
    x.flags.writeable = False
    for part in (x, x[:0], x[:1], x[:, :, ::-1, ::2]):
        y = augmentation(part, rng())
        assert (y.shape, y.dtype) == (part.shape, part.dtype)
    y = augmentation(x, rng())
    np.testing.assert_array_equal(y, augmentation(x, rng()))
    assert (y != x).any()
    assert (y != augmentation(x, np.random.default_rng(2))).any()


def test_compose_is_one_after_the_other(x):
    first, second = nn.augment.Shift(1), nn.augment.Noise(0.1)
    shared = rng()
    expected = second(first(x, shared), shared)
    np.testing.assert_array_equal(nn.augment.Compose(first, second)(x, rng()), expected)
    assert repr(nn.augment.Compose(first, nn.augment.Flip(), nn.augment.Zoom(0.5, 2), second)) == (
        "Compose(Shift((1, 1), fill=None), Flip(0.5, axis=3), Zoom(0.5, 2.0, fill=None), Noise(0.1))"
    )


WRONG = {
    "p": (lambda x: nn.augment.Flip(1.5), ValueError, r"Flip: p must be from 0 to 1, got 1\.5"),
    "axis": (lambda x: nn.augment.Flip(axis=1), ValueError, "Flip: axis must be 2"),
    "pixels": (lambda x: nn.augment.Shift(-1), ValueError, "Shift: pixels must be at least 0"),
    "std": (lambda x: nn.augment.Noise("much"), TypeError, "Noise: std must be a number"),
    "factor": (lambda x: nn.augment.Zoom(0, 1), ValueError, "Zoom: low must be positive"),
    "order": (lambda x: nn.augment.Zoom(2, 1), ValueError, r"Zoom: low must not be above high, got 2\.0 and 1\.0"),
    "compose": (lambda x: nn.augment.Compose(3), TypeError, "Compose: 0 must be callable"),
    "vectors": (lambda x: nn.augment.Flip()(x[0], rng()), ValueError, r"images \(N, C, H, W\), got shape \(2, 5, 7\)"),
    "list": (lambda x: nn.augment.Flip()([1], rng()), ValueError, "got list"),
    "integers": (
        lambda x: nn.augment.Noise(1)(x.astype(int), rng()),
        TypeError,
        "Noise: x must be of floats, got int64",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_calls(call, error, message, x):
    with pytest.raises(error, match=message):
        call(x)


class TestInFit:
    def fit(self, augment, **options):
        x = np.random.default_rng(0).standard_normal((20, 1, 4, 4)).astype(np.float32)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, rng=0))
        y = (x[:, 0, 0, 0] > 0).astype(np.int64)
        defaults = {"epochs": 2, "batch_size": 8, "rng": 0, "progress": False}
        nn.fit(
            model, nn.CrossEntropyLoss(), nn.SGD(model.parameters(), 0.1), x, y, augment=augment, **defaults | options
        )
        return model.state_dict()["1.weight"]

    def test_training_sees_it_and_validation_does_not(self):
        seen = []

        def zeroed(x, rng):
            seen.append(len(x))
            return np.zeros_like(x)

        weight = self.fit(zeroed, validation=0.4)
        assert seen == [8, 4] * 2
        np.testing.assert_array_equal(weight, nn.Linear(16, 2, rng=0).state_dict()["weight"])  # no gradient from zeros

    def test_the_seed_decides(self):
        noise = nn.augment.Noise(0.5)
        np.testing.assert_array_equal(self.fit(noise), self.fit(noise))
        assert (self.fit(noise) != self.fit(noise, rng=1)).any()

    @pytest.mark.parametrize(
        ("augment", "message"),
        [
            (
                lambda x, rng: x[:, :, 1:],
                r"must give an array of x's float32 \(8, 1, 4, 4\), got float32 \(8, 1, 3, 4\)",
            ),
            (lambda x, rng: x.astype(float), r"got float64 \(8, 1, 4, 4\)"),
            (lambda x, rng: None, "got NoneType"),
        ],
    )
    def test_shape_and_dtype_must_stay(self, augment, message):
        with pytest.raises(ValueError, match=f"fit: augment .*{message}"):
            self.fit(augment)
