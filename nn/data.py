"""Samples dealt out to training, validation and test."""

from collections.abc import Sequence

import numpy as np

from .init import Rng, generator

Samples = tuple[np.ndarray, np.ndarray]


def split(
    x: np.ndarray,
    y: np.ndarray,
    shares: Sequence[float] = (0.6, 0.2, 0.2),
    *,
    stratify: bool = False,
    rng: Rng = None,
) -> list[Samples]:
    """Deal out samples at random: `training, validation, test = split(x, y)`. Each sample goes to one part.

    Args:
        x, y: (N, ...), of one length.
        shares: of the parts, each above 0; together 1. Part i has shares[i] * N samples, rounded so that N is the sum.
        stratify: whether every class gets these shares too, as near as whole samples allow; y is (N,) then.
        rng: a numpy.random.Generator or a seed; None: unpredictable.

    Returns:
        A pair (x, y) for each share: copies, in random order.

    Raises:
        TypeError: x or y is not an array.
        ValueError: of different lengths; shares that do not fit, or that leave a part empty; stratify of another y.
    """
    for name, array in (("x", x), ("y", y)):
        if not isinstance(array, np.ndarray):
            raise TypeError(f"split: {name} must be a NumPy array, got {type(array).__name__}")
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        raise ValueError(f"split: x and y must have the same length, got shapes {x.shape} and {y.shape}")
    if stratify and y.ndim != 1:
        raise ValueError(f"split: stratify needs classes (N,), got y of shape {y.shape}")
    parts = split_indices("split", len(x), shares, generator(rng), y if stratify else None)
    return [(x[part], y[part]) for part in parts]


def split_indices(
    function: str, samples: int, shares: Sequence[float], rng: np.random.Generator, classes: np.ndarray | None = None
) -> list[np.ndarray]:
    """The numbers of the samples of each part."""
    sizes = _sizes(function, samples, shares)
    order = rng.permutation(samples)
    if classes is None:
        return np.split(order, np.cumsum(sizes)[:-1])
    # With the samples of a class side by side, every part takes its samples at even distances: a class then gives each
    # part its share to within one or two.
    order = order[np.argsort(classes[order], kind="stable")]
    places = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    part = np.repeat(np.arange(len(sizes)), sizes)[np.argsort(places, kind="stable")]
    return [rng.permutation(order[part == i]) for i in range(len(sizes))]


def _sizes(function: str, samples: int, shares: Sequence[float]) -> np.ndarray:
    if not len(shares) or not all(share > 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"{function}: shares must be above 0 and together 1, got {tuple(shares)}")
    ends = np.round(np.cumsum(shares) * samples).astype(int)
    ends[-1] = samples
    sizes = np.diff(ends, prepend=0)
    if not sizes.all():
        raise ValueError(f"{function}: the shares {tuple(shares)} of {samples} samples leave a part empty")
    return sizes
