"""bfloat16 in CUDA C++, executed on the CPU: computed and summed in float32, rounded once, to the nearest even."""

import numpy as np
import pytest
from conv_cases import Case
from fake_arrays import FakePlace
from test_cuda_activation import ELEMENTWISE
from test_optim import STEPS, arrays, expected
from test_pool import DILATED, LAYOUTS, WINDOWS, laid, tied
from tolerances import tolerance

import tilewise
from tilewise import kernels
from tilewise.kernels import device_arrays
from tilewise.kernels.arrays import bfloat16
from tilewise.kernels.padding import MODES

GPU_BACKENDS = ("cupy",)

if bfloat16() is None:
    pytest.skip("ml_dtypes is not installed (extra: gpu)", allow_module_level=True)
B = bfloat16()


def assert_rounded(actual, expected, reduction: int = 1, scale: float = 0.0):
    """Each the bfloat16 nearest to what float32 gives for `expected`: half a unit away, and float32's own error."""
    assert actual.dtype == B
    actual, expected = actual.astype(np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected), err_msg="NaN in other places")
    infinite = np.isinf(expected)
    np.testing.assert_array_equal(actual[infinite], expected[infinite])
    finite = np.isfinite(expected)
    size = np.abs(expected[finite])
    bound = 2.0**-8 * size + tolerance(np.float32, reduction) * max(scale, size.max(initial=0)) + 2.0**-134
    worst = (np.abs(actual[finite] - expected[finite]) / bound).max(initial=0)
    assert worst <= 1, f"off by {worst:.3g} of what rounding explains"


def reference(function, *operands, **options):
    """In float64."""
    wide = [a.astype(np.float64) if getattr(a, "dtype", None) == B else a for a in operands]
    with tilewise.using(backend="reference"):
        return function(*wide, **options)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(B)


def test_rounding_of_every_number(gpu):
    """x * (1 + 2**-8) lies half-way between two numbers wherever x has an odd last place, or is a power of two."""
    x = np.arange(1 << 16, dtype=np.uint16).view(B)
    for slope in (1 + 2.0**-8, 1 / 3):
        y = kernels.leaky_relu(x, slope)
        wide = x.astype(np.float32)
        with np.errstate(all="ignore"):
            expected = np.where(wide > 0, wide, wide * np.float32(slope)).astype(B)
        nan = np.isnan(wide)
        np.testing.assert_array_equal(np.isnan(y.astype(np.float32)), nan)
        np.testing.assert_array_equal(y[~nan].view(np.uint16), expected[~nan].view(np.uint16))


@pytest.mark.parametrize("name", [*ELEMENTWISE, "step", "sign"])
def test_activations(gpu, rng, name):
    options = ELEMENTWISE.get(name, {})
    for size in (1, 7, 8, 2057):
        x, grad = 4 * normal(rng, size), normal(rng, size)
        y = getattr(kernels, name)(x, **options)
        assert_rounded(y, reference(getattr(kernels, name), x, **options))
        if name in ELEMENTWISE:
            backward = getattr(kernels, f"{name}_backward")
            assert_rounded(backward(grad, y, **options), reference(backward, grad, y, **options), 2)


@pytest.mark.parametrize("shape", [(5, 7), (3, 64), (300, 8), (2, 4100), (2, 40, 3), (1, 300, 33)], ids=str)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax(gpu, rng, name, shape):
    x, grad = 3 * normal(rng, *shape), normal(rng, *shape)
    x[0, 0], x[-1, 1] = -np.inf, 40
    function, backward = getattr(kernels, name), getattr(kernels, f"{name}_backward")
    y = function(x, axis=1)
    n = shape[1]
    assert_rounded(y, reference(function, x, axis=1), n, 1)
    scale = 1 + float(np.abs(grad.astype(np.float64)).sum(1).max())
    assert_rounded(backward(grad, y, axis=1), reference(backward, grad, y, axis=1), n, scale)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [WINDOWS[i] for i in (0, 1, 3)] + DILATED[:1], ids=str)
