"""Activations, softmax, padding and dropout inside @njit: the bits of the Python call, over layouts and dtypes."""

import numpy as np
import pytest
from numba import njit
from numba.core.errors import TypingError

import tilewise as t
from tilewise.kernels.reference.dropout_mask import numbers

FORWARDS = ("relu", "leaky_relu", "sigmoid", "tanh", "step", "sign")
BACKWARDS = ("relu_backward", "leaky_relu_backward", "sigmoid_backward", "tanh_backward")


@njit
def activations(x):
    return t.relu(x), t.leaky_relu(x, 0.2), t.sigmoid(x), t.tanh(x), t.step(x), t.sign(x)


@njit
def gradients(grad, y):
    return (
        t.relu_backward(grad, y), t.leaky_relu_backward(grad, y, 0.2), t.sigmoid_backward(grad, y),
        t.tanh_backward(grad, y),
    )  # fmt: skip


@njit
def softmaxes(x, axis):
    y, logs = t.softmax(x, axis), t.log_softmax(x, axis)
    return y, logs, t.softmax_backward(x, y, axis), t.log_softmax_backward(x, logs, axis)


def variants(array):
    """The array in other places of memory: row-major, column-major, every second element, read-only."""
    sparse = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    sparse[..., ::2] = array
    fixed = array.copy()
    fixed.flags.writeable = False
    return array, np.asfortranarray(array), sparse[..., ::2], fixed


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_activations(rng, dtype):
    x = rng.standard_normal((5, 6, 7)).astype(dtype)
    x[0, 0, :3] = np.nan, 0, np.inf
    options = {"leaky_relu": (0.2,), "leaky_relu_backward": (0.2,)}
    y = t.sigmoid(x)
    for other, of_y in zip(variants(x), variants(y), strict=True):
        for name, result in zip(FORWARDS, activations(other), strict=True):
            np.testing.assert_array_equal(result, getattr(t, name)(x, *options.get(name, ())), err_msg=name)
        for name, result in zip(BACKWARDS, gradients(other, of_y), strict=True):
            np.testing.assert_array_equal(result, getattr(t, name)(x, y, *options.get(name, ())), err_msg=name)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(70, 5), (3, 4, 130), (0, 3), (1, 1, 1)])
def test_softmax(rng, dtype, shape):
    x = rng.standard_normal(shape).astype(dtype)
    for axis in range(-x.ndim, x.ndim):
        y, logs, slopes, log_slopes = softmaxes(x, axis)
        np.testing.assert_array_equal(y, t.softmax(x, axis))
        np.testing.assert_array_equal(logs, t.log_softmax(x, axis))
        np.testing.assert_array_equal(slopes, t.softmax_backward(x, y, axis))
        np.testing.assert_array_equal(log_slopes, t.log_softmax_backward(x, logs, axis))


@njit
def paddings(x, padding, value):
    return (
        t.pad(x, padding), t.pad(x, padding, value=value), t.pad(x, padding, "reflect"), t.pad(x, padding, "replicate"),
        t.pad(x, padding, mode="circular"),
    )  # fmt: skip


@njit
def pad_gradients(grad, shape, padding):
    return t.pad_backward(grad, shape, padding), t.pad_backward(grad, shape, padding, "reflect")


@pytest.mark.parametrize("padding", [0, 2, (1, 2), ((1, 0), (2, 3))])
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 4, 40), (0, 4, 5)])
def test_padding(rng, padding, shape):
    x = rng.standard_normal(shape).astype(np.float32)
    wanted = [{}, {"value": 1.5}, {"mode": "reflect"}, {"mode": "replicate"}, {"mode": "circular"}]
    for other in variants(x):
        for options, result in zip(wanted, paddings(other, padding, 1.5), strict=True):
            np.testing.assert_array_equal(result, t.pad(x, padding, **options))
    grad = rng.standard_normal(t.pad(x, padding).shape).astype(np.float32)
    for mode, result in zip(("constant", "reflect"), pad_gradients(grad, x.shape, padding), strict=True):
        np.testing.assert_allclose(result, t.pad_backward(grad, x.shape, padding, mode), rtol=1e-6, atol=1e-6)


