"""Activations: the reference against PyTorch, the CPU kernels against the reference, gradients, NaN, wrong calls."""

import inspect
import re

import numpy as np
import pytest
from gradcheck import assert_gradient, numerical_gradient
from tolerances import assert_close

import tilewise
from tilewise import kernels
from tilewise.kernels.cpu import recycling

# name -> options
ELEMENTWISE = {"relu": {}, "leaky_relu": {"negative_slope": 0.2}, "sigmoid": {}, "tanh": {}}
SOFTMAXES = ("softmax", "log_softmax")
WITHOUT_GRADIENT = ("step", "sign")
# around a vector, the block of 64, the columns' block of 256 and the chunk of 16384
SIZES = (1, 7, 8, 63, 64, 65, 255, 256, 257, 1009, 16383, 16385)


def every_backend(function, *arguments, **options):
    """The results of both backends."""
    results = []
    for name in ("reference", "cpu"):
        with tilewise.using(backend=name):
            results.append(function(*arguments, **options))
    return results


def torch_function(torch, name):
    special = {"leaky_relu": torch.nn.functional.leaky_relu, "step": lambda x: torch.heaviside(x, torch.zeros_like(x))}
    return special.get(name) or getattr(torch, name)


# ----------------------------------------------------------------------------------------------------- against PyTorch


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", [*ELEMENTWISE, *WITHOUT_GRADIENT])
def test_elementwise_is_pytorchs(torch, rng, backend, name, dtype):
    x = (4 * rng.standard_normal((3, 5, 7))).astype(dtype)
    x[0, 0, :2] = 0
    options = ELEMENTWISE.get(name, {})
    theirs = torch.from_numpy(x.copy()).requires_grad_(name in ELEMENTWISE)
    expected = torch_function(torch, name)(theirs, **options)
    y = getattr(kernels, name)(x, **options)
    assert y.dtype == dtype
    assert_close(y, expected.detach().numpy())
    if name in ELEMENTWISE:
        cotangent = rng.standard_normal(x.shape).astype(dtype)
        expected.backward(torch.from_numpy(cotangent))
        grad = getattr(kernels, f"{name}_backward")(cotangent, y, **options)
        assert grad.dtype == dtype
        assert_close(grad, theirs.grad.numpy())


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("axis", [-1, 1, 0, -4])
@pytest.mark.parametrize("name", SOFTMAXES)
def test_softmax_is_pytorchs(torch, rng, backend, name, axis, dtype):
    x = (5 * rng.standard_normal((4, 6, 3, 10))).astype(dtype)
    theirs = torch.from_numpy(x).requires_grad_()
    expected = getattr(torch, name)(theirs, axis)
    cotangent = rng.standard_normal(x.shape).astype(dtype)
    expected.backward(torch.from_numpy(cotangent))
    y = getattr(kernels, name)(x, axis=axis)
    grad = getattr(kernels, f"{name}_backward")(cotangent, y, axis=axis)
    assert y.dtype == grad.dtype == dtype
    assert_close(y, expected.detach().numpy(), reduction=10)
    assert_close(grad, theirs.grad.numpy(), reduction=10)


def test_tensors_in_tensors_out(torch, rng):
    x = torch.from_numpy(rng.standard_normal((4, 9)))
    y = kernels.tanh(x)
    assert type(y) is torch.Tensor
    torch.testing.assert_close(y, torch.tanh(x))
    torch.testing.assert_close(kernels.softmax(x.T, 0), torch.softmax(x.T, 0))