def test_pooling(gpu, rng, options, layout):
    for size in ((1, 8, 9, 16), (2, 3, 7, 5)):
        x = laid(tied(rng, size, np.float32), layout).astype(B)
        x.flat[5] = np.nan
        y, where = kernels.max_pool2d(x, **options, return_indices=True, layout=layout)
        expected, wanted = reference(kernels.max_pool2d, x, **options, return_indices=True, layout=layout)
        np.testing.assert_array_equal(y.astype(np.float64), expected)
        np.testing.assert_array_equal(where, wanted)
        grad = normal(rng, *y.shape)
        operands = (grad, where, x.shape)
        gradient = kernels.max_pool2d_backward(*operands, **options, layout=layout)
        assert_rounded(gradient, reference(kernels.max_pool2d_backward, *operands, **options, layout=layout), 9)
        if "dilation" in options:
            continue
        average = kernels.avg_pool2d(x, **options, layout=layout)
        assert_rounded(average, reference(kernels.avg_pool2d, x, **options, layout=layout), 9, 5)
        gradient = kernels.avg_pool2d_backward(grad, x.shape, **options, layout=layout)
        wanted = reference(kernels.avg_pool2d_backward, grad, x.shape, **options, layout=layout)
        assert_rounded(gradient, wanted, 9, 5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bins_and_unpooling(gpu, rng, layout):
    x = laid(normal(rng, 2, 8, 33, 16), layout)
    for bins in (1, (3, 4)):
        y = kernels.adaptive_avg_pool2d(x, bins, layout=layout)
        assert_rounded(y, reference(kernels.adaptive_avg_pool2d, x, bins, layout=layout), 33 * 16, 4)
    y, where = kernels.max_pool2d(x, 2, return_indices=True, layout=layout)
    back = kernels.max_unpool2d(y, where, 2, output_size=(33, 16), layout=layout)
    wanted = reference(kernels.max_unpool2d, y, where, 2, output_size=(33, 16), layout=layout)
    np.testing.assert_array_equal(back.astype(np.float64), wanted)
    np.testing.assert_array_equal(
        kernels.max_unpool2d_backward(back, where, layout=layout).view(np.uint16), y.view(np.uint16)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5, 3, 5), (2, 8, 16, 40)], ids=str)
def test_batch_norm(gpu, rng, shape, layout):
    """100 away from 0, where a sum in bfloat16 would keep no digit; the running statistics are bfloat16, too."""
    x = laid(normal(rng, *shape).astype(np.float32) + 100, layout).astype(B)
    grad = laid(normal(rng, *shape), layout)
    mean, weight, bias = normal(rng, 3, shape[1])
    var = rng.uniform(0.5, 2, shape[1]).astype(B)
    count = x.size // shape[1]
    options = {"training": True, "layout": layout, "return_stats": True, "momentum": 0.25}
    running, wide = [mean.copy(), var.copy()], [mean.astype(np.float64), var.astype(np.float64)]
    expected = reference(kernels.batch_norm, x, *wide, weight, bias, **options)
    results = kernels.batch_norm(x, *running, weight, bias, **options)
    for actual, wanted, scale in zip(results, expected, (200, 0, 0), strict=True):
        assert_rounded(actual, wanted, count, scale)
    for actual, wanted in zip(running, wide, strict=True):
        assert_rounded(actual, wanted, count)
    stats = expected[1].astype(B), expected[2].astype(B)
    for training in (True, False):
        operands, options = (grad, x, *stats, weight), {"training": training, "layout": layout}
        gradients = kernels.batch_norm_backward(*operands, **options)
        for actual, wanted in zip(gradients, reference(kernels.batch_norm_backward, *operands, **options), strict=True):
            assert_rounded(actual, wanted, count, 4 * count**0.5)
    plain = {"layout": layout, "activation": "relu", "eps": 1e-3}
    y = kernels.batch_norm(x, mean, var, weight, bias, **plain)
    assert_rounded(y, reference(kernels.batch_norm, x, mean, var, weight, bias, **plain), 3, 200)


