"""Networks that are known by name, as functions that build them."""

from .inception import googlenet
from .lenet import lenet5
from .mobilenet import mobilenet_v2
from .perceptron import mlp
from .resnet import resnet18, resnet50
from .vgg import vgg11, vgg16

__all__ = ["googlenet", "lenet5", "mlp", "mobilenet_v2", "resnet18", "resnet50", "vgg11", "vgg16"]
