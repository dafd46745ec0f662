"""Data augmentation: images changed at random, so that a network sees each of them in many forms.

    nn.fit(..., augment=nn.augment.Compose(nn.augment.Shift(2), nn.augment.Flip(), nn.augment.Noise(0.05)))

Each is called with a batch of images (N, C, H, W) and a numpy.random.Generator, draws for every image anew, and gives
an array of the same shape and dtype; the input is never changed. `fit` hands on its own generator, so that its seed
decides here too. Any function of (x, rng) that keeps shape and dtype will do as well.
"""

from collections.abc import Callable

import numpy as np

from ..kernels.shapes import number, pair, probability

Augmentation = Callable[[np.ndarray, np.random.Generator], np.ndarray]


class Compose:
    """Augmentations one after the other."""

    def __init__(self, *augmentations: Augmentation):
        for i, augmentation in enumerate(augmentations):
            if not callable(augmentation):
                raise TypeError(f"Compose: {i} must be callable with (x, rng), got {type(augmentation).__name__}")
        self.augmentations = augmentations

    def __call__(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        for augmentation in self.augmentations:
            x = augmentation(x, rng)
        return x

    def __repr__(self):
        return f"Compose({', '.join(map(repr, self.augmentations))})"


class Shift:
    """Move each image by whole pixels, uniformly from -pixels to pixels, down and to the right.

    Args:
        pixels: an int, or a pair (down, right).
        fill: the value of pixels that come in from outside; None: the edge is repeated.
    """

    def __init__(self, pixels: int | tuple[int, int], fill: float | None = None):
        self.pixels = pair("Shift", "pixels", pixels, 0)
        self.fill = fill

    def __call__(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        _check_images("Shift", x)
        rows, columns = (
            np.arange(size) - rng.integers(-most, most, (len(x), 1), endpoint=True)
            for size, most in zip(x.shape[2:], self.pixels, strict=True)
        )
        return _filled(_columns(_rows(x, rows), columns), rows, columns, self.fill)

    def __repr__(self):
        return f"Shift({self.pixels}, fill={self.fill})"


class Flip:
    """Mirror each image with probability p.

    Args:
        p: from 0 to 1.
        axis: 3 swaps left and right, 2 top and bottom.
    """

    def __init__(self, p: float = 0.5, axis: int = 3):
        self.p = probability("Flip", "p", p)
        if axis not in (2, 3):
            raise ValueError(f"Flip: axis must be 2 (rows) or 3 (columns), got {axis}")
        self.axis = axis

    def __call__(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        _check_images("Flip", x)
        flipped = rng.random((len(x), 1, 1, 1)) < self.p
        return np.where(flipped, np.flip(x, self.axis), x)

    def __repr__(self):
        return f"Flip({self.p}, axis={self.axis})"


class Noise:
    """Add normal noise of standard deviation std to every pixel."""

    def __init__(self, std: float):
        self.std = number("Noise", "std", std)

    def __call__(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        _check_images("Noise", x, floats=True)
        drawn = np.float64 if x.dtype == np.float64 else np.float32
        return (x + drawn(self.std) * rng.standard_normal(x.shape, drawn)).astype(x.dtype, copy=False)

    def __repr__(self):
        return f"Noise({self.std})"


class Zoom:
    """Magnify each image about its centre by a factor, uniform in [low, high); bilinear interpolation.

    A pixel i of n takes its value from place (i - c) / factor + c, where c = (n - 1) / 2.

    Args:
        low, high: above 0; factors below 1 make the image smaller.
        fill: the value of places outside the image; None: the edge is repeated.
    """

    def __init__(self, low: float, high: float, fill: float | None = None):
        self.low, self.high = number("Zoom", "low", low, True), number("Zoom", "high", high, True)
        if low > high:
            raise ValueError(f"Zoom: low must not be above high, got {self.low} and {self.high}")
        self.fill = fill

    def __call__(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        _check_images("Zoom", x, floats=True)
        factors = rng.uniform(self.low, self.high, (len(x), 1))
        rows, columns = ((np.arange(n) - (n - 1) / 2) / factors + (n - 1) / 2 for n in x.shape[2:])
        y = _between(_rows, x, rows, (slice(None), None, slice(None), None))
        y = _between(_columns, y, columns, (slice(None), None, None, slice(None)))
        return _filled(y, rows, columns, self.fill)

    def __repr__(self):
        return f"Zoom({self.low}, {self.high}, fill={self.fill})"


def _check_images(name: str, x, floats: bool = False):
    if not isinstance(x, np.ndarray) or x.ndim != 4:
        what = f"shape {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__
        raise ValueError(f"{name}: x must be an array of images (N, C, H, W), got {what}")
    if floats and x.dtype.kind != "f":
        raise TypeError(f"{name}: x must be of floats, got {x.dtype}")


def _rows(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """x[n, c, rows[n, i], :] for rows (N, H), the nearest row where there is none; whole rows are copied at once."""
    n, c = np.ogrid[: x.shape[0], : x.shape[1]]
    return x[n[..., None], c[..., None], np.clip(rows, 0, x.shape[2] - 1)[:, None]]


def _columns(x: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """x[n, c, :, columns[n, j]] for columns (N, W), the nearest column where there is none."""
    return np.take_along_axis(x, np.clip(columns, 0, x.shape[3] - 1)[:, None, None], 3)


def _between(chosen: Callable[..., np.ndarray], x: np.ndarray, places: np.ndarray, axes: tuple) -> np.ndarray:
    """Linear interpolation between the two lines at each place; `axes` broadcasts (N, lines) over x."""
    before = np.floor(places).astype(np.intp)
    share = (places - before).astype(x.dtype)[axes]
    return chosen(x, before) * (1 - share) + chosen(x, before + 1) * share


def _filled(x: np.ndarray, rows: np.ndarray, columns: np.ndarray, fill: float | None) -> np.ndarray:
    """With `fill` where the place of a pixel's value is outside the image."""
    if fill is None:
        return x
    outside_rows, outside_columns = ((p < 0) | (p > n - 1) for p, n in zip((rows, columns), x.shape[2:], strict=True))
    return np.where(outside_rows[:, None, :, None] | outside_columns[:, None, None, :], x.dtype.type(fill), x)
