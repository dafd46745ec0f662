"""Pooling layers. The arguments are those of the kernels of the same names."""

import numpy as np
from numpy.typing import ArrayLike

from ..kernels import (
    adaptive_avg_pool2d,
    adaptive_avg_pool2d_backward,
    avg_pool2d,
    avg_pool2d_backward,
    conv2d,
    conv2d_backward,
    max_pool2d,
    max_pool2d_backward,
)
from ..kernels.shapes import pair
from .conv import PaddingLike, Size, check_images, layer_layout, layer_padding
from .module import Module


class _Window(Module):
    """A window that moves over the image: kernel_size, stride (None: kernel_size), padding."""

    def __init__(self, kernel_size: Size, stride: Size | None, padding: PaddingLike, layout: str):
        name = type(self).__name__
        self.kernel_size = pair(name, "kernel_size", kernel_size)
        self.stride = self.kernel_size if stride is None else pair(name, "stride", stride)
        self.padding = layer_padding(name, padding)
        self.layout = layer_layout(name, layout)

    def describe(self) -> str:
        padding = "" if self.padding == ((0, 0), (0, 0)) else f", padding={self.padding!r}"
        return f"kernel_size={self.kernel_size}, stride={self.stride}{padding}"


class MaxPool2d(_Window):
    """The maximum of each window; the gradient goes to the element that won."""

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: PaddingLike = 0,
        dilation: Size = 1,
        *,
        ceil_mode: bool = False,
        layout: str = "NCHW",
    ):
        super().__init__(kernel_size, stride, padding, layout)
        self.dilation = pair("MaxPool2d", "dilation", dilation)
        self.ceil_mode = ceil_mode

    def _options(self) -> tuple:
        return (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)

    def forward(self, x: np.ndarray) -> np.ndarray:
        if not self.training:
            return max_pool2d(x, *self._options(), layout=self.layout)
        y, indices = max_pool2d(x, *self._options(), return_indices=True, layout=self.layout)
        self.keep(indices, x.shape)
        return y

    def backward(self, grad: np.ndarray) -> np.ndarray:
        indices, shape = self.kept()
        return max_pool2d_backward(grad, indices, shape, *self._options(), layout=self.layout)


class AvgPool2d(_Window):
    """The mean of each window; the gradient is spread evenly over it."""

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: PaddingLike = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
        *,
        layout: str = "NCHW",
    ):
        super().__init__(kernel_size, stride, padding, layout)
        self.ceil_mode = ceil_mode
        self.count_include_pad = count_include_pad
        self.divisor_override = divisor_override

    def _options(self) -> tuple:
        window = (self.kernel_size, self.stride, self.padding)
        return (*window, self.ceil_mode, self.count_include_pad, self.divisor_override)

    def forward(self, x: np.ndarray) -> np.ndarray:
        y = avg_pool2d(x, *self._options(), layout=self.layout)
        self.keep(x.shape)
        return y

    def backward(self, grad: np.ndarray) -> np.ndarray:
        (shape,) = self.kept()
        return avg_pool2d_backward(grad, shape, *self._options(), layout=self.layout)


class WeightedAvgPool2d(_Window):
    """The average of each window, with given weights: sum(w * x) / sum(w). Padding counts as zeros.

    A convolution of each channel by itself (groups = C) with one kernel, w / sum(w), that is not trained.

    Args:
        weights: (KH, KW), the window and its weights; their sum is positive.
        stride: an int or a pair; the window's size where None.
        padding, layout: as in `AvgPool2d`.
    """

    def __init__(
        self, weights: ArrayLike, stride: Size | None = None, padding: PaddingLike = 0, *, layout: str = "NCHW"
    ):
        given = np.asarray(weights, np.float64)
        if given.ndim != 2 or given.size == 0:
            raise ValueError(f"WeightedAvgPool2d: weights must have shape (KH, KW), got {given.shape}")
        if not (np.isfinite(given).all() and given.sum() > 0):
            raise ValueError(f"WeightedAvgPool2d: weights must be finite and their sum positive, got {given.tolist()}")
        super().__init__(given.shape, stride, padding, layout)
        self.weights = given / given.sum()

    def _arguments(self, shape: tuple[int, ...], dtype: np.dtype) -> tuple:
        """(kernel, options) for images of this shape."""
        channels = shape[-3 if self.layout == "NCHW" else -1]
        kernel = np.broadcast_to(self.weights.astype(dtype), (channels, 1, *self.kernel_size))
        return kernel, {"stride": self.stride, "padding": self.padding, "groups": channels, "layout": self.layout}

    def forward(self, x: np.ndarray) -> np.ndarray:
        check_images("WeightedAvgPool2d", x, self.layout)  # before its channels are counted
        kernel, options = self._arguments(x.shape, x.dtype)
        y = conv2d(x, kernel, **options)
        self.keep(x)
        return y

    def backward(self, grad: np.ndarray) -> np.ndarray:
        (x,) = self.kept()
        kernel, options = self._arguments(x.shape, x.dtype)
        return conv2d_backward(grad, x, kernel, **options, needs=("x",))[0]

    def describe(self) -> str:
        return f"weights={self.weights.tolist()}, {super().describe()}"


class AdaptiveAvgPool2d(Module):
    """The mean of each of output_size cells, however large the image; output_size 1 is global average pooling."""

    def __init__(self, output_size: Size, *, layout: str = "NCHW"):
        self.output_size = pair("AdaptiveAvgPool2d", "output_size", output_size)
        self.layout = layer_layout("AdaptiveAvgPool2d", layout)

    def forward(self, x: np.ndarray) -> np.ndarray:
        y = adaptive_avg_pool2d(x, self.output_size, layout=self.layout)
        self.keep(x.shape)
        return y

    def backward(self, grad: np.ndarray) -> np.ndarray:
        (shape,) = self.kept()
        return adaptive_avg_pool2d_backward(grad, shape, layout=self.layout)

    def describe(self) -> str:
        return f"output_size={self.output_size}"