# ------------------------------------------------------------------------------------ CPU kernels against the reference


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", [*ELEMENTWISE, *WITHOUT_GRADIENT])
def test_cpu_elementwise_is_the_reference(rng, name, dtype):
    function, options = getattr(kernels, name), ELEMENTWISE.get(name, {})
    for size in (0, *SIZES):
        x = (4 * rng.standard_normal(size)).astype(dtype)
        expected, actual = every_backend(function, x, **options)
        assert_close(actual, expected)
        if name in ELEMENTWISE:
            grad = rng.standard_normal(size).astype(dtype)
            assert_close(*every_backend(getattr(kernels, f"{name}_backward"), grad, expected, **options)[::-1])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_every_result_is_within_three_units_in_the_last_place(name, dtype):
    """Relative to each result, however small: near 0, in the tails, at every power of two that e^x passes."""
    reach = 85 if dtype == np.float32 else 700
    for limit in (1e-6, 1e-2, 1, 20, reach):
        x = np.linspace(-limit, limit, 20001).astype(dtype)
        wide = x.astype(np.longdouble)
        expected = np.tanh(wide) if name == "tanh" else 1 / (1 + np.exp(-wide))
        with tilewise.using(backend="cpu"):
            y = getattr(kernels, name)(x)
        units = np.abs(y - expected) / np.spacing(np.abs(expected).astype(dtype))
        assert units.max() < 3


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_limits_of_sigmoid_and_tanh(dtype):
    large = np.finfo(dtype).max
    x = np.array([-np.inf, -large, -1000, 0, 1000, large, np.inf, np.nan], dtype)
    with tilewise.using(backend="cpu"):
        np.testing.assert_array_equal(kernels.sigmoid(x), np.array([0, 0, 0, 0.5, 1, 1, 1, np.nan], dtype))
        np.testing.assert_array_equal(kernels.tanh(x), np.array([-1, -1, -1, 0, 1, 1, 1, np.nan], dtype))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", SOFTMAXES)
def test_cpu_softmax_is_the_reference(rng, name, dtype):
    shapes = [(5, n, 1) for n in SIZES] + [(2, 5, n) for n in SIZES] + [(n, 10, 1) for n in (1, 63, 64, 65, 1700)]
    for shape in [*shapes, (0, 3, 2), (3, 2, 0), (1, 130, 129)]:
        x = (3 * rng.standard_normal(shape)).astype(dtype)
        grad = rng.standard_normal(shape).astype(dtype)
        for axis in (0, 1, 2):
            with tilewise.using(backend="reference"):
                expected = getattr(kernels, name)(x.astype(np.float64), axis=axis)
                grad_x = getattr(kernels, f"{name}_backward")(grad.astype(np.float64), expected, axis=axis)
            with tilewise.using(backend="cpu"):
                actual = getattr(kernels, name)(x, axis=axis)
                assert_close(actual, expected, reduction=shape[axis], dtype=dtype)
                actual = getattr(kernels, f"{name}_backward")(grad, expected.astype(dtype), axis=axis)
            assert_close(actual, grad_x, reduction=shape[axis], dtype=dtype)


@pytest.mark.parametrize("name", [*ELEMENTWISE, *SOFTMAXES])
def test_any_memory_layout(rng, backend, name):
    function, backward = getattr(kernels, name), getattr(kernels, f"{name}_backward")
    x, grad = rng.standard_normal((2, 12, 20)), rng.standard_normal((2, 12, 20))
    y = function(x)
    grad_x = backward(grad, y)
    wide = np.zeros((12, 2, 40))
    views = {"strided": wide[:, :, ::2].transpose(1, 0, 2), "read-only": x.copy(), "Fortran": np.asfortranarray(x)}
    views["strided"][...] = x
    views["read-only"].flags.writeable = False
    for view in views.values():
        before = view.copy()
        assert_close(function(view), y)
        np.testing.assert_array_equal(view, before)
    for layout in (np.asfortranarray, lambda a: a[::-1].copy()[::-1]):
        assert_close(backward(layout(grad), layout(y)), grad_x)


