"""Initial values. Every function draws from a given generator, in float64, so that both dtypes get the same numbers.

fan_in is the number of inputs that reach one output, fan_out the number of outputs that one input reaches: for a
weight (O, I) they are I and O, for (O, C/groups, KH, KW) they are C/groups * KH * KW and O * KH * KW.

Sources: Glorot and Bengio 2010 (Xavier), He et al. 2015.
"""

from collections.abc import Callable
from math import prod, sqrt

import numpy as np
from numpy.typing import DTypeLike

from ..kernels.arrays import FLOATS

Rng = np.random.Generator | int | None
FAN_MODES = ("fan_in", "fan_out", "fan_avg")


def generator(rng: Rng) -> np.random.Generator:
    """A generator as it is, one seeded with an int, or a new unpredictable one for None."""
    if rng is None or isinstance(rng, (int, np.integer)):
        return np.random.default_rng(rng)
    if isinstance(rng, np.random.Generator):
        return rng
    raise TypeError(f"rng must be a numpy.random.Generator, an int or None, got {type(rng).__name__}")


def layer_dtype(function: str, dtype: DTypeLike) -> np.dtype:
    """The dtype of a layer's parameters: float16, float32 or float64."""
    if np.dtype(dtype) not in FLOATS:
        raise TypeError(f"{function}: dtype must be float16, float32 or float64, got {np.dtype(dtype)}")
    return np.dtype(dtype)


def fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight of this shape."""
    if len(shape) < 2:
        raise ValueError(f"init: a weight must have at least 2 dimensions for its fans, got shape {shape}")
    taps = prod(shape[2:])
    return shape[1] * taps, shape[0] * taps


def _fan(shape: tuple[int, ...], mode: str) -> float:
    if mode not in FAN_MODES:
        raise ValueError(f"init: mode must be one of {', '.join(FAN_MODES)}, got {mode!r}")
    fan_in, fan_out = fans(shape)
    return {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode]


def normal(shape: tuple[int, ...], rng: Rng = None, dtype: DTypeLike = np.float32, std: float = 1.0) -> np.ndarray:
    """Normal with mean 0 and variance std**2."""
    return (std * generator(rng).standard_normal(shape)).astype(dtype)


def uniform(shape: tuple[int, ...], rng: Rng = None, dtype: DTypeLike = np.float32, bound: float = 1.0) -> np.ndarray:
    """Uniform in [-bound, bound): variance bound**2 / 3."""
    return generator(rng).uniform(-bound, bound, shape).astype(dtype)


def zeros(shape: tuple[int, ...], rng: Rng = None, dtype: DTypeLike = np.float32) -> np.ndarray:
    """All zero. A network of such weights does not learn: its hidden units stay equal."""
    return np.zeros(shape, dtype)


def he_normal(
    shape: tuple[int, ...], rng: Rng = None, dtype: DTypeLike = np.float32, mode: str = "fan_in"
) -> np.ndarray:
    """Normal with variance 2 / fan, for ReLU. mode "fan_avg" is 4 / (fan_in + fan_out)."""
    return normal(shape, rng, dtype, sqrt(2 / _fan(shape, mode)))


def he_uniform(
    shape: tuple[int, ...], rng: Rng = None, dtype: DTypeLike = np.float32, mode: str = "fan_in"
) -> np.ndarray:
    """Uniform with variance 2 / fan, for ReLU. mode "fan_avg" is 4 / (fan_in + fan_out)."""
    return uniform(shape, rng, dtype, sqrt(6 / _fan(shape, mode)))


def xavier_normal(shape: tuple[int, ...], rng: Rng = None, dtype: DTypeLike = np.float32) -> np.ndarray:
    """Normal with variance 2 / (fan_in + fan_out), for sigmoid and tanh."""
    return normal(shape, rng, dtype, sqrt(1 / _fan(shape, "fan_avg")))


def xavier_uniform(shape: tuple[int, ...], rng: Rng = None, dtype: DTypeLike = np.float32) -> np.ndarray:
    """Uniform with variance 2 / (fan_in + fan_out), for sigmoid and tanh."""
    return uniform(shape, rng, dtype, sqrt(3 / _fan(shape, "fan_avg")))


SCHEMES: dict[str, Callable[..., np.ndarray]] = {
    "normal": normal,
    "he_normal": he_normal,
    "he_uniform": he_uniform,
    "xavier_normal": xavier_normal,
    "xavier_uniform": xavier_uniform,
    "zeros": zeros,
}


def layer_values(
    function: str, init, shape: tuple[int, ...], bias: bool, rng: Rng, dtype: DTypeLike
) -> tuple[np.ndarray, np.ndarray | None]:
    """The (weight, bias) that a layer starts with.

    init "default" is PyTorch's: both uniform in +-1 / sqrt(fan_in). Otherwise a name of SCHEMES, or a callable
    init(shape, rng, dtype), such as partial(he_normal, mode="fan_avg"); the bias is zero then.
    """
    rng, dtype = generator(rng), layer_dtype(function, dtype)
    if init == "default":
        bound = 1 / sqrt(fans(shape)[0])
        weight = uniform(shape, rng, dtype, bound)
        return weight, uniform(shape[:1], rng, dtype, bound) if bias else None
    scheme = init if callable(init) else SCHEMES.get(init)
    if scheme is None:
        names = ", ".join(["default", *SCHEMES])
        raise ValueError(f"{function}: init must be a callable or one of {names}, got {init!r}")
    weight = np.ascontiguousarray(scheme(shape, rng, dtype), dtype)
    if weight.shape != shape:
        raise ValueError(f"{function}: init gave shape {weight.shape} for a weight of shape {shape}")
    return weight, np.zeros(shape[:1], dtype) if bias else None
