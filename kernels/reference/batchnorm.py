"""Batch normalisation in NumPy, and its gradient."""

import numpy as np


@np.errstate(invalid="ignore")  # inf - inf is NaN, and so is that channel
def batch_norm(
    x, running_mean, running_var, weight, bias, *, training, momentum, eps, layout, activation, return_stats
):
    axes, shape = _axes_and_shape(x, layout)
    channels = shape[1] * shape[3]
    values = x.size // max(channels, 1)
    # The statistics in float64: NumPy adds up rows one by one, which in float32 loses digits over many rows.
    if not training:
        mean, variance = running_mean.astype(np.float64), running_var.astype(np.float64)
        centre = running_mean
        centred = x - centre.reshape(shape)
    else:
        mean = x.mean(axes, dtype=np.float64) if values else np.zeros(channels)
        centre = mean.astype(x.dtype)
        centred = x - centre.reshape(shape)
        shifted = np.mean(centred * centred, axes, dtype=np.float64) if values else np.zeros(channels)
        variance = shifted - (mean - centre) ** 2
        if running_mean is not None and values:
            running_mean += momentum * (mean - running_mean)
            running_var += momentum * (variance * (values / (values - 1)) - running_var)
    invstd = 1 / np.sqrt(variance + eps)
    scale = invstd if weight is None else invstd * weight
    offset = (centre - mean) * scale + (0 if bias is None else bias)  # what rounding the mean to x's dtype left over
    y = centred * scale.astype(x.dtype).reshape(shape) + offset.astype(x.dtype).reshape(shape)
    y = _activated(y, activation)
    return (y, centre.copy(), invstd.astype(x.dtype)) if return_stats else y


@np.errstate(invalid="ignore")
def batch_norm_backward(grad, x, mean, invstd, weight, *, training, layout):
    axes, shape = _axes_and_shape(x, layout)
    normalised = (x - mean.reshape(shape)) * invstd.reshape(shape)
    grad_bias = grad.sum(axes)
    grad_weight = (grad * normalised).sum(axes)
    scale = invstd if weight is None else invstd * weight
    grad_x = grad
    if training and x.size:
        values = x.size // mean.size
        grad_x = grad - (grad_bias / values).reshape(shape) - normalised * (grad_weight / values).reshape(shape)
    return grad_x * scale.reshape(shape), grad_weight, grad_bias


def _axes_and_shape(x, layout):
    """What is summed over, and the shape in which a vector of channels meets x."""
    if layout == "NCHW":
        return (0, 2, 3), (1, x.shape[1], 1, 1)
    return (0, 1, 2), (1, 1, 1, x.shape[3])


def _activated(y, activation):
    if activation == "relu":
        return np.maximum(y, 0)
    if activation == "relu6":
        return np.clip(y, 0, 6)
    if activation == "leaky_relu":
        return np.where(y > 0, y, y * y.dtype.type(0.01))
    if activation == "sigmoid":
        e = np.exp(-np.abs(y))
        return np.where(y < 0, e, 1) / (1 + e)
    return np.tanh(y) if activation == "tanh" else y
