"""Arrays on a GPU that begin anywhere: the same bits, for every op family; 16 bytes at a time only where allowed."""

import numpy as np
import pytest
from simt.installed import BACKENDS, has

from tilewise import kernels
from tilewise.kernels.device_arrays import DeviceArray, host_place

IMAGE, LAST = (2, 8, 6, 8), (2, 6, 8, 8)
# (function, shapes, options); rows are whole vectors of 16 bytes, so that where an array begins could matter
CALLS = [
    ("matmul", ((40, 72), (72, 48)), {}),
    ("matmul", ((300, 64), (64, 2)), {}),
    ("matmul_backward", ((40, 16), (40, 72), (72, 16)), {}),
    ("linear", ((40, 72), (16, 72), (16,)), {"activation": "relu"}),
    ("linear_backward", ((40, 16), (40, 72), (16, 72)), {}),
    ("conv2d", (IMAGE, (8, 8, 3, 3), (8,)), {"padding": 1}),
    ("conv2d", (LAST, (8, 8, 3, 3), (8,)), {"padding": 1, "layout": "NHWC"}),
    ("conv2d", (LAST, (8, 1, 3, 3)), {"padding": 1, "layout": "NHWC", "groups": 8}),
    ("conv2d", ((1, 6, 10, 8), (8, 8, 3, 3)), {"padding": 1, "layout": "NHWC", "algorithm": "gemm"}),
    ("conv2d_backward", (LAST, LAST, (8, 8, 3, 3)), {"padding": 1, "layout": "NHWC"}),
    ("conv_transpose2d", (LAST, (8, 8, 3, 3)), {"padding": 1, "layout": "NHWC"}),
    ("avg_pool2d", (IMAGE, 2), {}),
    ("avg_pool2d", (LAST, 3), {"stride": 1, "layout": "NHWC"}),
    ("avg_pool2d_backward", ((2, 8, 3, 4), IMAGE, 2), {}),
    ("max_pool2d", (IMAGE, 2), {}),
    ("adaptive_avg_pool2d", (IMAGE, 1), {}),
    ("adaptive_avg_pool2d", (LAST, 1), {"layout": "NHWC"}),
    ("batch_norm", (IMAGE, (8,), (8,), (8,), (8,)), {"training": True}),
    ("batch_norm", (LAST, (8,), (8,), (8,), (8,)), {"training": True, "layout": "NHWC"}),
    ("batch_norm_backward", (IMAGE, IMAGE, (8,), (8,), (8,)), {}),
    ("softmax", ((9, 64),), {}),
    ("softmax", ((3, 2048),), {}),
    ("softmax_backward", ((9, 64), (9, 64)), {}),
    ("relu", (IMAGE,), {}),
    ("pad", (IMAGE, 1), {}),
]


def shifted(place, array, elements):
    """The array on the device, `elements` of its dtype beyond where memory begins."""
    memory = place.copy_in(np.concatenate([np.zeros(elements, array.dtype), array.ravel()]))
    return DeviceArray(place, memory.pointer + elements * array.itemsize, array.shape, array.dtype, memory.owner)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(
    ("gpu", "name", "shapes", "options"),
    [(backend, *call) for backend in BACKENDS for call in CALLS if has(backend, call[0])],
    indirect=["gpu"],
)
def test_the_same_bits_wherever_arrays_begin(gpu, rng, name, shapes, options, dtype):
    place, results = host_place(gpu.backend), []
    backward_pool = name == "avg_pool2d_backward"
    operands = [
        rng.standard_normal(s).astype(dtype) if isinstance(s, tuple) and not (backward_pool and i == 1) else s
        for i, s in enumerate(shapes)
    ]
    if name == "batch_norm":
        operands[2] = np.abs(operands[2])
    for elements in (0, 1):
        given = [shifted(place, a, elements) if isinstance(a, np.ndarray) else a for a in operands]
        assert given[0].pointer % 16 == elements * np.dtype(dtype).itemsize
        got = getattr(kernels, name)(*given, **options)
        results.append(got if isinstance(got, tuple) else (got,))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("gpu", BACKENDS, indirect=True)
def test_statistics_that_begin_anywhere_are_updated(gpu, rng):
    place, x = host_place(gpu.backend), rng.standard_normal(IMAGE).astype(np.float32)
    mean, var = (shifted(place, np.ones(8, np.float32), 1) for _ in range(2))
    kernels.batch_norm(shifted(place, x, 0), mean, var, training=True)
    whole = np.empty(9, np.float32)
    gpu.read(mean.owner, whole)
    np.testing.assert_allclose(whole[1:], 0.9 + 0.1 * x.mean(axis=(0, 2, 3)), rtol=1e-5)
