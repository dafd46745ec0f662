"""Dropout on the GPU; src/dropout_mask.cu says how."""

from functools import partial

from tilewise.kernels import dropout_mask_plan
from tilewise.kernels.cupy.launch import Kernel, engine_of

HAS_BFLOAT16 = True  # operation.py asks

_drop = Kernel("dropout_mask.cu", "drop<{T}>", "P P r q q q q q", promises=("LDG.128", "STG.128"))

dropout = partial(dropout_mask_plan.dropout, _drop, engine_of)
dropout_backward = partial(dropout_mask_plan.dropout_backward, _drop, engine_of)
