"""PyTorch's tensors and CuPy's arrays on a GPU: results of calls that are planned, recorded and done again.

Only on a machine that has one (`make gpu-check`); test_gpu_replay.py has the same on the emulator.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from simt import installed

import tilewise
from tilewise import kernels
from tilewise.kernels import device_replay

GPU_BACKENDS = ("cuda", "cupy")


def _tensors(torch):
    def there(array):
        return torch.from_numpy(array).cuda()

    return there, lambda tensor: tensor.cpu().numpy()


def _arrays(cupy):
    return cupy.asarray, cupy.asnumpy


@pytest.fixture(params=["torch", "cupy"])
def library(request, gpu):
    """(from a NumPy array to the library's on the GPU, and back)."""
    if not installed.REAL:
        pytest.skip("needs a GPU")
    module = pytest.importorskip(request.param)
    return _tensors(module) if request.param == "torch" else _arrays(module)


def normal(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


CALLS = {
    "relu": lambda rng, dtype: (kernels.relu, [normal(rng, 33, 5, dtype=dtype)], {}),
    "matmul": lambda rng, dtype: (
        kernels.matmul, [normal(rng, 200, 136, dtype=dtype), normal(rng, 136, 192, dtype=dtype)], {}
    ),
    "conv2d": lambda rng, dtype: (
        kernels.conv2d, [normal(rng, 4, 16, 14, 14, dtype=dtype), normal(rng, 32, 16, 3, 3, dtype=dtype)],
        {"padding": 1},
    ),
    "conv2d_backward": lambda rng, dtype: (
        kernels.conv2d_backward,
        [normal(rng, 2, 8, 12, 12, dtype=dtype), normal(rng, 2, 8, 14, 14, dtype=dtype),
         normal(rng, 8, 8, 3, 3, dtype=dtype)],
        {},
    ),
    "max_pool2d": lambda rng, dtype: (kernels.max_pool2d, [normal(rng, 2, 3, 8, 8, dtype=dtype), 2], {}),
}  # fmt: skip


def check(results, wanted, back, dtype):
    for result, expected in zip(*(r if isinstance(r, tuple) else (r,) for r in (results, wanted)), strict=True):
        error = np.abs(back(result).astype(np.float64) - expected).max() / np.abs(expected).max()
        assert error < (3e-3 if dtype == "float16" else 1e-5)


def reference(function, given, options):
    with tilewise.using(device="cpu", backend="reference"):
        return function(*[g.astype(np.float64) if isinstance(g, np.ndarray) else g for g in given], **options)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", CALLS)
def test_calls_done_again(library, rng, name, dtype):
    there, back = library
    for _ in range(4):
        function, given, options = CALLS[name](rng, dtype)
        results = function(*[there(g) if isinstance(g, np.ndarray) else g for g in given], **options)
        check(results, reference(function, given, options), back, dtype)


def test_they_are_recorded(library, rng, gpu):
    there, _ = library
    x = there(normal(rng, 7, 9))
    for _ in range(3):
        kernels.sigmoid(x)
    from tilewise.kernels import activation

    recorded = activation._SIGMOID.recorded.values()
    assert any(isinstance(known, device_replay.Recorded) for known in recorded)


def test_results_of_several_threads(library, rng):
    there, back = library
    given = [normal(rng, 40, 50) for _ in range(64)]
    arrays = [there(g) for g in given]

    def call(x):
        return kernels.relu(x)

    for g, y in zip(given, map(back, ThreadPoolExecutor(4).map(call, arrays)), strict=True):
        np.testing.assert_array_equal(y, np.maximum(g, 0))


def test_captured_into_a_graph(gpu, rng):
    if not installed.REAL:
        pytest.skip("needs a GPU")
    torch = pytest.importorskip("torch")
    x, weight = (torch.from_numpy(normal(rng, *shape)).cuda() for shape in ((2, 8, 10, 10), (16, 8, 3, 3)))
    for _ in range(3):
        kernels.conv2d(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernels.conv2d(x, weight)
    x.copy_(torch.from_numpy(normal(rng, 2, 8, 10, 10)))
    graph.replay()
    given = [tensor.cpu().numpy() for tensor in (x, weight)]
    check(y, reference(kernels.conv2d, given, {}), lambda tensor: tensor.cpu().numpy(), "float32")
