"""Batch normalisation: training, inference and backward."""

from . import cases
from .suite import _Suite, grid


class BatchNorm(_Suite):
    params = grid(cases.selected("batch_norm"))
