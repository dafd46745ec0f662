"""Calls on a GPU's arrays that were made before (device_replay.py): launches done again, with other arrays."""

import numpy as np
import pytest
from fake_arrays import FakeArray, FakePlace

import tilewise
from tilewise import kernels
from tilewise.kernels import device_arrays, device_replay, operation
from tilewise.kernels.device_arrays import DeviceArray

GPU_BACKENDS = ("cuda", "cupy")


class FakeLibrary(device_replay.Library):
    """As CupyArrays, of FakeArrays."""

    def signature(self, arrays, pointers):
        found: list = [arrays[0].device.id]
        for a in arrays:
            if a is None:
                pointers.append(0)
                found.append(None)
                continue
            described = a.__cuda_array_interface__
            pointer = described["data"][0]
            if described["strides"] is not None or pointer % device_replay.ALIGNMENT or a.device.id != found[0]:
                return None
            pointers.append(pointer)
            found += a.shape, a.dtype
        return found

    def allocator(self, place, shape, dtype):
        return lambda: place.empty(shape, dtype).owner

    def pointer(self, array):
        return array.memory.pointer


@pytest.fixture
def place(gpu, monkeypatch):
    if gpu.schedule == "real":
        pytest.skip("its arrays are the emulator's")
    made = FakePlace(gpu, 0)
    monkeypatch.setattr(device_arrays, "place_of", lambda library, ordinal: made)
    monkeypatch.setitem(device_replay._LIBRARIES, FakeArray, FakeLibrary())
    operation.forget_plans()
    yield made
    operation.forget_plans()


@pytest.fixture
def planned(monkeypatch):
    """How often a call was planned or recorded, and not done again."""
    from tilewise.kernels import device_call

    calls, run = [], device_call._planned
    monkeypatch.setattr(device_call, "_planned", lambda *a, **k: calls.append(a[0].name) or run(*a, **k))
    return calls


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


