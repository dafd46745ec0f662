"""Layers, losses, optimisers and a training loop over `tilewise.kernels`.

A layer is state plus one kernel call. Names, arguments and state_dict keys are PyTorch's, so that trained weights load.
Arrays are NumPy's. There is no tape: `module.backward(grad)` follows `module.forward(x)`.

Names are resolved on first use (PEP 562), so that importing this package loads neither NumPy nor Numba.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what __getattr__ finds, for type checkers and editors
    from . import augment, init, models, optim
    from .activation import *
    from .auxiliary import *
    from .batchnorm import *
    from .checkpoint import *
    from .clip import *
    from .containers import *
    from .conv import *
    from .data import *
    from .dropout import *
    from .history import *
    from .inspection import *
    from .io import *
    from .linear import *
    from .losses import *
    from .metrics import *
    from .module import *
    from .nonfinite import *
    from .optim import *
    from .penalty import *
    from .picture import *
    from .pool import *
    from .recurrent import *
    from .schedules import *
    from .shape import *
    from .stopping import *
    from .train import *

# module -> the public names it defines
_EXPORTS = {
    "module": ("Module", "Parameter"),
    "containers": ("Sequential", "Residual", "Concat"),
    "linear": ("Linear",),
    "conv": ("Conv2d",),
    "pool": ("MaxPool2d", "AvgPool2d", "WeightedAvgPool2d", "AdaptiveAvgPool2d"),
    "batchnorm": ("BatchNorm1d", "BatchNorm2d"),
    "activation": (
        "Identity",
        "Step",
        "Sign",
        "ReLU",
        "ReLU6",
        "LeakyReLU",
        "Sigmoid",
        "Tanh",
        "Softmax",
        "LogSoftmax",
    ),
    "dropout": ("Dropout",),
    "recurrent": ("RNN", "LSTM"),
    "shape": ("Flatten", "Repeat"),
    "losses": (
        "Loss",
        "CrossEntropyLoss",
        "NLLLoss",
        "BCELoss",
        "BCEWithLogitsLoss",
        "MSELoss",
        "RMSELoss",
        "L1Loss",
        "one_hot",
    ),
    "auxiliary": ("AuxiliaryLoss",),
    "optim": ("Optimizer", "SGD", "Adagrad", "RMSprop", "Adam", "AdamW"),
    "clip": ("clip_grad_norm_", "clip_grad_value_"),
    "penalty": ("l1_penalty_",),
    "schedules": (
        "Schedule",
        "DecadeLR",
        "StepLR",
        "ExponentialLR",
        "CosineAnnealingLR",
        "ReduceLROnPlateau",
    ),
    "io": ("save", "load"),
    "picture": ("plot_model",),
    "inspection": ("summary", "Summary", "gradient_norms", "plot_gradient_norms"),
    "train": ("fit", "evaluate", "predict", "Evaluation"),
    "data": ("split",),
    "history": ("History", "TensorBoard"),
    "metrics": ("accuracy", "top_k_accuracy"),
    "stopping": ("EarlyStopping",),
    "checkpoint": ("Checkpoint",),
    "nonfinite": ("NonFiniteError",),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}
_SUBMODULES = ("augment", "init", "models", "optim")  # used by name: nn.init.he_normal, nn.models.lenet5

__all__ = [*_MODULE_OF, *_SUBMODULES]


def __getattr__(name: str):
    if name in _SUBMODULES:
        return import_module(f"tilewise.nn.{name}")
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'tilewise.nn' has no attribute {name!r}")
    value = getattr(import_module(f"tilewise.nn.{module}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(__all__))