@pytest.mark.parametrize("mode", MODES)
def test_padding(gpu, rng, mode):
    """Copies are exact; a constant and the gradient's sums are rounded."""
    padding = ((1, 2), (3, 2))
    for shape in ((2, 3, 5, 6), (1, 33, 35)):
        x = normal(rng, *shape)
        y = kernels.pad(x, padding, mode, 1 / 3)
        wanted = reference(kernels.pad, x, padding=padding, mode=mode, value=1 / 3)
        np.testing.assert_array_equal(y.view(np.uint16), wanted.astype(B).view(np.uint16))
        grad = normal(rng, *y.shape)
        operands = (grad, shape, padding, mode)
        assert_rounded(kernels.pad_backward(*operands), reference(kernels.pad_backward, *operands), 12, 4)


@pytest.mark.parametrize("case", STEPS)
def test_optimisers(gpu, rng, case):
    """Each array is rounded once, at the end: the parameter's change comes of the state before it is rounded."""
    name, names, options = STEPS[case]
    for size in (1, 8, 1030):
        param, grad, *state = arrays(rng, B, names, (size,))
        given = [a.astype(np.float64) for a in (param, grad, *state)]
        wanted, new = expected(name, *given[:2], dict(zip(names, given[2:], strict=True)), options)
        getattr(kernels, name)(param, grad, **dict(zip(names, state, strict=True)), **options)
        np.testing.assert_array_equal(grad.astype(np.float64), given[1])
        for actual, right in zip((param, *state), (wanted, *(new[n] for n in names)), strict=True):
            assert_rounded(actual, right, 4, 4)