def test_one_specialisation_for_each_dtype(rng):
    from tilewise.kernels.cpu import activation as cpu

    with tilewise.using(backend="cpu", threads=1):
        for dtype in (np.float32, np.float64):
            x = rng.standard_normal((4, 6, 8)).astype(dtype)
            frozen = x.copy()
            frozen.flags.writeable = False
            for operand in (x, x[:, ::2], x[0], frozen, np.asfortranarray(x)):
                kernels.leaky_relu_backward(operand, kernels.leaky_relu(operand))
                kernels.softmax_backward(operand, kernels.log_softmax(operand, axis=0), axis=0)
                kernels.log_softmax_backward(operand, kernels.softmax(operand), axis=-1)
    for kernel in (cpu._forward_kernel, cpu._backward_kernel, cpu.softmax_rows, cpu.softmax_columns):
        assert len(kernel.serial.signatures) == 2
    for kernel in (cpu.softmax_backward_rows, cpu.softmax_backward_columns):
        assert len(kernel.serial.signatures) == 2


def bits(array) -> bytes:
    """Its memory, but for the signs of NaN, which follow from the order of a product's factors."""
    return np.where(np.isnan(array), array.dtype.type(np.nan), array).tobytes()


@pytest.mark.skipif(not recycling.AVAILABLE, reason="no memory is known to have been used")
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_results_written_past_the_caches_are_the_same(rng, monkeypatch, dtype):
    """From the second call on the memory has been used before: only then are they."""
    from tilewise.kernels.cpu import activation as cpu
    from tilewise.kernels.operation import forget_plans

    size = recycling.FROM // dtype().itemsize + 37  # the last chunk ends within a vector
    x, grad = rng.standard_normal((2, size)).astype(dtype)
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0], dtype)
    x[: cpu.CHUNK] = np.resize(special, cpu.CHUNK)
    grad[: cpu.CHUNK] = np.resize(np.repeat(special, special.size), cpu.CHUNK)  # each beside each
    calls = [(name, (x,)) for name in ("relu", "leaky_relu", "step", "sign")]
    calls += [(f"{name}_backward", (grad, x)) for name in ELEMENTWISE]
    past = []
    monkeypatch.setattr(cpu, "_result", lambda *given, result=cpu._result: past.append(result(*given)) or past[-1])
    with tilewise.using(backend="cpu"):
        expected = [getattr(kernels, name)(*operands) for name, operands in calls]
        assert not any(streamed for _, streamed in past)
        monkeypatch.setattr(cpu, "memory_from", lambda: recycling.FROM)
        forget_plans()
        for (name, operands), values in zip(calls, expected, strict=True):
            past.clear()
            getattr(kernels, name)(*operands)
            past.clear()
            again = getattr(kernels, name)(*operands)
            assert bits(again) == bits(values), name
            assert [streamed for _, streamed in past] == [1]
    forget_plans()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_gradient_of_sigmoid_is_rounded_as_written(rng, split_everything, dtype):
    """y and 1 - y lie far apart where y is near 0 or 1, so that another order of the products shows."""
    x, grad = 8 * rng.standard_normal((2, 40_001)).astype(dtype)
    with tilewise.using(backend="cpu"):
        y = kernels.sigmoid(x)
        for threads in (1, 2):
            with tilewise.using(threads=threads):
                np.testing.assert_array_equal(kernels.sigmoid_backward(grad, y), grad * y * (1 - y))


@pytest.mark.parametrize("name", [*ELEMENTWISE, *WITHOUT_GRADIENT, *SOFTMAXES])
def test_bits_do_not_depend_on_the_thread_count(rng, name):
    function, backward = getattr(kernels, name), getattr(kernels, f"{name}_backward", None)
    for shape in ((300, 1000), (30000, 10), (10, 30001)):
        x = (3 * rng.standard_normal(shape)).astype(np.float32)
        grad = rng.standard_normal(shape).astype(np.float32)
        for axis in [{"axis": 0}, {"axis": 1}] if "softmax" in name else [{}]:
            results = []
            for threads in (1, 2, 3):
                with tilewise.using(backend="cpu", threads=threads):
                    y = function(x, **axis)
                    results.append(y.tobytes() + (backward(grad, y, **axis).tobytes() if backward else b""))
            assert results[0] == results[1] == results[2]


# ------------------------------------------------------------------------------------------------ accuracy, range, NaN


