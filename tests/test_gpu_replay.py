"""Calls on a GPU's arrays that were made before (device_replay.py): launches done again, with other arrays."""

import weakref
from types import SimpleNamespace

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


@pytest.mark.parametrize("function", [kernels.dropout, kernels.dropout_backward])
def test_what_is_drawn_is_drawn_anew(place, rng, function):
    x = normal(rng, 9, 8)
    for seed, call in ((1, 0), (1, 1), (1, 2), (1, 3), (2, 3)):
        with tilewise.using(device="cpu", backend="reference"):
            wanted = function(x, 0.5, seed=seed, call=call)
        np.testing.assert_allclose(function(place.array(x), 0.5, seed=seed, call=call).get(), wanted, rtol=1e-6)


def test_an_updates_numbers_are_its_own(place, rng):
    param, first, second = normal(rng, 24), np.zeros(24, np.float32), np.zeros(24, np.float32)
    arrays = [place.array(a) for a in (param, first, second)]
    for step in range(1, 6):
        grad, numbers = normal(rng, 24), {"lr": 0.1 / step, "step": step}
        with tilewise.using(device="cpu", backend="reference"):
            kernels.adam_step(param, grad, first, second, **numbers)
        kernels.adam_step(arrays[0], place.array(grad), *arrays[1:], **numbers)
        np.testing.assert_allclose(arrays[0].get(), param, rtol=1e-5, atol=1e-6)


def test_operations_that_set_a_context_are_planned():
    """What a context variable hands to kernels is in no signature."""
    from tilewise.kernels import dropout_mask, optim

    assert not dropout_mask._Drawing.replayable
    assert not optim.Update.replayable


def test_memory_is_given_back_as_in_the_first_call(place, rng, gpu, monkeypatch):
    """What one pass has allocated is gone before the next one allocates."""
    live, peaks = {}, []

    def counted(shape, dtype, empty=place.empty):
        made = empty(shape, dtype)
        live[id(made.owner)] = made.nbytes
        weakref.finalize(made.owner, live.pop, id(made.owner))
        peaks[-1] = max(peaks[-1], sum(live.values()))
        return made

    monkeypatch.setattr(place, "empty", counted)
    grad, x, weight = (place.array(normal(rng, *shape)) for shape in ((2, 8, 4, 4), (2, 4, 6, 6), (8, 4, 3, 3)))
    for _ in range(4):
        peaks.append(0)
        kernels.conv2d_backward(grad, x, weight)
        assert not live
    assert peaks[3] == peaks[0]


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


def test_what_fills_memory_of_its_own_is_not_done_again(place, planned, rng):
    """Another stream may read it."""
    weight, x = normal(rng, 8, 4, 3, 3), normal(rng, 2, 4, 6, 6)
    prepared = kernels.prepare_conv2d(place.array(weight))
    for _ in range(4):
        y = prepared(place.array(x))
        np.testing.assert_allclose(y.get(), kernels.conv2d(x, weight), rtol=1e-4, atol=1e-4)
        prepared._constants.packs.clear()  # so that the second call fills it anew
    assert len(planned) == 4


def test_an_unknown_address_is_not_done_again(place, planned, rng, monkeypatch):
    """Had a backend memory of its own that the recorder does not know, each call would be planned."""

    def plain(recorder, view, _):
        return DeviceArray(recorder, view.pointer, view.shape, view.dtype, view.owner)

    monkeypatch.setattr(device_replay.Recorder, "operand", plain)
    for _ in range(4):
        a = normal(rng, 3, 3)
        np.testing.assert_array_equal(kernels.relu(place.array(a)).get(), np.maximum(a, 0))
    assert len(planned) == 4


# ---- how arrays of the libraries are read


