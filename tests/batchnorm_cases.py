"""What the tests of batch normalisation share: layouts, activations, statistics."""

import numpy as np

LAYOUTS = ("NCHW", "NHWC")
ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", "sigmoid", "tanh")


def laid(x, layout):
    """An NCHW (or NC, or CHW) array in this layout."""
    return np.ascontiguousarray(x if layout == "NCHW" or x.ndim == 2 else np.moveaxis(x, -3, -1))


def plain(y, layout):
    """A result of this layout as NCHW."""
    return np.asarray(y) if layout == "NCHW" or y.ndim == 2 else np.moveaxis(np.asarray(y), -1, -3)


def statistics(rng, channels, dtype):
    """Running mean, running variance, weight, bias."""
    return [
        rng.standard_normal(channels).astype(dtype),
        rng.uniform(0.5, 2, channels).astype(dtype),
        rng.standard_normal(channels).astype(dtype),
        rng.standard_normal(channels).astype(dtype),
    ]
