"""MobileNetV2 (Sandler et al. 2018, "MobileNetV2: inverted residuals and linear bottlenecks")."""

import numpy as np
from numpy.typing import DTypeLike

from ..activation import ReLU6
from ..containers import Sequential
from ..dropout import Dropout
from ..init import Rng
from ..module import Module
from ..pool import AdaptiveAvgPool2d
from ..shape import Flatten
from .blocks import HE_FAN_OUT, NORMAL, Layers, NamedResidual

# the paper's table 2: expansion, channels, blocks, stride of the first
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def mobilenet_v2(
    classes: int = 1000,
    channels: int = 3,
    *,
    width_mult: float = 1.0,
    dropout: float = 0.2,
    init=None,
    rng: Rng = None,
    dtype: DTypeLike = np.float32,
) -> Sequential:
    """MobileNetV2 for images (N, channels, H, W), 224 pixels as published; the result is (N, classes) logits.

    3,504,872 parameters. The state_dict keys are torchvision's: "features.1.conv.0.0.weight", "classifier.1.bias".

    Args:
        width_mult: factor of all channels but the last convolution's, rounded to multiples of 8 (see `rounded`).
        dropout: the probability before the dense layer.
        init: of every layer, see `Conv2d`; None: torchvision's, which is He's of fan_out for convolutions and normal
            with deviation 0.01 for the dense layer. "zeros" is the quickest where weights are loaded.
        rng: a numpy.random.Generator or a seed, for the initial values and the dropout.
    """
    make = Layers(init, HE_FAN_OUT, NORMAL, rng, dtype)
    width, last = rounded(32 * width_mult), rounded(1280 * max(1.0, width_mult))
    features: list[Module] = [_unit(make, channels, width, 3, stride=2)]
    for expansion, base, blocks, stride in _STAGES:
        for i in range(blocks):
            out_channels = rounded(base * width_mult)
            features.append(_inverted(make, width, out_channels, expansion, 1 if i else stride))
            width = out_channels
    features.append(_unit(make, width, last, 1))
    return Sequential(
        {
            "features": Sequential(*features),
            "avgpool": AdaptiveAvgPool2d(1),
            "flatten": Flatten(),
            "classifier": Sequential(Dropout(dropout, rng=make.rng), make.linear(last, classes)),
        }
    )


def rounded(channels: float) -> int:
    """The nearest multiple of 8, at least 8, and the next one where that loses more than a tenth."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


def _unit(make: Layers, channels: int, out_channels: int, kernel_size: int, **options) -> Sequential:
    return Sequential(make.conv(channels, out_channels, kernel_size, **options), make.norm(out_channels), ReLU6())


def _inverted(make: Layers, channels: int, out_channels: int, expansion: int, stride: int) -> Module:
    """Expand by 1x1, filter each channel by 3x3, project by 1x1; a residual block where the shape stays."""
    hidden = channels * expansion
    layers = [] if expansion == 1 else [_unit(make, channels, hidden, 1)]
    layers.append(_unit(make, hidden, hidden, 3, stride=stride, groups=hidden))
    block = {"conv": Sequential(*layers, make.conv(hidden, out_channels, 1), make.norm(out_channels))}
    return NamedResidual(block) if stride == 1 and channels == out_channels else Sequential(block)
