"""The dense layer, and what it shares with the convolution."""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ..kernels import linear, linear_backward
from ..kernels.shapes import integer
from .init import Rng, layer_values
from .module import Module, Parameter


class Affine(Module):
    """weight and bias, and a backward that asks its kernel only for the gradients somebody needs."""

    def __init__(self, shape: tuple[int, ...], bias: bool, init, rng: Rng, dtype: DTypeLike):
        weight, offset = layer_values(type(self).__name__, init, shape, bias, rng, dtype)
        self.weight = Parameter(weight)
        self.bias = None if offset is None else Parameter(offset)

    def gradients(self, grad: np.ndarray, x: np.ndarray, needs: tuple[str, ...]) -> tuple:
        """(grad_x, grad_weight, grad_bias), None where not among `needs`."""
        raise NotImplementedError

    def _flops(self, x: np.ndarray, y: np.ndarray) -> int:
        return 2 * self.weight.size * y.size // self.weight.shape[0] + y.size * (self.bias is not None)

    def backward(self, grad: np.ndarray) -> np.ndarray:
        return self._backward(grad, ("x",))

    def backward_parameters(self, grad: np.ndarray):
        self._backward(grad, ())

    def _backward(self, grad: np.ndarray, needs: tuple[str, ...]) -> Any:
        (x,) = self.kept()
        if self.weight.requires_grad:
            needs += ("weight",)
        if self.bias is not None and self.bias.requires_grad:
            needs += ("bias",)
        if not needs:
            return None
        grad_x, grad_weight, grad_bias = self.gradients(grad, x, needs)
        self.weight.accumulate(grad_weight)
        if self.bias is not None:
            self.bias.accumulate(grad_bias)
        return grad_x


class Linear(Affine):
    """y = x weight^T + bias, for x (..., in_features), weight (out_features, in_features).

    Args:
        in_features, out_features: the lengths of the last axis of x and y.
        bias: whether there is one.
        init: "default" (PyTorch's: uniform in +-1 / sqrt(in_features)), "he_normal", "he_uniform", "xavier_normal",
            "xavier_uniform", "normal", "zeros", or a callable init(shape, rng, dtype); see `tilewise.nn.init`.
        rng: a numpy.random.Generator or a seed, for the initial values.
        dtype: of the parameters; x must have it too.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        init="default",
        rng: Rng = None,
        dtype: DTypeLike = np.float32,
    ):
        self.in_features = integer("Linear", "in_features", in_features)
        self.out_features = integer("Linear", "out_features", out_features)
        super().__init__((self.out_features, self.in_features), bias, init, rng, dtype)

    def forward(self, x: np.ndarray) -> np.ndarray:
        y = linear(x, self.weight.data, None if self.bias is None else self.bias.data)
        self.keep(x)
        return y

    def gradients(self, grad, x, needs):
        return linear_backward(grad, x, self.weight.data, needs=needs)

    def describe(self) -> str:
        return f"{self.in_features}, {self.out_features}{'' if self.bias else ', bias=False'}"
