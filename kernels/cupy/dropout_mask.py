"""Dropout on the GPU; src/dropout_mask.cu says how."""

from tilewise.kernels.cupy.activation import _vectors_and_blocks
from tilewise.kernels.cupy.launch import Kernel

_drop = Kernel("dropout_mask.cu", "drop<{T}>", "P P r q q q q q", promises=("LDG.128", "STG.128"))


def dropout(x, *, threshold, scale, seed, call):
    y = x.place.empty(x.shape, x.dtype)
    if x.size:
        vectors, blocks = _vectors_and_blocks(x, y)
        _drop(x.place, blocks, x, y, scale, threshold, seed, call, x.size, vectors)
    return y


dropout_backward = dropout
