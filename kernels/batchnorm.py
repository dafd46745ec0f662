"""Batch normalisation and its gradient (Ioffe and Szegedy 2015)."""

import numpy as np

from tilewise.kernels import shapes
from tilewise.kernels.arrays import common_dtype
from tilewise.kernels.operation import Operation, Problem

ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", "sigmoid", "tanh")


def batch_norm(
    x,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    *,
    layout="NCHW",
    activation=None,
    return_stats=False,
):
    """y = activation((x - mean) * invstd * weight + bias) for each channel, with invstd = 1 / sqrt(var + eps).

    In training, mean and var (biased) are those of x over the batch and its pixels, and the running statistics move in
    place: running = (1 - momentum) * running + momentum * batch, with the unbiased variance. An empty batch leaves
    them alone. In evaluation (training=False), mean and var are the running ones.

    Args:
        x: (N, C, H, W), or (N, H, W, C) with layout="NHWC"; unbatched (C, H, W) or (H, W, C); or (N, C) in either
            layout. float16, float32 or float64, on a GPU also bfloat16; any strides.
        running_mean, running_var: (C,), or both None in training. Changed in training, so they may not be read-only
            then.
        weight, bias: (C,) or None, which stand for 1 and 0.
        training: whether to use the statistics of x.
        momentum: the weight of x's statistics in the running ones.
        eps: added to the variance; positive in training.
        layout: "NCHW" or "NHWC".
        activation: None, "relu", "relu6", "leaky_relu" (slope 0.01), "sigmoid" or "tanh", applied in the same pass.
        return_stats: also return what `batch_norm_backward` needs.

    Returns:
        y, of x's shape, dtype and kind; with return_stats (y, mean, invstd), the last two (C,).

    Raises:
        TypeError: not an array; dtypes differ or are not supported; momentum or eps not a number.
        ValueError: a shape, layout or activation that does not fit; only one of the running statistics, or none in
            evaluation; read-only running statistics in training; one value per channel in training, whose variance
            says nothing.
    """
    if training:
        for name, running in (("running_mean", running_mean), ("running_var", running_var)):
            # Here and not in the check, which sees a signature once: the flag is no part of it.
            if isinstance(running, np.ndarray) and not running.flags.writeable:
                raise ValueError(f"batch_norm: {name} is read-only, but training updates it in place")
    options = (bool(training), momentum, eps, layout, activation, bool(return_stats))
    if getattr(x, "ndim", None) != 2:
        return _BATCH_NORM.call((x, running_mean, running_var, weight, bias), options)
    pixels = x.reshape(x.shape[0], 1, 1, x.shape[1])  # channels last, as they lie
    options = (*options[:3], _any_layout("batch_norm", layout), *options[4:])
    result = _BATCH_NORM.call((pixels, running_mean, running_var, weight, bias), options)
    if return_stats:
        return (result[0].reshape(x.shape), *result[1:])
    return result.reshape(x.shape)


def batch_norm_backward(grad, x, mean, invstd, weight=None, *, training=True, layout="NCHW"):
    """The gradients of `batch_norm` without its activation, given those with respect to its result.

    With xhat = (x - mean) * invstd and sums over the batch and its pixels, M values for each channel:

        grad_bias = sum(grad),  grad_weight = sum(grad * xhat)
        grad_x = weight * invstd * (grad - grad_bias / M - xhat * grad_weight / M)     in training
        grad_x = weight * invstd * grad                                                with frozen statistics

    Args:
        grad: the gradient of the result, of x's shape.
        x: the forward's input, in any of its shapes.
        mean, invstd: (C,), as the forward returned them.
        weight: the forward's, (C,) or None.
        training: whether mean and invstd came from x (True) or from the running statistics.
        layout: as in the forward.

    Returns:
        (grad_x, grad_weight, grad_bias): of x's shape, (C,) and (C,).

    Raises:
        TypeError, ValueError: as `batch_norm`.
    """
    options = (bool(training), layout)
    if getattr(x, "ndim", None) != 2 or getattr(grad, "shape", None) != x.shape:
        return _BATCH_NORM_BACKWARD.call((grad, x, mean, invstd, weight), options)
    pixels = (x.shape[0], 1, 1, x.shape[1])
    options = (bool(training), _any_layout("batch_norm_backward", layout))
    operands = (grad.reshape(pixels), x.reshape(pixels), mean, invstd, weight)
    grad_x, grad_weight, grad_bias = _BATCH_NORM_BACKWARD.call(operands, options)
    return grad_x.reshape(x.shape), grad_weight, grad_bias


