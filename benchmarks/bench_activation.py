"""Activations, forward and backward."""

from . import cases
from .suite import _Suite, grid


class Activation(_Suite):
    params = grid(cases.selected("relu", "leaky_relu", "sigmoid", "tanh", "softmax", "log_softmax"))
