"""Arrays of the real libraries on a real GPU (`make gpu-check`): the same kind comes back, on the stream at hand."""

import numpy as np
import pytest
from simt import installed
from tolerances import assert_close

import tilewise
from tilewise import kernels

if not installed.REAL:
    pytest.skip("needs a GPU: make gpu-check", allow_module_level=True)

LIBRARIES = ("numpy", "cupy", "torch", "numba")
# name -> (shapes of the operands, options)
CALLS = {
    "relu": (((3, 5, 7),), {}),
    "matmul": (((130, 70), (70, 131)), {}),
    "linear": (((33, 70), (20, 70), (20,)), {"activation": "relu"}),
    "conv2d": (((2, 8, 17, 19), (16, 8, 3, 3), (16,)), {"stride": 2, "padding": 1}),
    "conv2d_backward": (((2, 16, 9, 10), (2, 8, 17, 19), (16, 8, 3, 3)), {"stride": 2, "padding": 1}),
    "max_pool2d": (((2, 5, 17, 19), 3), {"stride": 2, "padding": 1}),
    "avg_pool2d": (((2, 5, 17, 19), 3), {"stride": 2, "padding": 1}),
    "adaptive_avg_pool2d": (((2, 5, 17, 19), (4, 3)), {}),
    "batch_norm": (((4, 5, 9, 7), (5,), (5,), (5,), (5,)), {"training": True}),
    "softmax": (((33, 100),), {}),
}


GPU_BACKENDS = installed.BACKENDS


@pytest.fixture(params=LIBRARIES)
def library(request, gpu):
    """(from a NumPy array, back to one, the type of its arrays)."""
    name = request.param
    if name == "numpy":
        return np.copy, np.asarray, np.ndarray
    module = pytest.importorskip(name)
    if name == "cupy":
        return module.asarray, module.asnumpy, module.ndarray
    if name == "torch":
        return (lambda a: module.from_numpy(a.copy()).cuda()), (lambda t: t.cpu().numpy()), module.Tensor
    from numba import cuda

    return cuda.to_device, (lambda d: d.copy_to_host()), type(cuda.to_device(np.zeros(1)))


def operands_of(name, rng, dtype):
    shapes, options = CALLS[name]
    arrays = []
    for i, shape in enumerate(shapes):
        is_window = "pool" in name and i == 1
        values = shape if is_window else rng.standard_normal(shape).astype(dtype)
        arrays.append(np.abs(values) if name == "batch_norm" and i == 2 else values)
    return arrays, options


def each(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("name", CALLS)
def test_operands_of_each_library(library, gpu, rng, name, dtype):
    to_device, to_host, kind = library
    arrays, options = operands_of(name, rng, dtype)
    given = [to_device(a) if isinstance(a, np.ndarray) else a for a in arrays]
    if not installed.has(gpu.backend, name):
        with pytest.raises(NotImplementedError, match=f"backend {gpu.backend!r} does not have it"):
            getattr(kernels, name)(*given, **options)
        return
    results = each(getattr(kernels, name)(*given, **options))
    with tilewise.using(backend="reference"):
        wide = [a.astype(np.float64) if isinstance(a, np.ndarray) else a for a in arrays]
        expected = each(getattr(kernels, name)(*wide, **options))
    for result, right in zip(results, expected, strict=True):
        assert isinstance(result, kind)
        assert_close(to_host(result), right)
    if name == "batch_norm":  # the running statistics
        for i in (1, 2):
            assert_close(to_host(given[i]), wide[i])


def test_cupy_stream_is_used(gpu, rng):
    cupy = pytest.importorskip("cupy")
    x = cupy.asarray(rng.standard_normal(1 << 20).astype(np.float32))
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        y = x
        for _ in range(20):
            y = tilewise.relu(y * 2 - 1)
    stream.synchronize()
    z = cupy.asnumpy(x)
    for _ in range(20):
        z = np.maximum(z * 2 - 1, 0)
    assert_close(cupy.asnumpy(y), z)


def test_torch_graph_can_be_captured_also_at_a_first_call(gpu):
    torch = pytest.importorskip("torch")
    x = torch.randn(1000, device="cuda", dtype=torch.float64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = tilewise.leaky_relu(x, 0.5)
    x.fill_(-2)
    graph.replay()
    torch.cuda.synchronize()
    assert y.eq(-1).all()


def test_out_of_memory_leaves_the_device_usable(gpu):
    with pytest.raises(MemoryError):
        gpu.allocate(1 << 50)
    assert tilewise.relu(np.array([-1.0, 2.0])).tolist() == [0.0, 2.0]


def test_current_device_of_the_libraries_stays(gpu):
    torch = pytest.importorskip("torch")
    tilewise.relu(torch.ones(3, device="cuda"))
    assert torch.cuda.current_device() == 0


def test_more_than_two_to_the_31_elements(gpu):
    """Offsets are of 64 bits; 9 GB of float16."""
    torch = pytest.importorskip("torch")
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("less than 20 GB of memory are free")
    x = torch.full(((1 << 31) + 100,), -1, dtype=torch.float16, device="cuda")
    x[-7:] = 3
    y = tilewise.relu(x)
    assert y[-8:].tolist() == [0.0] + [3.0] * 7
    assert y.count_nonzero() == 7
