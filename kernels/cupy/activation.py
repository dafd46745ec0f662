"""Activations and their gradients on the GPU; src/activation.cu says how."""

from functools import partial

from tilewise.kernels import activation_plan
from tilewise.kernels.activation_plan import LEAKY_RELU, RELU, SIGMOID, SIGN, STEP, TANH
from tilewise.kernels.cupy.activation_softmax import (  # noqa: F401
    log_softmax,
    log_softmax_backward,
    softmax,
    softmax_backward,
)
from tilewise.kernels.cupy.launch import Kernel, engine_of

HAS_BFLOAT16 = True  # operation.py asks
_MOVES = ("LDG.128", "STG.128")

_activate = Kernel("activation.cu", "activate_all<{T}>", "P P r q q i", promises=_MOVES)
_gradient = Kernel("activation.cu", "gradient_all<{T}>", "P P P r q q i", promises=_MOVES)

relu = partial(activation_plan.forward, _activate, engine_of, RELU)
relu_backward = partial(activation_plan.backward, _gradient, engine_of, RELU)
leaky_relu = partial(activation_plan.sloped_forward, _activate, engine_of, LEAKY_RELU)
leaky_relu_backward = partial(activation_plan.sloped_backward, _gradient, engine_of, LEAKY_RELU)
sigmoid = partial(activation_plan.forward, _activate, engine_of, SIGMOID)
sigmoid_backward = partial(activation_plan.backward, _gradient, engine_of, SIGMOID)
tanh = partial(activation_plan.forward, _activate, engine_of, TANH)
tanh_backward = partial(activation_plan.backward, _gradient, engine_of, TANH)
step = partial(activation_plan.forward, _activate, engine_of, STEP)
sign = partial(activation_plan.forward, _activate, engine_of, SIGN)
