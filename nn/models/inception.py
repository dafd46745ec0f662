"""GoogLeNet (Szegedy et al. 2015, "Going deeper with convolutions"), with batch norm as torchvision has it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from ..activation import ReLU
from ..containers import Concat, Sequential, learns
from ..dropout import Dropout
from ..inference import Opened
from ..init import Rng
from ..module import Module
from ..pool import AdaptiveAvgPool2d, MaxPool2d
from ..shape import Flatten
from .blocks import NORMAL, Layers

# name -> channels of the inception block: 1x1; 3x3 reduced, 3x3; "5x5" reduced, "5x5"; after the pool
_BLOCKS = {
    "inception3a": (64, 96, 128, 16, 32, 32),
    "inception3b": (128, 128, 192, 32, 96, 64),
    "maxpool3": (3,),
    "inception4a": (192, 96, 208, 16, 48, 64),
    "inception4b": (160, 112, 224, 24, 64, 64),
    "inception4c": (128, 128, 256, 24, 64, 64),
    "inception4d": (112, 144, 288, 32, 64, 64),
    "inception4e": (256, 160, 320, 32, 128, 128),
    "maxpool4": (2,),
    "inception5a": (256, 160, 320, 32, 128, 128),
    "inception5b": (384, 192, 384, 48, 128, 128),
}
_HEADS = {"inception4a": "aux1", "inception4d": "aux2"}  # block -> the auxiliary head on its result


class ImageNetInput(Module):
    """Images normalised by ImageNet's means and deviations, brought to 0.5 +- 0.5: torchvision's transform_input."""

    def forward(self, x: np.ndarray) -> np.ndarray:
        self.keep()
        return x * self._scale(x) + self._per_channel(x, (0.485 - 0.5, 0.456 - 0.5, 0.406 - 0.5)) / x.dtype.type(0.5)

    def backward(self, grad: np.ndarray) -> np.ndarray:
        self.kept()
        return grad * self._scale(grad)

    def _scale(self, x: np.ndarray) -> np.ndarray:
        return self._per_channel(x, (0.229, 0.224, 0.225)) / x.dtype.type(0.5)

    def _per_channel(self, x: np.ndarray, values: tuple[float, ...]) -> np.ndarray:
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"ImageNetInput: x must have shape (N, 3, H, W), got {x.shape}")
        return np.array(values, x.dtype).reshape(3, 1, 1)


class GoogLeNetOutputs(NamedTuple):
    """Logits (N, classes) of the network and of its auxiliary heads, in torchvision's order."""

    logits: np.ndarray
    aux_logits2: np.ndarray
    aux_logits1: np.ndarray


class GoogLeNet(Sequential):
    """A Sequential with auxiliary heads, "aux1" and "aux2", beside it: two more classifiers on what lies half-way.

    In training forward returns `GoogLeNetOutputs`, and backward takes the three gradients in that order (None for that
    of a head: it is left out). In evaluation the heads are not computed, and forward returns the logits alone.

    `nn.AuxiliaryLoss` is the loss of all three. A slice is a Sequential of the layers in it, without the heads.
    """

    def __getitem__(self, index: int | slice) -> Any:
        part = super().__getitem__(index)
        if not isinstance(part, GoogLeNet):
            return part
        trunk = Sequential(dict(part._trunk()))  # its result is not the logits that the heads stand beside
        trunk.training = self.training
        return trunk

    def _trunk(self) -> list[tuple[str, Module]]:
        return [(name, module) for name, module in self.children() if name not in _HEADS.values()]

    def _one_by_one(self, x: np.ndarray) -> Any:
        logits = {}
        for name, module in self._trunk():
            x = module(x)
            if self.training and name in _HEADS:
                logits[_HEADS[name]] = self._modules[_HEADS[name]](x)
        return GoogLeNetOutputs(x, logits["aux2"], logits["aux1"]) if self.training else x

    def _members(self) -> tuple[Module, ...]:
        return tuple(module for _, module in self._trunk())

    def _steps(self, opened: Opened) -> list[Any]:
        return opened.sequence(self._members())

    def backward(self, grad: Any) -> np.ndarray:
        return self._back(grad, 0)

    def backward_parameters(self, grad: Any):
        """Goes back no further than to the first layer of the trunk that learns."""
        trunk = self._members()
        self._back(grad, next((i for i, module in enumerate(trunk) if learns(module)), len(trunk)), needs_x=False)

    def _back(self, grad: Any, first: int, needs_x: bool = True) -> Any:
        """Through the trunk down to the module `first`, and through the heads whose gradient is wanted."""
        if not isinstance(grad, Sequence) or len(grad) != len(GoogLeNetOutputs._fields):
            raise TypeError(
                f"GoogLeNet.backward: grad must be the gradients of {', '.join(GoogLeNetOutputs._fields)}, "
                f"got {type(grad).__name__}"
            )
        through, aux2, aux1 = grad
        of_heads = {"aux1": aux1, "aux2": aux2}
        for i, (name, module) in reversed(list(enumerate(self._trunk()))):
            of_head = of_heads.get(_HEADS.get(name, ""))
            if of_head is not None:
                head = self._modules[_HEADS[name]]
                if i >= first:
                    through = through + head.backward(of_head)
                else:
                    head.backward_parameters(of_head)
            if i > first or (i == first and needs_x):
                through = module.backward(through)
            elif i == first:
                module.backward_parameters(through)
        return through


