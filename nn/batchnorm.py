"""Batch normalisation layers."""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ..kernels import batch_norm, batch_norm_backward
from ..kernels.shapes import integer
from .conv import layer_layout
from .init import layer_dtype
from .module import Module, Parameter


class _BatchNorm(Module):
    """y = (x - mean) / sqrt(var + eps) * weight + bias for each channel.

    In training mode mean and var (biased) are those of the batch, and the running statistics move towards them:
    running = (1 - momentum) * running + momentum * batch, with the unbiased variance. In evaluation mode the running
    statistics are used, and also in training mode while `frozen` is True (fine-tuning a trained network).

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: the weight of the newest batch in the running statistics.
        affine: whether there are weight (ones at first) and bias (zeros).
        dtype: of the parameters and statistics; x must have it too.
    """

    buffers = ("running_mean", "running_var", "num_batches_tracked")
    optional_buffers = ("num_batches_tracked",)
    counters = ("frozen",)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        *,
        dtype: DTypeLike = np.float32,
    ):
        self.num_features = integer(type(self).__name__, "num_features", num_features)
        dtype = layer_dtype(type(self).__name__, dtype)
        self.eps = eps
        self.momentum = momentum
        self.frozen = False
        self.weight = Parameter(np.ones(self.num_features, dtype)) if affine else None
        self.bias = Parameter(np.zeros(self.num_features, dtype)) if affine else None
        self.running_mean = np.zeros(self.num_features, dtype)
        self.running_var = np.ones(self.num_features, dtype)
        self.num_batches_tracked = np.zeros((), np.int64)

    def _forward(self, x: np.ndarray, layout: str) -> np.ndarray:
        weight = None if self.weight is None else self.weight.data
        bias = None if self.bias is None else self.bias.data
        batch = self.training and not self.frozen
        state = (self.running_mean, self.running_var, weight, bias, batch, self.momentum, self.eps)
        result: Any = batch_norm(x, *state, layout=layout, return_stats=self.training)
        if not self.training:
            return result
        y, mean, invstd = result
        self.num_batches_tracked += batch
        self.keep(x, mean, invstd, batch)
        return y

    def _backward(self, grad: np.ndarray, layout: str) -> np.ndarray:
        x, mean, invstd, batch = self.kept()
        weight = None if self.weight is None else self.weight.data
        grad_x, grad_weight, grad_bias = batch_norm_backward(
            grad, x, mean, invstd, weight, training=batch, layout=layout
        )
        if self.weight is not None and self.bias is not None:
            self.weight.accumulate(grad_weight)
            self.bias.accumulate(grad_bias)
        return grad_x

    def evaluation(self) -> tuple:
        """(running_mean, running_var, weight, bias, eps), as evaluation uses them."""
        weight, bias = (None if p is None else p.data for p in (self.weight, self.bias))
        return self.running_mean, self.running_var, weight, bias, self.eps

    def hold_buffers(self, frozen: bool):
        self.frozen = frozen

    def describe(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}{'' if self.weight else ', affine=False'}"


class BatchNorm1d(_BatchNorm):
    __doc__ = f"Batch normalisation of (N, C) or (N, C, L).\n\n    {_BatchNorm.__doc__}"

    def forward(self, x: np.ndarray) -> np.ndarray:
        if x.ndim not in (2, 3):
            raise ValueError(f"BatchNorm1d: x must have shape (N, C) or (N, C, L), got {x.shape}")
        return self._forward(x if x.ndim == 2 else x[..., None], "NCHW").reshape(x.shape)

    def backward(self, grad: np.ndarray) -> np.ndarray:
        return self._backward(grad if grad.ndim == 2 else grad[..., None], "NCHW").reshape(grad.shape)


class BatchNorm2d(_BatchNorm):
    __doc__ = f'Batch normalisation of (N, C, H, W), or with layout="NHWC" of (N, H, W, C).\n\n    {_BatchNorm.__doc__}'

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        *,
        layout: str = "NCHW",
        dtype: DTypeLike = np.float32,
    ):
        super().__init__(num_features, eps, momentum, affine, dtype=dtype)
        self.layout = layer_layout("BatchNorm2d", layout)

    def forward(self, x: np.ndarray) -> np.ndarray:
        if x.ndim != 4:
            raise ValueError(f"BatchNorm2d: x must have 4 dimensions ({', '.join(self.layout)}), got shape {x.shape}")
        return self._forward(x, self.layout)

    def backward(self, grad: np.ndarray) -> np.ndarray:
        return self._backward(grad, self.layout)
