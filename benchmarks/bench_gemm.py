"""Matrix multiplication and linear layers."""

from . import cases
from .suite import _Suite, grid


class Matmul(_Suite):
    params = grid(cases.selected("matmul"))


class Linear(_Suite):
    params = grid(cases.selected("linear"))
