"""Optimisers' updates on the GPU; src/optim.cu says how."""

from functools import partial

from tilewise.kernels import optim_plan
from tilewise.kernels.cupy import driver
from tilewise.kernels.cupy.launch import Kernel

HAS_BFLOAT16 = True  # operation.py asks
_MOVES = ("LDG.128", "STG.128")

_sgd = Kernel("optim.cu", "sgd_update<{T}>", "P P P q q i i r r r", promises=_MOVES)
_scaled = Kernel("optim.cu", "scaled_update<{T}>", "P P P P q q i r r r r r r", promises=_MOVES)
_adam = Kernel("optim.cu", "adam_update<{T}>", "P P P P q q 9r", promises=_MOVES)


def _engine_of(place):
    return driver.engine(place.ordinal)


sgd_step = partial(optim_plan.sgd_step, _sgd, _engine_of)
adagrad_step = partial(optim_plan.adagrad_step, _scaled, _engine_of)
rmsprop_step = partial(optim_plan.rmsprop_step, _scaled, _engine_of)
adam_step = partial(optim_plan.adam_step, _adam, _engine_of)