@pytest.mark.parametrize(("dtype", "reach"), [(np.float32, 87), (np.float64, 708)])
def test_exponentials_are_good_to_a_few_units_in_the_last_place(rng, dtype, reach):
    with tilewise.using(backend="cpu"):
        for name, limit, units in (("tanh", 20, 4), ("sigmoid", reach, 4), ("sigmoid", 8, 4)):
            near, far = rng.uniform(-limit, limit, (2, 100_000))
            x = np.concatenate([far, near * np.exp(-rng.uniform(0, 30, near.size))]).astype(dtype)
            wide = x.astype(np.longdouble)
            exact = np.tanh(wide) if name == "tanh" else 1 / (1 + np.exp(-wide))
            actual = getattr(kernels, name)(x)
            error = np.abs((actual - exact) / np.spacing(np.abs(exact).astype(dtype)))
            assert error.max() < units, f"{name}: {float(error.max())} units at {x[error.argmax()]}"


def test_softmax_of_the_lecture(backend):
    for dtype in (np.float32, np.float64):
        y = kernels.softmax(np.array([1, 2, 788, 789], dtype))
        np.testing.assert_allclose(y, [0, 0, 0.268941, 0.731059], atol=5e-7)
        assert y[0] == y[1] == 0
        log = kernels.log_softmax(np.array([1, 2, 788, 789], dtype))
        np.testing.assert_allclose(log, [-788.313262, -787.313262, -1.313262, -0.313262], rtol=1e-7, atol=5e-7)


@pytest.mark.parametrize("size", [8, 100])
def test_nan_and_infinity(backend, size):
    for dtype in (np.float32, np.float64):
        x = np.linspace(-3, 3, size).astype(dtype)
        x[:5] = np.nan, np.inf, -np.inf, 0, 5
        special = {name: getattr(kernels, name)(x)[:5].tolist() for name in [*ELEMENTWISE, *WITHOUT_GRADIENT]}
        assert str(special["relu"]) == "[nan, inf, 0.0, 0.0, 5.0]"
        assert str(special["leaky_relu"][:4]) == "[nan, inf, -inf, 0.0]"
        assert str(special["sigmoid"][:4]) == "[nan, 1.0, 0.0, 0.5]"
        assert str(special["tanh"][:3]) == "[nan, 1.0, -1.0]"
        assert str(special["step"]) == "[nan, 1.0, 0.0, 0.0, 1.0]"
        assert str(special["sign"]) == "[nan, 1.0, -1.0, 0.0, 1.0]"
        rows = np.stack([np.where(np.isfinite(x), x, 1).astype(dtype)] * 5)
        rows[1, 3], rows[2, 3], rows[3, 3], rows[4] = np.nan, np.inf, -np.inf, -np.inf
        for table, axis in ((rows, 1), (rows.T.copy(), 0)):
            for name in SOFTMAXES:
                y = getattr(kernels, name)(table, axis=axis)
                y = y if axis else y.T
                assert np.isnan(y).all(axis=1).tolist() == [False, True, True, False, True]
                assert np.isfinite(y[0]).all()
                assert y[3, 3] == (0 if name == "softmax" else -np.inf)
        assert str(kernels.relu_backward(np.ones(2, dtype), np.array([np.nan, 0], dtype)).tolist()) == "[1.0, 0.0]"


# ---------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", [*ELEMENTWISE, *SOFTMAXES])
def test_gradient_is_the_numerical_one(rng, backend, name):
    function, backward = getattr(kernels, name), getattr(kernels, f"{name}_backward")
    for axis in [{"axis": 0}, {"axis": 1}] if name in SOFTMAXES else [{}]:
        x, cotangent = rng.standard_normal((3, 5)), rng.standard_normal((3, 5))
        expected = numerical_gradient(lambda x, a=axis: function(x, **a), x, cotangent)
        assert_gradient(backward(cotangent, function(x, **axis), **axis), expected)


