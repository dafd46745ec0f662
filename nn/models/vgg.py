"""VGG (Simonyan and Zisserman 2015, "Very deep convolutional networks for large-scale image recognition")."""

import numpy as np
from numpy.typing import DTypeLike

from ..activation import ReLU
from ..containers import Sequential
from ..dropout import Dropout
from ..init import Rng
from ..module import Module
from ..pool import AdaptiveAvgPool2d, MaxPool2d
from ..shape import Flatten
from .blocks import HE_FAN_OUT, NORMAL, Layers

# channels of the 3x3 convolutions as multiples of `width`; a pool halves the image after each group
_VGG11 = ((1,), (2,), (4, 4), (8, 8), (8, 8))
_VGG16 = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))


def vgg11(
    classes: int = 1000,
    channels: int = 3,
    *,
    batch_norm: bool = False,
    width: int = 64,
    hidden: int = 4096,
    dropout: float = 0.5,
    init=None,
    rng: Rng = None,
    dtype: DTypeLike = np.float32,
) -> Sequential:
    """VGG-11 for images (N, channels, H, W) of at least 32 pixels, 224 as published; the result is (N, classes) logits.

    132,863,336 parameters, most of them in the first dense layer. The state_dict keys are those of torchvision's vgg11,
    and with batch norm vgg11_bn's: "features.0.weight", "classifier.6.bias".

    Args:
        batch_norm: whether each convolution has one after it.
        width: channels of the first convolution; the last have eight times as many.
        hidden: features of the two hidden dense layers.
        dropout: the probability after each of them.
        init: of every layer, see `Conv2d`; None: torchvision's, which is He's of fan_out for convolutions and normal
            with deviation 0.01 for dense layers. "zeros" is the quickest where weights are loaded.
        rng: a numpy.random.Generator or a seed, for the initial values and the dropout.
    """
    make = Layers(init, HE_FAN_OUT, NORMAL, rng, dtype)
    return _vgg(_VGG11, make, classes, channels, batch_norm, width, hidden, dropout)


def vgg16(
    classes: int = 1000,
    channels: int = 3,
    *,
    batch_norm: bool = False,
    width: int = 64,
    hidden: int = 4096,
    dropout: float = 0.5,
    init=None,
    rng: Rng = None,
    dtype: DTypeLike = np.float32,
) -> Sequential:
    """VGG-16, 138,357,544 parameters; arguments and result as `vgg11`, keys as torchvision's vgg16 or vgg16_bn."""
    make = Layers(init, HE_FAN_OUT, NORMAL, rng, dtype)
    return _vgg(_VGG16, make, classes, channels, batch_norm, width, hidden, dropout)


def _vgg(
    groups: tuple[tuple[int, ...], ...],
    make: Layers,
    classes: int,
    channels: int,
    batch_norm: bool,
    width: int,
    hidden: int,
    dropout: float,
) -> Sequential:
    features: list[Module] = []
    for group in groups:
        for size in group:
            features.append(make.conv(channels, width * size, 3, bias=True))
            features += [make.norm(width * size), ReLU()] if batch_norm else [ReLU()]
            channels = width * size
        features.append(MaxPool2d(2))
    classifier: list[Module] = []
    for inputs, outputs in ((channels * 7 * 7, hidden), (hidden, hidden)):
        classifier += [make.linear(inputs, outputs), ReLU(), Dropout(dropout, rng=make.rng)]
    return Sequential(
        {
            "features": Sequential(*features),
            "avgpool": AdaptiveAvgPool2d(7),
            "flatten": Flatten(),
            "classifier": Sequential(*classifier, make.linear(hidden, classes)),
        }
    )
