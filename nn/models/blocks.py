"""What several networks are built of, with torchvision's names and initial values."""

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ..batchnorm import BatchNorm2d
from ..containers import Container, Residual, Sequential
from ..conv import Conv2d
from ..inference import Opened
from ..init import Rng, generator, he_normal, normal
from ..linear import Linear
from ..module import Module

HE_FAN_OUT = partial(he_normal, mode="fan_out")
NORMAL = partial(normal, std=0.01)


class Layers:
    """Makes the layers of one network, which share the dtype, the generator, and how they are initialised.

    Args:
        init: of every layer; None: `conv_init` and `linear_init`, as torchvision has it.
        eps: of batch norm.
    """

    def __init__(self, init, conv_init, linear_init, rng: Rng, dtype: DTypeLike, eps: float = 1e-5):
        self.conv_init, self.linear_init = (conv_init, linear_init) if init is None else (init, init)
        self.rng, self.dtype, self.eps = generator(rng), dtype, eps

    def conv(self, channels: int, out_channels: int, kernel_size: int, **options) -> Conv2d:
        """Padded so that stride 1 keeps the size, without bias unless told."""
        options = {"padding": kernel_size // 2, "bias": False} | options
        return Conv2d(
            channels, out_channels, kernel_size, **options, init=self.conv_init, rng=self.rng, dtype=self.dtype
        )

    def norm(self, channels: int) -> BatchNorm2d:
        return BatchNorm2d(channels, self.eps, dtype=self.dtype)

    def linear(self, features: int, out_features: int) -> Linear:
        return Linear(features, out_features, init=self.linear_init, rng=self.rng, dtype=self.dtype)


class NamedResidual(Container):
    """A residual block whose modules lie flat, under torchvision's names: "downsample" is the shortcut, "relu" comes
    after the sum, and the others, one after the other, are the main branch."""

    def _parts(self) -> tuple[dict[str, Module], Module | None, Module | None]:
        main = dict(self.children())
        shortcut, activation = main.pop("downsample", None), main.pop("relu", None)
        return main, shortcut, activation

    def _residual(self) -> Residual:
        main, shortcut, activation = self._parts()
        return Residual(Sequential(main), shortcut, activation)

    def _one_by_one(self, x: np.ndarray) -> np.ndarray:
        return self._residual()._one_by_one(x)

    def _steps(self, opened: Opened) -> list[Any]:
        main, shortcut, activation = self._parts()
        return opened.residual(self, main.values(), shortcut, activation)

    def backward(self, grad: np.ndarray) -> np.ndarray:
        return self._residual().backward(grad)

    def backward_parameters(self, grad: np.ndarray):
        self._residual().backward_parameters(grad)
