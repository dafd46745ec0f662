"""Convolutions, forward and backward, and their memory."""

from . import cases
from .suite import _Prepared, _Suite, grid


class Conv2d(_Suite):
    params = grid(key for key, case in cases.selected("conv2d").items() if not case.is_backward)


class Conv2dBackward(_Suite):
    params = grid(key for key, case in cases.selected("conv2d").items() if case.is_backward)


class Memory(_Prepared):
    """The process's largest memory: an im2col matrix would show as nine times the image."""

    params = grid(("conv2d resnet50.conv2.3x3", "conv2d_backward resnet50.conv3.3x3"))

    def peakmem_tilewise(self, key: str, dtype: str):
        self.call()