class Tensor:
    """A torch.Tensor on a GPU, as far as it is read."""

    def __init__(self, pointer=256, device=0, requires_grad=False, layout="strided", contiguous=True):
        self.shape, self.dtype, self.layout = (2, 3), "torch.float32", layout
        self.requires_grad, self.is_cuda, self._about = requires_grad, device >= 0, (pointer, device, contiguous)

    def data_ptr(self):
        return self._about[0]

    def get_device(self):
        return self._about[1]

    def is_contiguous(self):
        return self._about[2]


@pytest.fixture
def tensors():
    made = []
    torch = SimpleNamespace(
        Tensor=Tensor, strided="strided", float32="torch.float32", _C=SimpleNamespace(),
        cuda=SimpleNamespace(device_count=lambda: 2), empty=lambda shape, **options: made.append((shape, options)),
    )  # fmt: skip
    return SimpleNamespace(torch=torch, made=made)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (Tensor(pointer=260), "begins in the middle of 16 bytes"), (Tensor(device=1), "another device"),
        (Tensor(device=-1), "the host"), (Tensor(requires_grad=True), "refused"), (Tensor(layout="sparse"), "refused"),
        (Tensor(contiguous=False), "is copied"), (np.zeros(3), "another library"),
    ],
)  # fmt: skip
def test_tensors_that_are_planned(tensors, other, why):
    library = device_replay.TorchTensors(tensors.torch)
    pointers = []
    assert library.signature((Tensor(), None, Tensor(512)), pointers) == [
        0, (2, 3), "torch.float32", None, (2, 3), "torch.float32"
    ]  # fmt: skip
    assert pointers == [256, 0, 512]
    assert library.signature((Tensor(), other), []) is None, why


def test_a_tensor_on_the_host_comes_first(tensors):
    assert device_replay.TorchTensors(tensors.torch).signature((Tensor(device=-1),), []) is None


def test_tensors_are_allocated_on_their_device(tensors):
    library, place = (
        device_replay.TorchTensors(tensors.torch),
        SimpleNamespace(ordinal=1, device="cuda:1", stream="its"),
    )
    library.allocator(place, (2, 3), np.dtype(np.float32))()
    assert tensors.made == [((2, 3), {"dtype": "torch.float32", "device": "cuda:1"})]
    assert library.stream(place) == "its"
    tensors.torch._C._cuda_getCurrentRawStream = lambda ordinal: 70 + ordinal
    tensors.torch._C._dynamo = SimpleNamespace(guards=SimpleNamespace(_empty_strided_cuda=lambda *about: about))
    tensors.torch.cuda.device_count = lambda: 1
    library = device_replay.TorchTensors(tensors.torch)
    assert library.stream(place)() == 71
    assert library.allocator(place, (2, 3), np.dtype(np.float32))() == ((2, 3), (3, 1), "torch.float32")


def test_arrays_of_cupy():
    def array(pointer=256, device=0, contiguous=True):
        made = SimpleNamespace.__new__(Array)
        made.shape, made.dtype = (2, 3), np.dtype(np.float32)
        made.flags = SimpleNamespace(c_contiguous=contiguous)
        made.data = SimpleNamespace(ptr=pointer, device_id=device)
        return made

    class Array(SimpleNamespace):
        pass

    runtime = SimpleNamespace(getDevice=lambda: 0)
    library = device_replay.CupyArrays(SimpleNamespace(ndarray=Array, cuda=SimpleNamespace(runtime=runtime)))
    pointers = []
    assert library.signature((array(), None), pointers) == [0, (2, 3), np.dtype(np.float32), None]
    assert pointers == [256, 0]
    for other in (array(260), array(device=1), array(contiguous=False), np.zeros(3)):
        assert library.signature((array(), other), []) is None


def test_only_arrays_of_the_very_type_are_read(torch):
    class Own(torch.Tensor):
        pass

    assert isinstance(device_replay.library_of(torch.Tensor), device_replay.TorchTensors)
    assert [device_replay.library_of(kind) for kind in (Own, torch.nn.Parameter, np.ndarray, type(None))] == [None] * 4
