"""Pooling, forward and backward."""

from . import cases
from .suite import _Suite, grid


class MaxPool(_Suite):
    params = grid(cases.selected("max_pool2d"))


class AvgPool(_Suite):
    params = grid(cases.selected("avg_pool2d", "adaptive_avg_pool2d"))
