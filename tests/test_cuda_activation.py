"""Activations of the GPU backends, executed on the CPU, against the reference."""

import inspect
from importlib import import_module

import numpy as np
import pytest
from tolerances import assert_close

import tilewise
from tilewise import kernels

GPU_BACKENDS = ("cuda", "cupy")
ELEMENTWISE = {"relu": {}, "leaky_relu": {"negative_slope": 0.2}, "sigmoid": {}, "tanh": {}}
DTYPES = [np.float16, np.float32, np.float64]
# around a vector of 16 bytes, a block of 256 threads, and more than the grid takes at once
SIZES = (1, 7, 8, 9, 255, 257, 4 * 257, 70_001)


def reference(name, *operands, **options):
    with tilewise.using(backend="reference"):
        return getattr(kernels, name)(*operands, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [*ELEMENTWISE, "step", "sign"])
def test_elementwise(gpu, rng, name, size, dtype):
    x = (4 * rng.standard_normal(size)).astype(dtype)
    special = np.array([0, np.nan, -np.inf], dtype)
    x[: min(size, 3)] = special[: min(size, 3)]
    options = ELEMENTWISE.get(name, {})
    y = getattr(kernels, name)(x, **options)
    assert y.dtype == dtype
    assert_close(y, reference(name, x.astype(np.float64), **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_gradient(gpu, rng, name, size, dtype):
    grad, y = rng.standard_normal((2, size)).astype(dtype)
    y[: min(size, 2)] = np.array([0, np.nan], dtype)[: min(size, 2)]
    grad_x = getattr(kernels, f"{name}_backward")(grad, y, **ELEMENTWISE[name])
    assert grad_x.dtype == dtype
    wide = (a.astype(np.float64) for a in (grad, y))
    assert_close(grad_x, reference(f"{name}_backward", *wide, **ELEMENTWISE[name]), reduction=2)


# ------------------------------------------------------------------------------------------------------------- softmax

# Rows: within one lane, around a group's lanes and vectors, the longest that registers hold (256 elements, 32 * 8
# vectors), and a block's. Columns: around a warp's, a block's, short and long ones.
ROWS = [(5, n) for n in (1, 2, 7, 8, 9, 31, 33, 127, 128, 255, 256, 257, 1000, 1024, 1025, 2047, 2048, 4100)]
ROWS += [(300, 10), (257, 4), (1, 8)]
COLUMNS = [(2, 3, 2), (3, 5, 31), (2, 17, 33), (1, 130, 65), (2, 9, 257), (1, 300, 3), (2, 40, 256)]


def softmax_case(rng, shape, dtype, axis):
    x = (3 * rng.standard_normal(shape)).astype(dtype)
    line = np.moveaxis(x, axis, -1)
    line[0, ..., 0] = -np.inf if line.shape[-1] > 1 else 1
    return x, rng.standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS + COLUMNS, ids=str)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax(gpu, rng, name, shape, dtype):
    axis = 1
    x, grad = softmax_case(rng, shape, dtype, axis)
    y = getattr(kernels, name)(x, axis=axis)
    expected = reference(name, x.astype(np.float64), axis=axis)
    assert y.dtype == dtype
    assert_close(y, expected, reduction=shape[axis])
    wide = grad.astype(np.float64), y.astype(np.float64)
    grad_x = getattr(kernels, f"{name}_backward")(grad, y, axis=axis)
    terms = np.abs(wide[0]) if name == "log_softmax" else np.abs(wide[0] * wide[1])
    scale = 1 + terms.sum(axis).max()
    assert_close(grad_x, reference(f"{name}_backward", *wide, axis=axis), reduction=shape[axis], scale=scale)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_softmax_axes(gpu, rng, axis):
    x, grad = rng.standard_normal((2, 6, 5, 7)).astype(np.float32)
    y = kernels.softmax(x, axis)
    assert_close(y, reference("softmax", x, axis=axis), reduction=7)
    grad_x = kernels.log_softmax_backward(grad, y, axis)
    assert_close(grad_x, reference("log_softmax_backward", grad, y, axis=axis), reduction=7)


@pytest.mark.parametrize("n", [8, 10, 1100, 1101])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_of_nan_and_infinity(gpu, rng, dtype, n):
    rows = rng.standard_normal((6, n)).astype(dtype)
    rows[1, 3], rows[2, n - 1], rows[3, 3:] = np.nan, np.inf, -np.inf
    rows[4] = -np.inf
    rows[5] *= 1000
    for name in ("softmax", "log_softmax"):
        expected = reference(name, rows.astype(np.float64), axis=1)
        assert_close(getattr(kernels, name)(rows, axis=1), expected, reduction=n)
        assert_close(getattr(kernels, name)(np.ascontiguousarray(rows.T), axis=0), expected.T, reduction=n)


def test_empty_arrays(gpu):
    for shape in ((0, 3), (3, 0)):
        x = np.empty(shape, np.float32)
        assert kernels.relu(x).shape == kernels.softmax(x, 1).shape == kernels.softmax_backward(x, x, 0).shape == shape


# ------------------------------------------------------------------------------------------------------------ operands


@pytest.mark.parametrize("name", [*ELEMENTWISE, "softmax", "log_softmax"])
def test_any_memory_layout(gpu, rng, name):
    x, grad = rng.standard_normal((2, 12, 20)).astype(np.float32)
    function, backward = getattr(kernels, name), getattr(kernels, f"{name}_backward")
    y = function(x)
    frozen = x.copy()
    frozen.flags.writeable = False
    for view in (np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2], x[::-1].copy()[::-1], frozen):
        np.testing.assert_array_equal(function(view), y)
    fortran = np.asfortranarray(grad), np.asfortranarray(y)
    np.testing.assert_array_equal(backward(*fortran), backward(grad, y))