# ---------------------------------------------------------------------------------------------------------- wrong calls


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: kernels.relu([1.0]), TypeError, "relu: x must be a NumPy array or a CPU torch tensor, got list"),
        (lambda x: kernels.relu(None), TypeError, "relu: x must be an array"),
        (lambda x: kernels.tanh(x.astype(int)), TypeError, "tanh: x is int64, which is not supported"),
        (
            lambda x: kernels.relu_backward(x, x.astype("f4")),
            TypeError,
            "relu_backward: y is float32 but grad is float64",
        ),
        (lambda x: kernels.tanh_backward(x, x[:1]), ValueError, r"same shape, got \(2, 3\) and \(1, 3\)"),
        (lambda x: kernels.softmax(x, 2), ValueError, "softmax: axis 2 is out of range for an array of 2 dimensions"),
        (lambda x: kernels.log_softmax(x, -3), ValueError, "log_softmax: axis -3 is out of range"),
        (lambda x: kernels.softmax(x, 1.0), TypeError, "softmax: axis must be an int, got 1.0"),
        (lambda x: kernels.softmax(x, True), TypeError, "softmax: axis must be an int, got True"),
        (lambda x: kernels.leaky_relu(x, "a"), TypeError, "leaky_relu: negative_slope must be a number, got 'a'"),
        (lambda x: kernels.leaky_relu(x, np.nan), ValueError, "leaky_relu: negative_slope must be finite, got nan"),
        (lambda x: kernels.leaky_relu_backward(x, x, -1), ValueError, "negative_slope must not be negative"),
    ],
)
def test_wrong_calls(rng, backend, call, error, message):
    with pytest.raises(error, match=message):
        call(rng.standard_normal((2, 3)))


def test_both_backends_have_the_same_signatures():
    from tilewise.kernels.cpu import activation as cpu
    from tilewise.kernels.reference import activation as reference

    names = [n for n, f in vars(reference).items() if inspect.isfunction(f)]
    assert len(names) == 14
    for name in names:
        assert str(inspect.signature(getattr(cpu, name))) == str(inspect.signature(getattr(reference, name)))


# ----------------------------------------------------------------------------------------------- what other kernels use


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_epilogue_activations_are_the_functions(rng, dtype):
    from tilewise.kernels.cpu import epilogue
    from tilewise.kernels.cpu.jit import FASTMATH, compiled

    def row(flat, code):
        epilogue.activate_row(flat, 3, flat.size - 5, code)

    def scalars(flat, code):
        for i in range(3, flat.size - 2):
            flat[i] = epilogue.apply_activation(flat[i], code)

    x = (4 * rng.standard_normal(100)).astype(dtype)
    x[10] = np.nan
    for function in (compiled(row, FASTMATH, parallel=False), compiled(scalars, FASTMATH, parallel=False)):
        for name, code in epilogue.ACTIVATION_CODES.items():
            y = x.copy()
            function(y, code)
            expected = x.copy()
            if name == "relu6":
                expected[3:-2] = np.clip(x[3:-2], 0, 6)
            elif name is not None:
                expected[3:-2] = getattr(kernels, name)(x[3:-2])
            assert_close(y, expected)


def test_loops_over_exponentials_are_vector_code():
    import numba

    from tilewise.kernels.cpu import activation as cpu
    from tilewise.kernels.cpu.simd import VECTOR_BYTES

    if VECTOR_BYTES == 16:
        pytest.skip("looks for the registers of AVX2 and AVX-512")
    register = {64: "zmm", 32: "ymm"}[VECTOR_BYTES]
    for kernel in (cpu._forward_kernel, cpu.softmax_rows):
        fresh = numba.njit(fastmath=set(kernel.fastmath), error_model="numpy")(kernel.function)
        arrays = [numba.types.Array(numba.float32, 1, "C")] * 2
        rest = (numba.float64, numba.int64) if kernel is cpu._forward_kernel else (numba.boolean,)
        fresh.compile((*arrays, numba.int64, *rest))
        assembly = fresh.inspect_asm(fresh.signatures[0])
        polynomials = re.findall(rf"vfmadd\w+ps.*{register}", assembly)
        assert len(polynomials) >= 14, f"{kernel.__name__}: {len(polynomials)} vector multiply-adds"
