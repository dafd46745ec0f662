"""Convolution of few outputs in CUDA C++, forward and as the gradient with respect to an image."""

import numpy as np
import pytest
from conv_cases import LAYOUTS, Case
from test_cuda_conv import backward, forward

from tilewise.kernels.cupy import conv_thin

GPU_BACKENDS = ("cupy",)
THIN = [
    Case(2, 18, 21, 27, 3, (3, 3), 1, 1),
    Case(1, 33, 9, 40, 4, (5, 2), (1, 2), ((2, 1), (0, 3))),
    Case(3, 40, 8, 9, 4, (3, 3), 2, 1, 2, 2),
]
SHALLOW = [Case(2, 3, 25, 22, 20, (3, 3), 1, 1), Case(1, 6, 20, 21, 40, (7, 7), 2, 3, 1, 2)]


@pytest.fixture
def launched(gpu, monkeypatch):
    monkeypatch.setattr(conv_thin, "_LEAST_PIXELS", 1)
    gpu.launched.clear()
    return lambda: "cupy conv_thin<T>" in {name for name, _ in gpu.launched}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_few_outputs(launched, rng, layout, dtype):
    for number, case in enumerate(THIN):
        forward(rng, case, dtype, layout, 3 * number)
    assert launched()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_an_image(launched, rng, layout, dtype):
    for case in SHALLOW:
        backward(rng, case, dtype, layout)
    assert launched()


def test_more_channels_than_there_is_room_for(launched, rng):
    forward(rng, Case(1, 50, 24, 11, 3, (7, 7), 1, 3), np.float32, "NCHW")
    assert launched()
