"""Padding on the GPU, and its gradient; src/padding.cu says how."""

from functools import partial

from tilewise.kernels import padding_plan
from tilewise.kernels.cupy.launch import Kernel

HAS_BFLOAT16 = True  # operation.py asks

_pad = Kernel("padding.cu", "pad_all<{T}>", "P P r 7q2i", promises=("STG.128",))
_backward = Kernel("padding.cu", "pad_backward_all<{T}>", "P P 7q2i", promises=("STG.128",))

pad, pad_backward = partial(padding_plan.pad, _pad), partial(padding_plan.pad_backward, _backward)
