"""Matrix products and batch norm inside @njit: the bits of the Python call."""

import numpy as np
import pytest
from numba import njit
from numba.core.errors import TypingError

import tilewise as t

# (m, depth, n): by dot products, in place, in blocks, and the sum in parts; with AVX2 by dot products, others by
# blocks; wide, by the 1x1 convolution
SIZES = [
    (5, 30, 6), (1, 300, 40), (130, 100, 150), (200, 500, 300), (40, 5000, 30), (300, 64, 3), (4, 0, 3), (0, 4, 3),
    (100, 500, 100), (65, 300, 2064),
]  # fmt: skip


@njit
def product(a, b):
    return t.matmul(a, b)


@njit
def dense(x, weight, bias):
    return t.linear(x, weight, bias, activation="relu"), t.linear(x, weight)


@njit
def dense_gradients(grad, x, weight):
    return t.linear_backward(grad, x, weight)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_matmul(rng, dtype):
    for m, depth, n in SIZES:
        a, b = rng.standard_normal((m, depth)).astype(dtype), rng.standard_normal((depth, n)).astype(dtype)
        for left in (a, np.asfortranarray(a)):
            for right in (b, np.asfortranarray(b), np.repeat(b, 2, axis=1)[:, ::2]):
                if min(left.shape + right.shape) > 1:  # one row is stored both ways
                    np.testing.assert_array_equal(product(left, right), t.matmul(left, right))
                np.testing.assert_allclose(product(left, right), a @ b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_vector_times_a_large_matrix(rng, dtype):
    """By its own kernel, whose order of summing is not that of other rows."""
    a, b = rng.standard_normal((1, 700)).astype(dtype), rng.standard_normal((700, 300)).astype(dtype)
    expected = t.matmul(a, b)
    np.testing.assert_array_equal(product(a, b), expected)
    np.testing.assert_array_equal(product(a[0], b), expected[0])


def test_matmul_of_vectors_and_stacks(rng):
    shapes = [((5,), (5,)), ((5,), (5, 4)), ((3, 5), (5,)), ((6, 4, 5), (5, 3)), ((2, 1, 4, 5), (3, 5, 6))]
    for a, b in [*shapes, ((3, 200, 150), (3, 150, 160)), ((4, 5), (3, 5, 2)), ((0, 4, 5), (5, 3))]:
        a, b = (rng.standard_normal(shape).astype(np.float32) for shape in (a, b))
        np.testing.assert_allclose(product(a, b), a @ b, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(product(a, b), t.matmul(a, b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_linear(rng, dtype):
    for rows, depth, outputs in SIZES:
        x, weight, bias = (rng.standard_normal(s).astype(dtype) for s in ((rows, depth), (outputs, depth), (outputs,)))
        for matrix in (weight, np.asfortranarray(weight)):
            for result, activation, shift in zip(dense(x, matrix, bias), ("relu", None), (bias, None), strict=True):
                np.testing.assert_array_equal(result, t.linear(x, matrix, shift, activation=activation))
        grad = rng.standard_normal((rows, outputs)).astype(dtype)
        if depth:
            for result, right in zip(dense_gradients(grad, x, weight), t.linear_backward(grad, x, weight), strict=True):
                np.testing.assert_array_equal(result, right)
    x = rng.standard_normal((2, 3, 7)).astype(dtype)
    weight, bias = rng.standard_normal((4, 7)).astype(dtype), rng.standard_normal(4).astype(dtype)
    np.testing.assert_array_equal(dense(x, weight, bias)[0], t.linear(x, weight, bias, activation="relu"))


@njit
def normalised(x, mean, var, weight, bias):
    return t.batch_norm(x, mean, var, weight, bias, activation="relu"), t.batch_norm(x, mean, var, eps=1e-3)


@njit
def trained(x, mean, var, weight, bias):
    return t.batch_norm(x, mean, var, weight, bias, training=True, momentum=0.2, return_stats=True)


@njit
def trained_nhwc(x, mean, var, weight, bias):
    return t.batch_norm(x, mean, var, weight, bias, True, 0.2, layout="NHWC", return_stats=True)


@njit
def frozen_nhwc(grad, x, mean, invstd, weight):
    return t.batch_norm_backward(grad, x, mean, invstd, weight, training=False, layout="NHWC")


@njit
def norm_gradients(grad, x, mean, invstd, weight):
    return t.batch_norm_backward(grad, x, mean, invstd, weight)


def test_batch_norm(rng):
    for shape, axis in (((3, 5, 7, 6), 1), ((2, 40, 9, 9), 1), ((8, 3, 60, 60), 1), ((4, 6, 5), 0), ((30, 9), 1)):
        x = rng.standard_normal(shape).astype(np.float32)
        c = shape[axis]
        mean, weight, bias = (rng.standard_normal(c).astype(np.float32) for _ in range(3))
        var = rng.random(c, dtype=np.float32) + 1
        first, second = normalised(x, mean, var, weight, bias)
        np.testing.assert_array_equal(first, t.batch_norm(x, mean, var, weight, bias, activation="relu"))
        np.testing.assert_array_equal(second, t.batch_norm(x, mean, var, eps=1e-3))
        ours, theirs = (mean.copy(), var.copy()), (mean.copy(), var.copy())
        results = trained(x, *ours, weight, bias)
        wanted = t.batch_norm(x, *theirs, weight, bias, training=True, momentum=0.2, return_stats=True)
        for result, right in zip((*results, *ours), (*wanted, *theirs), strict=True):
            np.testing.assert_array_equal(result, right)
        grad = rng.standard_normal(shape).astype(np.float32)
        for result, right in zip(
            norm_gradients(grad, x, *wanted[1:], weight),
            t.batch_norm_backward(grad, x, *wanted[1:], weight),
            strict=True,
        ):
            np.testing.assert_array_equal(result, right)


def test_batch_norm_nhwc_in_double_precision(rng):
    x = rng.standard_normal((3, 6, 7, 20))[..., ::2]
    mean, weight, bias = (rng.standard_normal(10) for _ in range(3))
    ours, theirs = (mean.copy(), abs(mean)), (mean.copy(), abs(mean))
    results = trained_nhwc(x, *ours, weight, bias)
    wanted = t.batch_norm(x, *theirs, weight, bias, True, 0.2, layout="NHWC", return_stats=True)
    for result, right in zip((*results, *ours), (*wanted, *theirs), strict=True):
        np.testing.assert_array_equal(result, right)
    grad = rng.standard_normal(x.shape)
    for result, right in zip(
        frozen_nhwc(grad, x, *wanted[1:], weight),
        t.batch_norm_backward(grad, x, *wanted[1:], weight, training=False, layout="NHWC"),
        strict=True,
    ):
        np.testing.assert_array_equal(result, right)


def test_wrong_shapes_raise_what_the_python_call_raises(rng):
    a = np.ones((3, 4), np.float32)
    for call in (product, t.matmul):
        with pytest.raises(ValueError, match=r"a's last axis is 4 but b's second to last is 3 \(a \(3, 4\), b \(3, 4"):
            call(a, a)
    for call in (lambda *args: dense(*args), lambda *args: t.linear(*args)):
        with pytest.raises(ValueError, match="linear: weight expects 3 features but x has 4"):
            call(a, a[:, :3], a[0, :3])
        with pytest.raises(ValueError, match=r"linear: bias must have shape \(3,\), one value per output channel, got"):
            call(a, a, a[0])
    one = np.ones(1, np.float32)
    with pytest.raises(ValueError, match="more than 1 value per channel is needed in training"):
        trained(np.ones((1, 1, 1, 1), np.float32), one, one, one, one)
    with pytest.raises(ValueError, match=r"must have shape \(4,\), one value for each channel, got \(1,\)"):
        trained(np.ones((2, 4, 3, 3), np.float32), one, one, one, one)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: t.matmul(x, x, out=x), "matmul: out is not supported inside @njit; leave it out"),
        (lambda x: t.matmul(x, 2), "matmul: b must be an array"),
        (lambda x: t.linear(x, x, activation="gelu"), "linear: activation must be one of None, 'relu', 'leaky_relu'"),
        (lambda x: t.linear(x, x, x), "linear: bias must have 1 dimensions, got 2"),
        (lambda x: t.batch_norm(x, None, None), "running_mean and running_var are required in evaluation"),
        (lambda x: t.batch_norm(x, x[0], None), "must both be arrays or both None"),
        (lambda x: t.batch_norm(x, x[0], x[0], training=x.size > 1), "training must be written in the call"),
        (lambda x: t.batch_norm(x, x[:, 0], x[:, 0], None, None, True), "must be contiguous and writeable in training"),
    ],
    ids=lambda value: value if isinstance(value, str) else "call",
)
def test_wrong_calls_are_typing_errors_that_say_what_would_be_right(call, message):
    with pytest.raises(TypingError, match=message):
        njit(call)(np.ones((4, 4), np.float32))
