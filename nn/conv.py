"""The convolution layer."""

from collections.abc import Callable, Sequence
from math import gcd
from operator import is_
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ..kernels import conv2d, conv2d_backward, pad, pad_backward, prepare_conv2d
from ..kernels.shapes import Padding, explicit_padding, integer, padding_pairs, pair
from .init import Rng
from .linear import Affine
from .module import changes

Size = int | Sequence[int]  # one number for both, or a pair (height, width)
PaddingLike = int | str | Sequence[int] | Sequence[Sequence[int]]


# Weights up to this many elements are compared one by one, of larger ones about that many are looked at.
_COMPARED, _SAMPLED = 4096, 512
# Uses of one layer whose prepared weights are kept, such as before one batch norm and before another.
_USES = 2

# PyTorch's name -> that of kernels.pad
_PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


class Conv2d(Affine):
    """y = x * weight + bias, a cross-correlation, for x (N, C, H, W), weight (out_channels, C / groups, KH, KW).

    In evaluation mode the first call prepares the weights (`prepare_conv2d`), in a network together with the batch norm
    that follows, and later ones use that: a copy and a packed form, together two to five times the weights' memory.
    train() and load_state_dict() drop it, and it is made anew after an optimiser's step, and when a parameter or
    statistic is another array or has changed in place. Changes in place are looked for in all of a small array, in some
    512 elements spread over a large one, one of each filter at least: loading, scaling or zeroing a filter shows there
    (where that element is not 0), but single numbers changed by hand in more than 4096 may not: call release() then, of
    the layer or of the network.

    Args:
        in_channels, out_channels: C of x and of y; both divisible by groups.
        kernel_size, stride, dilation: an int or a pair (height, width).
        padding: an int, a pair, two pairs ((top, bottom), (left, right)), "valid", "same" or "same_lower".
        groups: how many independent slices the channels are cut into.
        bias: whether there is one.
        padding_mode: what the padding holds: "zeros", or, by a copy of x that is larger, "reflect" (x mirrored at its
            edge pixels), "replicate" (the edge pixels) or "circular" (x from its other side).
        padding_value: what the padding holds instead of zeros, also by a larger copy.
        layout: "NCHW", or "NHWC" for x and y (N, H, W, C); the weight has one shape in both.
        init: "default" (PyTorch's: uniform in +-1 / sqrt(fan_in)), "he_normal", "he_uniform", "xavier_normal",
            "xavier_uniform", "normal", "zeros", or a callable init(shape, rng, dtype); see `tilewise.nn.init`.
        rng: a numpy.random.Generator or a seed, for the initial values.
        dtype: of the parameters; x must have it too.
    """

    transient = ("_kept", "_prepared")
    # by what follows: a layer may be used before several batch norms or activations
    _prepared: dict[tuple, tuple["_Source", Callable]] | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: PaddingLike = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        padding_value: float = 0.0,
        layout: str = "NCHW",
        init="default",
        rng: Rng = None,
        dtype: DTypeLike = np.float32,
    ):
        self.in_channels = integer("Conv2d", "in_channels", in_channels)
        self.out_channels = integer("Conv2d", "out_channels", out_channels)
        self.kernel_size = pair("Conv2d", "kernel_size", kernel_size)
        self.stride = pair("Conv2d", "stride", stride)
        self.padding = layer_padding("Conv2d", padding)
        self.dilation = pair("Conv2d", "dilation", dilation)
        self.groups = integer("Conv2d", "groups", groups)
        self.layout = layer_layout("Conv2d", layout)
        if padding_mode not in _PADDING_MODES:
            raise ValueError(f"Conv2d: padding_mode must be one of {', '.join(_PADDING_MODES)}, got {padding_mode!r}")
        if padding_value != 0 and padding_mode != "zeros":
            raise ValueError(f"Conv2d: a padding_value needs padding_mode zeros, got {padding_mode!r}")
        self.padding_mode, self.padding_value = padding_mode, padding_value
        for name, channels in (("in_channels", self.in_channels), ("out_channels", self.out_channels)):
            if channels % self.groups:
                raise ValueError(f"Conv2d: {name} must be divisible by groups, got {channels} and {self.groups}")
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        super().__init__(shape, bias, init, rng, dtype)

    def _pads_itself(self) -> bool:
        """Whether x is padded before the kernel is called, which knows only zeros."""
        return self.padding_mode != "zeros" or self.padding_value != 0

    def _options(self) -> tuple:
        return (self.stride, 0 if self._pads_itself() else self.padding, self.dilation, self.groups)

    def _pads(self, shape: tuple[int, ...]) -> Padding:
        size = shape[-2:] if self.layout == "NCHW" else shape[-3:-1]
        return padding_pairs("Conv2d", self.padding, (size[0], size[1]), self.kernel_size, self.stride, self.dilation)

    def padded(self, x: np.ndarray) -> np.ndarray:
        """x with the padding that the kernel does not make itself."""
        if not self._pads_itself():
            return x
        check_images("Conv2d", x, self.layout)  # the kernel, which would, gets a padded one
        how: Any = (self._pads(x.shape), _PADDING_MODES[self.padding_mode], self.padding_value)
        y = pad(_planes_last(x, self.layout), *how)
        return y if self.layout == "NCHW" else np.moveaxis(y, -3, -1)

    def _unpadded(self, grad: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The gradient of x, whose shape this is, from that of the padded x."""
        if not self._pads_itself():
            return grad
        planes = shape if self.layout == "NCHW" else (*shape[:-3], shape[-1], *shape[-3:-1])
        mode = _PADDING_MODES[self.padding_mode]
        grad = pad_backward(_planes_last(grad, self.layout), planes, self._pads(shape), mode)
        return grad if self.layout == "NCHW" else np.moveaxis(grad, -3, -1)

    def forward(self, x: np.ndarray) -> np.ndarray:
        padded = self.padded(x)
        if not self.training:
            return self.prepared()(padded)
        bias = None if self.bias is None else self.bias.data
        y = conv2d(padded, self.weight.data, bias, *self._options(), layout=self.layout)
        self.keep(x)
        return y

    def prepared(self, norm: Any = None, activation: str | None = None) -> Callable:
        """The prepared convolution of the parameters as they are now, which takes `padded(x)`.

        norm: the BatchNorm2d that follows, to be folded into it. activation: the name of the one that follows.
        """
        use, kept = (id(norm), activation), self._prepared or {}  # read once: another thread may be at it
        found = kept.get(use)
        if found is not None and found[0].mark is changes.latest and found[0].holds():
            return found[1]
        source = _Source(self, norm, activation)
        if found is not None and source.is_as(found[0]) and found[0].holds():
            found[0].mark = source.mark
        else:
            source.sample()  # before they are read: a change meanwhile is noticed by the next call
            weight, bias = source.arrays[:2]
            options: Any = {"layout": self.layout, "activation": activation, "batch_norm": source.statistics}
            found = (source, prepare_conv2d(weight, bias, *self._options(), **options))
            others = [item for item in kept.items() if item[0] != use][1 - _USES :]
            self._prepared = dict([*others, (use, found)])
        return found[1]

    def release(self):
        self._prepared = None

    def gradients(self, grad, x, needs):
        options = self._options()
        padded = self.padded(x)  # once more: kept, it would be a second copy of x
        grads = conv2d_backward(grad, padded, self.weight.data, *options, layout=self.layout, needs=needs)
        return (None if grads[0] is None else self._unpadded(grads[0], x.shape), *grads[1:])

    def describe(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        plain = {"stride": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1), "groups": 1, "layout": "NCHW"}
        plain |= {"padding_mode": "zeros", "padding_value": 0}
        parts += [f"{name}={getattr(self, name)!r}" for name, usual in plain.items() if getattr(self, name) != usual]
        return ", ".join(parts) + ("" if self.bias else ", bias=False")


class _Source:
    """What a prepared convolution is made of, to see whether that has changed.

    mark: `changes.latest` when this was last what the modules hold.
    """

    __slots__ = ("arrays", "mark", "numbers", "options", "samples", "statistics")

    def __init__(self, layer: Conv2d, norm: Any, activation: str | None):
        self.mark = changes.latest  # before anything is read
        parameters = layer.weight, layer.bias
        self.statistics = None if norm is None else norm.evaluation()
        *vectors, eps = self.statistics or (None,)
        self.arrays = [None if p is None else p.data for p in parameters] + vectors
        versions = [p.version for p in parameters if p is not None]
        self.options = (*layer._options(), layer.layout, activation, eps, *versions)
        self.samples: list[np.ndarray] = []
        self.numbers: list[bytes] = []

    def sample(self):
        self.samples = [_sample(array) for array in self.arrays if array is not None]
        self.numbers = [sample.tobytes() for sample in self.samples]

    def is_as(self, found: "_Source") -> bool:
        """Whether the same arrays and options were found."""
        if self.options != found.options or len(self.arrays) != len(found.arrays):
            return False
        return all(map(is_, self.arrays, found.arrays))

    def holds(self) -> bool:
        """Whether the sampled numbers are what they were."""
        return [sample.tobytes() for sample in self.samples] == self.numbers


def _sample(array: np.ndarray) -> np.ndarray:
    """A view of every element of a small array, of about _SAMPLED of a large one, and of each filter one at least.

    Each element of a large one is a cache line that nothing else in evaluation reads, so they are few.
    """
    if array.size <= _COMPARED:
        return array
    step = min(array.size // _SAMPLED, array.size // len(array))
    while gcd(step, array.size) > 1:  # so that it goes through all filters, in whichever order they lie
        step -= 1
    flat = array.ravel("K")
    return flat[::step] if np.may_share_memory(flat, array) else array  # rather all of it than numbers of a copy


def check_images(function: str, x: np.ndarray, layout: str):
    if x.ndim not in (3, 4):
        axes = ", ".join(layout)
        raise ValueError(f"{function}: x must have 4 dimensions ({axes}), or 3 without N, got shape {x.shape}")


def _planes_last(x: np.ndarray, layout: str) -> np.ndarray:
    """A view with the axes (..., C, H, W)."""
    return x if layout == "NCHW" else np.moveaxis(x, -1, -3)


def layer_padding(function: str, value: PaddingLike):
    """A padding argument in a form that can be kept: a known name, or two pairs."""
    if not isinstance(value, str):
        return explicit_padding(function, value)
    if value not in ("valid", "same", "same_lower"):
        raise ValueError(f'{function}: padding must be numbers, "valid", "same" or "same_lower", got {value!r}')
    return value


def layer_layout(function: str, value: str) -> str:
    if value not in ("NCHW", "NHWC"):
        raise ValueError(f'{function}: layout must be "NCHW" or "NHWC", got {value!r}')
    return value