CALLS = {
    "relu": lambda rng: (kernels.relu, [normal(rng, 3, 5)], {}),
    "softmax": lambda rng: (kernels.softmax, [normal(rng, 3, 40)], {}),
    "matmul": lambda rng: (kernels.matmul, [normal(rng, 20, 30), normal(rng, 30, 10)], {}),
    "matmul in parts": lambda rng: (kernels.matmul, [normal(rng, 4, 3000), normal(rng, 3000, 4)], {}),
    "linear": lambda rng: (kernels.linear, [normal(rng, 4, 30), normal(rng, 8, 30), normal(rng, 8)], {}),
    "conv2d": lambda rng: (
        kernels.conv2d, [normal(rng, 2, 4, 6, 6), normal(rng, 8, 4, 3, 3), normal(rng, 8)], {"padding": 1}
    ),
    "conv2d, one image": lambda rng: (kernels.conv2d, [normal(rng, 4, 6, 6), normal(rng, 8, 4, 3, 3)], {}),
    "conv2d_backward": lambda rng: (
        kernels.conv2d_backward, [normal(rng, 2, 8, 4, 4), normal(rng, 2, 4, 6, 6), normal(rng, 8, 4, 3, 3)], {}
    ),
    "max_pool2d": lambda rng: (kernels.max_pool2d, [normal(rng, 2, 3, 6, 6), 2], {"return_indices": True}),
    "batch_norm": lambda rng: (
        kernels.batch_norm,
        [normal(rng, 4, 3, 5, 5), *[np.abs(normal(rng, 3)) + 1 for _ in range(4)]], {"training": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_was_made_before(place, planned, rng, name):
    """The third call is done again: with other numbers in other arrays, it gives what a plan gives."""
    for number in range(5):
        function, given, options = CALLS[name](rng)
        arrays = [place.array(a) if isinstance(a, np.ndarray) else a for a in given]
        results = function(*arrays, **options)
        with tilewise.using(device="cpu", backend="reference"):
            wanted = function(*given, **options)  # changes `given` as the call does its arrays
        results, wanted = (r if isinstance(r, tuple) else (r,) for r in (results, wanted))
        for result, expected in zip(results, wanted, strict=True):
            assert (result is None) == (expected is None)
            if expected is not None:
                assert result.dtype == expected.dtype
                np.testing.assert_allclose(result.get(), expected, rtol=2e-4, atol=2e-4)
        for array, expected in zip(arrays, given, strict=True):  # running statistics
            if isinstance(expected, np.ndarray):
                np.testing.assert_allclose(array.get(), expected, rtol=1e-5, atol=1e-6)
        assert len(planned) == min(number + 1, 2)


def test_the_same_array_twice_is_told_from_two(place, rng):
    a, b = normal(rng, 8, 8), normal(rng, 8, 8)
    x, y = place.array(a), place.array(b)
    for _ in range(2):
        kernels.matmul(x, x)
    np.testing.assert_allclose(kernels.matmul(x, y).get(), a @ b, rtol=1e-4, atol=1e-5)


def test_results_are_new_ones(place, rng):
    x = place.array(normal(rng, 8))
    results = [kernels.relu(x) for _ in range(4)]
    assert len({r.memory.pointer for r in results}) == 4


def test_other_arrays_are_planned(place, planned, rng):
    """What is not contiguous, or does not begin at a multiple of 16 bytes."""
    a = normal(rng, 6, 9)
    x = place.array(a)
    for _ in range(3):
        kernels.relu(place.array(np.ascontiguousarray(a[:, 1:])))
    assert len(planned) == 2
    for cut in (a[:, 1:], a.reshape(-1)[1:49].reshape(6, 8)):
        np.testing.assert_array_equal(kernels.relu(x.view(cut, a)).get(), np.maximum(cut, 0))
    assert len(planned) == 4


def test_other_settings_are_another_call(place, rng, gpu):
    x = place.array(normal(rng, 8))
    for _ in range(3):
        kernels.relu(x)
    decision = tilewise.explain(kernels.relu, x)
    assert decision.backend == gpu.backend
    with tilewise.using(device="cpu", backend="reference"), pytest.raises(RuntimeError, match="lie on the GPU"):
        kernels.relu(x)


def test_out(place, planned, rng):
    for number in range(4):
        a, b = normal(rng, 4, 4), normal(rng, 4, 4)
        x, y, z = map(place.array, (a, b, np.full_like(a, np.nan)))
        assert kernels.matmul(x, y, out=z) is z
        np.testing.assert_allclose(z.get(), a @ b, rtol=1e-4, atol=1e-5)
        assert len(planned) == min(number + 1, 2)


def test_out_that_overlaps(place, rng):
    a, b = normal(rng, 4, 4), normal(rng, 4, 4)
    x, y, z = map(place.array, (a, b, a))
    for _ in range(3):
        kernels.matmul(x, y, out=z)
    with pytest.raises(ValueError, match="out overlaps b"):
        kernels.matmul(x, y, out=y)
    np.testing.assert_array_equal(y.get(), b)


def test_a_prepared_convolution(place, rng):
    weight, bias = normal(rng, 8, 4, 3, 3), normal(rng, 8)
    prepared = kernels.prepare_conv2d(place.array(weight), place.array(bias), padding=1)
    for _ in range(5):
        x = normal(rng, 2, 4, 6, 6)
        y = prepared(place.array(x))
        np.testing.assert_allclose(y.get(), kernels.conv2d(x, weight, bias, padding=1), rtol=1e-4, atol=1e-4)


def test_an_unknown_address_is_not_done_again(place, planned, rng, monkeypatch):
    """Had a backend memory of its own that the recorder does not know, each call would be planned."""

    def plain(recorder, view, _):
        return DeviceArray(recorder, view.pointer, view.shape, view.dtype, view.owner)

    monkeypatch.setattr(device_replay.Recorder, "operand", plain)
    for _ in range(4):
        a = normal(rng, 3, 3)
        np.testing.assert_array_equal(kernels.relu(place.array(a)).get(), np.maximum(a, 0))
    assert len(planned) == 4
