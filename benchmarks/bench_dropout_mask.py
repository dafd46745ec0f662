"""Dropout, forward and backward."""

from . import cases
from .suite import _Suite, grid


class Dropout(_Suite):
    params = grid(cases.selected("dropout"))