def _any_layout(function: str, layout) -> str:
    """(N, C) has no layout; the argument is checked all the same."""
    shapes.image_shape(function, "x", (1, 1, 1), layout)
    return "NHWC"


def _channels(function: str, x, layout: str, vectors: dict) -> tuple[int, int]:
    """(values for each channel, channels); every vector that is there must have one element for each channel."""
    if x is None:
        raise TypeError(f"{function}: x must be an array, got None")
    n, c, h, w = shapes.image_shape(function, "x", x.shape, layout)
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (c,):
            raise ValueError(
                f"{function}: {name} must have shape ({c},), one value for each channel, got {vector.shape} "
                f'(x {x.shape}, layout "{layout}")'
            )
    return n * h * w, c


def _check_batch_norm(
    x, running_mean, running_var, weight, bias, training, momentum, eps, layout, activation, return_stats
) -> Problem:
    vectors = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    values, _ = _channels("batch_norm", x, layout, vectors)
    dtype = common_dtype("batch_norm", {"x": x, **vectors})
    if (running_mean is None) != (running_var is None):
        raise ValueError("batch_norm: running_mean and running_var must both be arrays or both None")
    if not training and running_mean is None:
        raise ValueError("batch_norm: running_mean and running_var are required in evaluation (training=False)")
    if training and values == 1:
        raise ValueError(f"batch_norm: more than 1 value per channel is needed in training, got x {x.shape}")
    if activation not in ACTIVATIONS:
        names = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"batch_norm: activation must be one of {names}, got {activation!r}")
    options = {
        "training": training,
        "momentum": shapes.number("batch_norm", "momentum", momentum),
        "eps": shapes.number("batch_norm", "eps", eps, positive=training),
        "layout": layout,
        "activation": activation,
        "return_stats": return_stats,
    }
    unbatched = (0,) if x.ndim == 3 else ()
    moved = 2 * x.size + sum(v.size for v in vectors.values() if v is not None)
    return Problem(options, flops=(7 if training else 2) * x.size, bytes=moved * dtype.itemsize, unbatched=unbatched)


def _check_batch_norm_backward(grad, x, mean, invstd, weight, training, layout) -> Problem:
    for name, required in (("grad", grad), ("x", x), ("mean", mean), ("invstd", invstd)):
        if required is None:
            raise TypeError(f"batch_norm_backward: {name} must be an array, got None")
    if grad.shape != x.shape:
        raise ValueError(f"batch_norm_backward: grad must have x's shape {x.shape}, got {grad.shape}")
    vectors = {"mean": mean, "invstd": invstd, "weight": weight}
    _channels("batch_norm_backward", x, layout, vectors)
    dtype = common_dtype("batch_norm_backward", {"grad": grad, "x": x, **vectors})
    unbatched = (0, 1) if x.ndim == 3 else ()
    options = {"training": training, "layout": layout}
    moved = 3 * x.size + sum(v.size for v in vectors.values() if v is not None) + 2 * mean.size
    return Problem(options, flops=9 * x.size, bytes=moved * dtype.itemsize, unbatched=unbatched)


_BATCH_NORM = Operation(
    "batchnorm",
    "batch_norm",
    ("x", "running_mean", "running_var", "weight", "bias"),
    _check_batch_norm,
    mutates=(1, 2),
    mutates_when=lambda problem: problem.options["training"],
)
_BATCH_NORM_BACKWARD = Operation(
    "batchnorm", "batch_norm_backward", ("grad", "x", "mean", "invstd", "weight"), _check_batch_norm_backward
)
