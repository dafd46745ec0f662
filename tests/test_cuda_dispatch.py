"""Calls with arrays on a GPU, and with host arrays sent there: which kernel, where, in what form the result comes back.

The arrays are of a library that is none (fake_arrays.py), the GPU is the emulator; the operands of real libraries are
in test_cuda_operands.py.
"""

from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
from fake_arrays import FakeArray, FakePlace

import tilewise
from tilewise.kernels import device_arrays, operation

GPU_BACKENDS = ("cuda", "cupy")


@pytest.fixture
def places(gpu, monkeypatch):
    """ordinal -> the place of that device."""
    if gpu.schedule == "real":
        pytest.skip("its arrays are the emulator's")
    made = {ordinal: FakePlace(gpu, ordinal) for ordinal in (0, 1)}
    monkeypatch.setattr(device_arrays, "place_of", lambda library, ordinal: made[ordinal])
    return made


@pytest.fixture
def place(places):
    return places[0]


@pytest.fixture
def x(rng):
    return rng.standard_normal((3, 4, 5, 6)).astype(np.float32)


def relu(x):
    return np.maximum(x, 0)


def test_result_is_of_the_operands_kind_and_nothing_is_copied(place, x, gpu, monkeypatch):
    streams, start = [], gpu.start
    monkeypatch.setattr(
        gpu, "start", lambda f, g, s, stream, slots: streams.append(stream) or start(f, g, s, stream, slots)
    )
    monkeypatch.setattr(gpu, "read", None)  # a transfer would call it
    y = tilewise.relu(place.array(x))
    assert type(y) is FakeArray
    assert (y.shape, y.dtype, place.allocations, streams) == (x.shape, x.dtype, 1, [70])
    np.testing.assert_array_equal(y.get(), relu(x))


@pytest.mark.parametrize(
    "cut", ["[::2]", "[:, 1:3]", ".transpose(0, 2, 3, 1)", "[..., ::-1]", "[1, 2]", "[:0]", "[2:, :, :1]"]
)
def test_strided_operands(place, x, cut):
    part = eval(f"x{cut}", {"x": x})
    view = place.array(x).view(part, x)
    y = tilewise.relu(view)
    np.testing.assert_array_equal(y.get(), relu(part))
    assert y.strides == device_arrays.row_major(part.shape, 4)


@pytest.mark.parametrize("dtype", ["int8", "float16", "int32", "float64", "uint8", "int64"])
def test_copies_of_every_dtype_and_number_of_axes(place, gpu, rng, dtype):
    copying = import_module(f"tilewise.kernels.{gpu.backend}.copying")
    x = rng.integers(0, 100, (2, 3, 2, 3, 2, 4)).astype(dtype)
    part = x.transpose(5, 0, 3, 4, 1, 2)[::2, :, ::-1]
    view = device_arrays.device_view("f", "x", place.array(x).view(part, x))
    np.testing.assert_array_equal(copying.contiguous(view).owner.get(), part)


def test_copy_of_too_many_axes_is_an_error(place):
    x = np.zeros((2,) * 7, np.float32)
    with pytest.raises(NotImplementedError, match="at most 6 axes, got 7"):
        tilewise.relu(place.array(x).view(x.transpose(), x))


def test_mixed_places(places, x):
    here, there = places[0].array(x), places[1].array(x)
    with pytest.raises(TypeError, match="relu_backward: grad and y must be of one kind, on one device"):
        tilewise.relu_backward(here, there)
    for operands in ((here, x), (x, here)):
        with pytest.raises(TypeError, match="lies on the host and others on the GPU; copy it there first"):
            tilewise.relu_backward(*operands)
    np.testing.assert_array_equal(tilewise.relu_backward(there, there).get(), np.where(x > 0, x, 0))