def test_tensors_in_tensors_out(gpu, rng, torch):
    x = torch.from_numpy(rng.standard_normal((4, 9)))
    y = kernels.tanh(x)
    assert type(y) is torch.Tensor
    torch.testing.assert_close(y, torch.tanh(x))
    torch.testing.assert_close(kernels.softmax(x.T, 0), torch.softmax(x.T, 0))


def on_device(gpu, array, skip):
    """The array in the device's memory, `skip` elements from where memory is aligned to 16 bytes."""
    from tilewise.kernels.device_arrays import DeviceArray, HostPlace

    place = HostPlace(gpu)
    whole = place.copy_in(np.concatenate([np.zeros(skip, array.dtype), array.ravel()]))
    return DeviceArray(place, whole.pointer + skip * array.itemsize, array.shape, array.dtype, whole)


@pytest.mark.parametrize("skip", [0, 1])
def test_elementwise_arrays_that_vectors_do_not_reach(gpu, rng, skip):
    """The others get theirs from a multiple of 16 bytes on (test_cuda_alignment.py)."""
    activation = import_module(f"tilewise.kernels.{gpu.backend}.activation")
    for shape in ((3, 64), (2, 2048)):
        x = rng.standard_normal(shape).astype(np.float32)
        there = on_device(gpu, x, skip)
        assert_close(there.place.copy_out(activation.relu(there)), np.maximum(x, 0))


def test_the_same_bits_at_every_call(gpu, rng):
    from simt.emulator import SCHEDULES

    x = rng.standard_normal((3, 3000)).astype(np.float32)
    results = []
    for gpu.schedule in SCHEDULES:
        y = kernels.softmax(x)
        results.append(y.tobytes() + kernels.softmax_backward(x, y).tobytes() + kernels.softmax(x, 0).tobytes())
    assert len(set(results)) == 1


def test_the_same_signatures_as_the_reference(gpu):
    from tilewise.kernels.reference import activation as reference

    ours = import_module(f"tilewise.kernels.{gpu.backend}.activation")
    for name, function in vars(reference).items():
        if inspect.isfunction(function) and not name.startswith("_"):
            assert inspect.signature(getattr(ours, name)) == inspect.signature(function), name