# of every kernel one: in rows and in channels, by tiles whose k lies within a tap or not, few channels, the definition
CONVOLUTIONS = [
    Case(1, 8, 7, 9, 8, (3, 3), 1, 1, 1, 8),
    Case(1, 8, 7, 9, 8, (5, 5), 2, 2, 1, 8),
    Case(2, 16, 7, 6, 33, (3, 3), 1, 1),
    Case(2, 5, 9, 8, 66, (3, 2), (2, 1), ((1, 0), (0, 1)), 1),
    Case(2, 3, 9, 10, 16, (3, 3), 2, 1),
    Case(1, 2, 4, 5, 3, (2, 2), 1, 0, 2),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolution(gpu, rng, case, layout):
    x, weight, bias = case.arrays(rng, B, layout)
    options = case.options | {"layout": layout}
    y = kernels.conv2d(x, weight, bias, activation="relu", **options)
    wanted = reference(kernels.conv2d, x, weight, bias, activation="relu", **options)
    assert_rounded(y, wanted, case.taps, 4 * case.taps**0.5)
    grad = normal(rng, *y.shape)
    gradients = kernels.conv2d_backward(grad, x, weight, **options)
    right = reference(kernels.conv2d_backward, grad, x, weight, **options)
    pixels = grad.size // case.o
    lengths = case.o // case.groups * case.kernel[0] * case.kernel[1], pixels, pixels
    for actual, expected_gradient, length in zip(gradients, right, lengths, strict=True):
        assert_rounded(actual, expected_gradient, length, 4 * length**0.5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prepared_convolution(gpu, rng, layout):
    x, weight, bias = CONVOLUTIONS[2].arrays(rng, B, layout)
    options = {"padding": 1, "layout": layout, "activation": "relu"}
    prepared = kernels.prepare_conv2d(weight, bias, **options)
    expected = kernels.conv2d(x, weight, bias, **options)
    for _ in range(2):
        np.testing.assert_array_equal(prepared(x), expected)
    np.testing.assert_array_equal(prepared(x, add=expected), kernels.conv2d(x, weight, bias, add=expected, **options))
    with pytest.raises(TypeError, match="weight is bfloat16 but x is float32"):
        prepared(x.astype(np.float32))
    mean, scale, shift = (normal(rng, len(bias)) for _ in range(3))
    variance = (1 + rng.random(len(bias))).astype(B)
    folded = kernels.prepare_conv2d(weight, bias, batch_norm=(mean, variance, scale, shift, 1e-5), **options)
    y = reference(kernels.conv2d, x, weight, bias, padding=1, layout=layout)
    wanted = reference(kernels.batch_norm, y, mean, variance, scale, shift, layout=layout, activation="relu")
    error, size = np.abs(folded(x).astype(np.float64) - wanted), np.abs(wanted).max()
    assert 0 < error.max() <= 2.0**-7 * size  # of the folded weights' rounding, and the result's


def test_prepared_convolution_of_arrays_on_a_gpu(gpu, rng, monkeypatch):
    if gpu.schedule == "real":
        pytest.skip("the arrays are the emulator's")
    place = FakePlace(gpu, 0)
    monkeypatch.setattr(device_arrays, "place_of", lambda library, ordinal: place)
    given = CONVOLUTIONS[2].arrays(rng, B)
    x, weight, bias = map(place.array, given)
    y = kernels.prepare_conv2d(weight, bias, padding=1)(x)
    np.testing.assert_array_equal(y.get(), kernels.conv2d(*given, padding=1))


def test_dropout(gpu, rng):
    """The choice is that of every dtype; what is kept is scaled in float32."""
    for size in (1, 7, 8, 2057):
        x, numbers = normal(rng, size), {"seed": 7, "call": 3}
        for function in (kernels.dropout, kernels.dropout_backward):
            with tilewise.using(backend="reference"):
                wanted = function(x.astype(np.float32), 0.3, **numbers)
            y = function(x, 0.3, **numbers)
            np.testing.assert_array_equal(y.view(np.uint16), wanted.astype(B).view(np.uint16))


def test_tensors_in_tensors_out(gpu, rng, torch):
    x = torch.from_numpy(rng.standard_normal((2, 8, 6, 6)).astype(np.float32)).bfloat16()
    y, indices = kernels.max_pool2d(x, 2, return_indices=True)
    assert (y.dtype, indices.dtype) == (torch.bfloat16, torch.int64)
    expected = torch.nn.functional.max_pool2d(x, 2, return_indices=True)
    assert torch.equal(y, expected[0])
    assert torch.equal(indices, expected[1])
    turned = x.permute(0, 2, 3, 1)
    assert torch.equal(kernels.relu(turned), torch.relu(turned))


def test_arrays_on_a_gpu(gpu, rng, monkeypatch):
    """As CuPy has them: its interface tells no more than that an element has two bytes."""
    if gpu.schedule == "real":
        pytest.skip("the arrays are the emulator's")
    place = FakePlace(gpu, 0)
    monkeypatch.setattr(device_arrays, "place_of", lambda library, ordinal: place)
    x = normal(rng, 4, 6)
    array = place.array(x)
    assert array.__cuda_array_interface__["typestr"] == "<V2"
    for given, host in ((array, x), (array.view(x.T, x), x.T), (array.view(x[:, 1::2], x), x[:, 1::2])):
        y = kernels.softmax(given)
        assert y.dtype == B
        assert_rounded(y.get(), reference(kernels.softmax, host), 6)


def test_tensors_on_a_gpu(torch, monkeypatch):
    monkeypatch.setattr(device_arrays, "place_of", lambda library, ordinal: library)
    x = torch.ones(4, 6, dtype=torch.bfloat16).T
    view = device_arrays._torch_view("f", "x", x)
    assert (view.dtype, view.shape, view.strides, view.pointer) == (B, (6, 4), (2, 12), x.data_ptr())
    place = device_arrays.TorchPlace.__new__(device_arrays.TorchPlace)
    place._torch, place.device = torch, torch.device("cpu")
    assert place.empty((2, 3), B).owner.dtype == torch.bfloat16
    monkeypatch.setattr(device_arrays, "bfloat16", lambda: None)
    with pytest.raises(NotImplementedError, match="f: x is bfloat16, which needs the package ml_dtypes"):
        device_arrays._torch_view("f", "x", x)


def test_backends_without_it_say_so(rng):
    x = normal(rng, 2, 3, 4, 4)
    for backend in ("cpu", "reference"):
        with (
            tilewise.using(backend=backend),
            pytest.raises(NotImplementedError, match=f"relu: x is bfloat16, which the backend '{backend}' does not"),
        ):
            kernels.relu(x)
        prepared = tilewise.prepare_conv2d(x)
        with (
            tilewise.using(backend=backend),
            pytest.raises(NotImplementedError, match=f"conv2d: x is bfloat16, which the backend '{backend}' does not"),
        ):
            prepared(x)
