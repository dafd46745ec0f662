"""The public kernels. Array in, the same kind of array out; see each function's docstring for formula and shapes.

Names are resolved on first use (PEP 562), so that importing this package loads neither NumPy nor Numba.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what __getattr__ finds, for type checkers and editors
    from tilewise.kernels.activation import *
    from tilewise.kernels.batchnorm import *
    from tilewise.kernels.conv import *
    from tilewise.kernels.dispatch import *
    from tilewise.kernels.dropout_mask import *
    from tilewise.kernels.gemm import *
    from tilewise.kernels.optim import *
    from tilewise.kernels.padding import *
    from tilewise.kernels.pool import *
    from tilewise.kernels.recurrent import *

# module -> the public functions it defines; one line for each op family
_EXPORTS = {
    "gemm": ("matmul", "matmul_backward", "linear", "linear_backward"),
    "conv": (
        "conv2d",
        "prepare_conv2d",
        "conv2d_backward",
        "conv_transpose2d",
        "conv_transpose2d_backward",
    ),
    "pool": (
        "max_pool2d",
        "max_pool2d_backward",
        "avg_pool2d",
        "avg_pool2d_backward",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool2d_backward",
        "adaptive_max_pool2d",
        "adaptive_max_pool2d_backward",
        "max_unpool2d",
        "max_unpool2d_backward",
    ),
    "batchnorm": ("batch_norm", "batch_norm_backward"),
    "padding": ("pad", "pad_backward"),
    "recurrent": ("lstm", "lstm_backward", "rnn", "rnn_backward"),
    "activation": (
        "relu",
        "relu_backward",
        "leaky_relu",
        "leaky_relu_backward",
        "sigmoid",
        "sigmoid_backward",
        "tanh",
        "tanh_backward",
        "softmax",
        "softmax_backward",
        "log_softmax",
        "log_softmax_backward",
        "step",
        "sign",
    ),
    "dropout_mask": ("dropout", "dropout_backward"),
    "optim": ("sgd_step", "adagrad_step", "rmsprop_step", "adam_step"),
    "dispatch": ("using", "explain", "devices"),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'tilewise.kernels' has no attribute {name!r}")
    value = getattr(import_module(f"tilewise.kernels.{module}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(__all__))