def test_unknown_libraries_and_masks(place, x):
    class Stranger(FakeArray):
        pass

    Stranger.__module__ = "stranger.arrays"
    array = place.array(x)
    array.__class__ = Stranger
    with pytest.raises(TypeError, match="relu: x is a Stranger; use CuPy, Numba or PyTorch arrays on the GPU"):
        tilewise.relu(array)

    class Masked(FakeArray):
        @property
        def __cuda_array_interface__(self):
            return super().__cuda_array_interface__ | {"mask": self}

    Masked.__module__ = "cupy.masked"
    array.__class__ = Masked
    with pytest.raises(TypeError, match="relu: x is masked"):
        tilewise.relu(array)


def test_explain_and_devices(place, gpu, x):
    decision = tilewise.explain(tilewise.relu, place.array(x))
    assert (decision.device, decision.backend) == ("gpu", gpu.backend)
    assert decision.bytes == 2 * x.nbytes
    assert tilewise.explain(tilewise.relu, x).backend == gpu.backend, "pinned by the fixture"
    with tilewise.using(backend="cpu"):
        assert tilewise.explain(tilewise.relu, x).backend == "cpu"
    gpus = [d for d in tilewise.devices() if d.kind == "gpu"]
    (other,) = {"cuda", "cupy"} - {gpu.backend}
    assert any(d.backends[gpu.backend] is None for d in gpus)
    assert all(d.backends[other] for d in gpus)


def test_arrays_on_the_gpu_stay_there(place, x):
    array = place.array(x)
    with tilewise.using(device="auto"):
        assert type(tilewise.relu(array)) is FakeArray
    with tilewise.using(device="gpu"):
        assert type(tilewise.relu(array)) is FakeArray
    with (
        tilewise.using(device="cpu"),
        pytest.raises(RuntimeError, match="device 'cpu' was asked for, but the arrays lie"),
    ):
        tilewise.relu(array)
    for backend in ("cpu", "reference"):
        with (
            tilewise.using(backend=backend),
            pytest.raises(RuntimeError, match="runs on the CPU, but the arrays lie on"),
        ):
            tilewise.relu(array)


def test_host_arrays_are_sent_there_and_back(gpu, x):
    y = tilewise.relu(x)
    assert type(y) is np.ndarray
    np.testing.assert_array_equal(y, relu(x))
    np.testing.assert_array_equal(tilewise.relu(x[:, ::2].transpose(3, 1, 0, 2)), relu(x[:, ::2].transpose(3, 1, 0, 2)))
    assert tilewise.relu(x[:0]).shape == (0, 4, 5, 6)
    assert tilewise.relu(x.astype(np.float16)).dtype == np.float16


def test_tensors_on_the_host_are_sent_there_and_back(gpu, torch, x):
    y = tilewise.relu(torch.from_numpy(x))
    assert isinstance(y, torch.Tensor)
    np.testing.assert_array_equal(y.numpy(), relu(x))


# ---- batch axes and operands that change: by a backend of the test's own, whatever kernels there are


@pytest.fixture
def seen(gpu, monkeypatch):
    """A backend that is relu, whatever it is asked for, and the shapes that it was given."""
    activation, copying = (import_module(f"tilewise.kernels.{gpu.backend}.{n}") for n in ("activation", "copying"))
    shapes = []

    def max_pool2d(x, **options):
        shapes.append(x.shape)
        return activation.relu(x), x.place.empty((*x.shape[:2], 1, 1), np.dtype(np.int64))

    def batch_norm(x, running_mean, running_var, weight, bias, **options):
        shapes.append(x.shape)
        for statistic in (running_mean, running_var):
            copying.copy_strided(activation.relu(statistic), statistic)
        return activation.relu(x)

    def matmul(a, b):
        return activation.relu(a)

    def conv2d(x, weight, bias, add, **options):
        return activation.relu(add)

    module = SimpleNamespace(max_pool2d=max_pool2d, batch_norm=batch_norm, matmul=matmul, conv2d=conv2d)
    monkeypatch.setattr(operation, "implementation_module", lambda backend, family: module)
    operation.forget_plans()
    yield shapes
    operation.forget_plans()