def googlenet(
    classes: int = 1000,
    channels: int = 3,
    *,
    width: int = 64,
    dropout: float = 0.2,
    aux_logits: bool = False,
    dropout_aux: float = 0.7,
    transform_input: bool = False,
    init=None,
    rng: Rng = None,
    dtype: DTypeLike = np.float32,
) -> Sequential:
    """GoogLeNet for images (N, channels, H, W), 224 pixels as published; the result is (N, classes) logits.

    6,624,904 parameters. The state_dict keys are torchvision's: "inception3a.branch2.0.conv.weight", "fc.bias". As
    there, the branch that the paper gives 5x5 kernels has 3x3.

    Args:
        width: channels of the first convolution; all others are in proportion.
        dropout: the probability before the dense layer.
        aux_logits: with the two auxiliary heads, as torchvision's trained weights have them: 13,004,888 parameters, and
            a `GoogLeNet`, which returns three logits in training; evaluation leaves the heads out. Only training from
            scratch needs them, with `nn.AuxiliaryLoss(nn.CrossEntropyLoss())`. Without: a Sequential, which takes
            torchvision's weights with strict=False; the unexpected keys all begin with "aux".
        dropout_aux: the probability before the last layer of each auxiliary head.
        transform_input: whether images are rescaled first; torchvision's trained weights need it.
        init: of every layer, see `Conv2d`; None: normal with deviation 0.01, as torchvision has it. "zeros" is the
            quickest where weights are loaded.
        rng: a numpy.random.Generator or a seed, for the initial values and the dropout.
    """
    make = Layers(init, NORMAL, NORMAL, rng, dtype, eps=1e-3)
    modules: dict[str, Module] = {"transform": ImageNetInput()} if transform_input else {}
    modules |= {
        "conv1": _unit(make, channels, width, 7, stride=2),
        "maxpool1": MaxPool2d(3, 2, ceil_mode=True),
        "conv2": _unit(make, width, width, 1),
        "conv3": _unit(make, width, 3 * width, 3),
        "maxpool2": MaxPool2d(3, 2, ceil_mode=True),
    }
    channels, heads = 3 * width, {}
    for name, sizes in _BLOCKS.items():
        if len(sizes) == 1:
            modules[name] = MaxPool2d(sizes[0], 2, ceil_mode=True)
            continue
        sizes = tuple(size * width // 64 for size in sizes)
        modules[name] = _inception(make, channels, *sizes)
        channels = sizes[0] + sizes[2] + sizes[4] + sizes[5]
        if aux_logits and name in _HEADS:
            heads[_HEADS[name]] = _auxiliary(make, channels, width, classes, dropout_aux)
    head = {"avgpool": AdaptiveAvgPool2d(1), "flatten": Flatten(), "dropout": Dropout(dropout, rng=make.rng)}
    kind = GoogLeNet if aux_logits else Sequential
    return kind(modules | heads | head | {"fc": make.linear(channels, classes)})


def _auxiliary(make: Layers, channels: int, width: int, classes: int, dropout: float) -> Sequential:
    return Sequential(
        {
            "avgpool": AdaptiveAvgPool2d(4),
            "conv": _unit(make, channels, 2 * width, 1),
            "flatten": Flatten(),
            "fc1": make.linear(16 * 2 * width, 16 * width),
            "relu": ReLU(),
            "dropout": Dropout(dropout, rng=make.rng),
            "fc2": make.linear(16 * width, classes),
        }
    )


def _unit(make: Layers, channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> Sequential:
    conv = make.conv(channels, out_channels, kernel_size, stride=stride)
    return Sequential({"conv": conv, "bn": make.norm(out_channels), "relu": ReLU()})


def _inception(
    make: Layers, channels: int, ones: int, reduce3: int, threes: int, reduce5: int, fives: int, pooled: int
):
    return Concat(
        {
            "branch1": _unit(make, channels, ones, 1),
            "branch2": Sequential(_unit(make, channels, reduce3, 1), _unit(make, reduce3, threes, 3)),
            "branch3": Sequential(_unit(make, channels, reduce5, 1), _unit(make, reduce5, fives, 3)),
            "branch4": Sequential(MaxPool2d(3, 1, 1, ceil_mode=True), _unit(make, channels, pooled, 1)),
        }
    )