@njit
def dropouts(x, p, seed, call):
    return t.dropout(x, p, seed=seed, call=call), t.dropout_backward(x, p, seed=seed)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dropout(rng, dtype):
    x = rng.standard_normal((3, 4, 13)).astype(dtype)
    rounded = (int(numbers(x.size, 5, 9)[70]) + 0.6) / 2**32  # up: element 70 is dropped
    for p, seed in ((rounded, 5), (0.0, 2**40), (1.0, 7), (1 / 3, 2**64 - 1)):
        dropped, gradient = dropouts(variants(x)[2], p, np.uint64(seed), 9)
        np.testing.assert_array_equal(dropped, t.dropout(x, p, seed=seed, call=9))
        np.testing.assert_array_equal(gradient, t.dropout_backward(x, p, seed=seed))


@njit
def reflected(x, padding):
    return t.pad(x, padding, "reflect")


def test_wrong_values_raise_what_the_python_call_raises(rng):
    x = rng.standard_normal((4, 5)).astype(np.float32)
    for wrong in (lambda: softmaxes(x, 2), lambda: t.softmax(x, 2)):
        with pytest.raises(ValueError, match="softmax: axis 2 is out of range for an array of 2 dimensions"):
            wrong()
    for wrong in (lambda: gradients(x, x[1:]), lambda: t.relu_backward(x, x[1:])):
        with pytest.raises(ValueError, match=r"relu_backward: .* the same shape, got \(4, 5\) and \(3, 5\)"):
            wrong()
    for wrong in (lambda: dropouts(x, 1.5, 0, 0), lambda: t.dropout(x, 1.5, seed=0)):
        with pytest.raises(ValueError, match=r"dropout: p must be from 0 to 1, got 1\.5"):
            wrong()
    with pytest.raises(ValueError, match="dropout: seed and call must be at least 0, got -1 and 2"):
        dropouts(x, 0.5, -1, 2)
    for wrong in (lambda: reflected(x, 4), lambda: t.pad(x, 4, "reflect")):
        with pytest.raises(ValueError, match="pad: reflect padding of 4 needs a larger"):
            wrong()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: t.relu(1), "relu: x must be an array, got"),
        (lambda x: t.relu(x > 0), "inside @njit, x must be float32 or float64, got bool"),
        (lambda x: t.softmax(x, 0.5), "softmax: axis must be an int, got"),
        (lambda x: t.leaky_relu(x, "a"), "leaky_relu: negative_slope must be a number"),
        (lambda x: t.relu_backward(x, x[0]), "the same shape, got 2 and 1 dimensions"),
        (lambda x: t.relu_backward(x, np.ones((2, 2))), "y is float64 but grad is float32"),
        (lambda x: t.dropout(x), "dropout: seed must be an int, got None"),
        (lambda x: t.dropout(x, seed=1, out=x), "dropout: out is not supported inside @njit"),
        (lambda x: t.pad(x[0], 1), "at least 2 dimensions"),
        (lambda x: t.pad(x, 1.5), "padding must be an int, a pair"),
        (lambda x: t.pad(x, 1, "mirror"), "mode must be one of 'constant', 'reflect'"),
        (lambda x: t.pad(x, 1, str(x.size)), "mode must be written in the call, as one of 'constant'"),
        (lambda x: t.sgd_step(x, x, lr=0.1), "sgd_step: cannot be called inside @njit; call it from Python"),
        (lambda x: t.max_unpool2d(x, x, 2), "max_unpool2d: cannot be called inside @njit; call it from Python"),
    ],
    ids=lambda value: value if isinstance(value, str) else "call",
)
def test_wrong_calls_are_typing_errors_that_say_what_would_be_right(call, message):
    with pytest.raises(TypingError, match=message):
        njit(call)(np.ones((2, 2), np.float32))
