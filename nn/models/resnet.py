"""ResNet (He et al. 2016, "Deep residual learning for image recognition"); the stride of a bottleneck is in its 3x3
convolution, as torchvision has it, where the paper has it in the first 1x1."""

import numpy as np
from numpy.typing import DTypeLike

from ..activation import ReLU
from ..containers import Sequential
from ..init import Rng
from ..module import Module
from ..pool import AdaptiveAvgPool2d, MaxPool2d
from ..shape import Flatten
from .blocks import HE_FAN_OUT, Layers, NamedResidual


def resnet18(
    classes: int = 1000,
    channels: int = 3,
    *,
    width: int = 64,
    init=None,
    rng: Rng = None,
    dtype: DTypeLike = np.float32,
) -> Sequential:
    """ResNet-18 for images (N, channels, H, W), 224 pixels as published; the result is (N, classes) logits.

    11,689,512 parameters. The state_dict keys are torchvision's: "layer1.0.conv1.weight",
    "layer2.0.downsample.0.weight", "fc.bias". `model.fc = Linear(512, n)` replaces the head.

    Args:
        width: channels of the first convolution; the last have eight times as many.
        init: of every layer, see `Conv2d`; None: torchvision's, which is He's of fan_out for convolutions and
            PyTorch's default for the dense layer. "zeros" is the quickest where weights are loaded.
        rng: a numpy.random.Generator or a seed, for the initial values.
    """
    return _resnet(Layers(init, HE_FAN_OUT, "default", rng, dtype), _basic, (2, 2, 2, 2), 1, classes, channels, width)


def resnet50(
    classes: int = 1000,
    channels: int = 3,
    *,
    width: int = 64,
    init=None,
    rng: Rng = None,
    dtype: DTypeLike = np.float32,
) -> Sequential:
    """ResNet-50, 25,557,032 parameters; arguments, keys and result as `resnet18`; its head is Linear(2048, classes)."""
    make = Layers(init, HE_FAN_OUT, "default", rng, dtype)
    return _resnet(make, _bottleneck, (3, 4, 6, 3), 4, classes, channels, width)


def _basic(make: Layers, channels: int, width: int, stride: int) -> dict[str, Module]:
    return {
        "conv1": make.conv(channels, width, 3, stride=stride),
        "bn1": make.norm(width),
        "relu1": ReLU(),
        "conv2": make.conv(width, width, 3),
        "bn2": make.norm(width),
    }


def _bottleneck(make: Layers, channels: int, width: int, stride: int) -> dict[str, Module]:
    return {
        "conv1": make.conv(channels, width, 1),
        "bn1": make.norm(width),
        "relu1": ReLU(),
        "conv2": make.conv(width, width, 3, stride=stride),
        "bn2": make.norm(width),
        "relu2": ReLU(),
        "conv3": make.conv(width, 4 * width, 1),
        "bn3": make.norm(4 * width),
    }


def _resnet(
    make: Layers, branch, depths: tuple[int, ...], expansion: int, classes: int, channels: int, width: int
) -> Sequential:
    modules: dict[str, Module] = {
        "conv1": make.conv(channels, width, 7, stride=2),
        "bn1": make.norm(width),
        "relu": ReLU(),
        "maxpool": MaxPool2d(3, 2, 1),
    }
    channels = width
    for i, depth in enumerate(depths):
        blocks = []
        for j in range(depth):
            stride = 2 if i and not j else 1
            block = branch(make, channels, width << i, stride)
            out_channels = (width << i) * expansion
            if stride > 1 or channels != out_channels:
                projection = make.conv(channels, out_channels, 1, stride=stride)
                block["downsample"] = Sequential(projection, make.norm(out_channels))
            channels = out_channels
            blocks.append(NamedResidual(block | {"relu": ReLU()}))
        modules[f"layer{i + 1}"] = Sequential(*blocks)
    head = {"avgpool": AdaptiveAvgPool2d(1), "flatten": Flatten(), "fc": make.linear(channels, classes)}
    return Sequential(modules | head)