def test_unbatched_operands_and_results(place, x, seen):
    y, indices = tilewise.max_pool2d(place.array(x[0]), 1, return_indices=True)
    assert (seen, y.shape, indices.shape) == ([(1, 4, 5, 6)], (4, 5, 6), (4, 1, 1))
    np.testing.assert_array_equal(y.get(), relu(x[0]))


@pytest.mark.parametrize("strided", [False, True])
def test_running_statistics_change_in_place(place, x, seen, strided):
    mean, var = np.array([[1, 9], [-1, 9], [-2, 9], [3, 9]], np.float32), np.full((4, 2), -1, np.float32)
    means, variances = place.array(mean), place.array(var)
    if strided:
        given = means.view(mean[:, 0], mean), variances.view(var[:, 0], var)
    else:
        given = place.array(mean[:, 0].copy()), place.array(var[:, 0].copy())
    tilewise.batch_norm(place.array(x), *given, training=True)
    assert given[0].get().tolist() == [1, 0, 0, 3]
    assert given[1].get().tolist() == [0] * 4
    np.testing.assert_array_equal(means.get()[:, 1], 9)


def test_running_statistics_of_the_host_change_in_place(gpu, x, seen):
    mean, var = np.array([[1, 9], [-1, 9], [-2, 9], [3, 9]], np.float32)[:, 0], np.full(4, -1, np.float32)
    tilewise.batch_norm(x, mean, var, training=True)
    assert (mean.tolist(), var.tolist()) == ([1, 0, 0, 3], [0] * 4)


def test_out(place, x, seen):
    a, b = x[0, 0], np.eye(6, dtype=np.float32)
    out = place.array(np.zeros_like(a))
    assert tilewise.matmul(place.array(a), place.array(b), out=out) is out
    np.testing.assert_array_equal(out.get(), relu(a))
    wide = np.zeros((5, 12), np.float32)
    base = place.array(wide)
    tilewise.matmul(place.array(a), place.array(b), out=base.view(wide[:, ::2], wide))
    np.testing.assert_array_equal(base.get()[:, ::2], relu(a))
    np.testing.assert_array_equal(base.get()[:, 1::2], 0)


def test_out_that_is_an_operand(place, x, seen):
    """conv2d's `add` may be the result's array; no other operand may."""
    weight, add = np.zeros((4, 4, 1, 1), np.float32), place.array(x)
    assert tilewise.conv2d(place.array(x), place.array(weight), add=add, out=add) is add
    np.testing.assert_array_equal(add.get(), relu(x))
    image = place.array(x)
    with pytest.raises(ValueError, match="conv2d: out overlaps x"):
        tilewise.conv2d(image, place.array(weight), out=image)


def test_wrong_out(place, places, x, seen):
    a, b = place.array(x[0, 0]), place.array(np.eye(6, dtype=np.float32))
    with pytest.raises(ValueError, match=r"matmul: out must have shape \(5, 6\) and dtype float32, got shape \(2,\)"):
        tilewise.matmul(a, b, out=place.array(np.zeros(2, np.float32)))
    with pytest.raises(TypeError, match="matmul: a and out must be of one kind, on one device"):
        tilewise.matmul(a, b, out=places[1].array(x[0, 0]))
    with pytest.raises(TypeError, match="matmul: out lies on the host and others on the GPU"):
        tilewise.matmul(a, b, out=np.zeros((5, 6), np.float32))


def test_out_of_the_host(gpu, x, seen):
    a, b = x[0, 0], np.eye(6, dtype=np.float32)
    for out in (np.zeros((5, 6), np.float32), np.zeros((5, 12), np.float32)[:, ::2]):
        assert tilewise.matmul(a, b, out=out) is out
        np.testing.assert_array_equal(out, relu(a))


def test_function_that_the_backend_lacks(gpu, seen, x):
    with pytest.raises(NotImplementedError, match=f"avg_pool2d: backend {gpu.backend!r} does not have it"):
        tilewise.avg_pool2d(x, 2)
