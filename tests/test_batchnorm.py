"""Batch normalisation: the reference against PyTorch, the CPU kernels against the reference, gradients, wrong calls."""

import inspect
from itertools import product

import numpy as np
import pytest
from batchnorm_cases import ACTIVATIONS, LAYOUTS, laid, plain, statistics
from gradcheck import assert_gradient, numerical_gradient
from tolerances import assert_close

import tilewise
from tilewise import kernels


def torch_activation(torch, name):
    functional = torch.nn.functional
    special = {None: lambda y: y, "relu6": functional.relu6, "leaky_relu": functional.leaky_relu}
    return special.get(name) or getattr(torch, name)


# ----------------------------------------------------------------------------------------------------- against PyTorch


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_forward_and_backward_are_pytorchs(torch, rng, backend, training, layout, dtype):
    for shape, affine, activation in product([(4, 5, 6, 7), (1, 3, 2, 2), (9, 4)], [True, False], ACTIVATIONS):
        x = (2 * rng.standard_normal(shape) + 1).astype(dtype)
        mean, var, weight, bias = statistics(rng, shape[1], dtype)
        theirs = [torch.from_numpy(a.copy()) for a in (x, mean, var, weight, bias)]
        leaves = [theirs[0].requires_grad_(), theirs[3].requires_grad_(), theirs[4].requires_grad_()]
        factors = leaves[1:] if affine else (None, None)
        linear = torch.nn.functional.batch_norm(leaves[0], *theirs[1:3], *factors, training, 0.3, 1e-3)
        expected = torch_activation(torch, activation)(linear)
        factors = (weight, bias) if affine else (None, None)
        options = {"layout": layout, "activation": activation, "return_stats": True}
        y, saved_mean, invstd = kernels.batch_norm(laid(x, layout), mean, var, *factors, training, 0.3, 1e-3, **options)
        values = x.size // shape[1]
        assert y.dtype == saved_mean.dtype == invstd.dtype == dtype
        assert_close(plain(y, layout), expected.detach().numpy(), reduction=values)
        assert_close(mean, theirs[1].numpy(), reduction=values)
        assert_close(var, theirs[2].numpy(), reduction=values)
        if activation is None:
            cotangent = rng.standard_normal(shape).astype(dtype)
            linear.backward(torch.from_numpy(cotangent))
            grads = kernels.batch_norm_backward(
                laid(cotangent, layout),
                laid(x, layout),
                saved_mean,
                invstd,
                factors[0],
                training=training,
                layout=layout,
            )
            scale = float(abs(leaves[0].grad).max()) + 1
            assert_close(plain(grads[0], layout), leaves[0].grad.numpy(), reduction=values, scale=scale)
            if affine:
                for ours, leaf in zip(grads[1:], leaves[1:], strict=True):
                    assert_close(ours, leaf.grad.numpy(), reduction=values, scale=10)


def test_only_a_weight_or_only_a_bias(torch, rng, backend):
    x = rng.standard_normal((3, 4, 5, 5))
    mean, var, weight, bias = statistics(rng, 4, np.float64)
    for factors in ((weight, None), (None, bias)):
        theirs = [None if a is None else torch.from_numpy(a) for a in factors]
        expected = torch.nn.functional.batch_norm(torch.from_numpy(x), None, None, *theirs, training=True)
        for layout in LAYOUTS:
            y = kernels.batch_norm(laid(x, layout), None, None, *factors, training=True, layout=layout)
            assert_close(plain(y, layout), expected.numpy(), reduction=75)
            evaluated = kernels.batch_norm(laid(x, layout), mean, var, *factors, layout=layout)
            args = [torch.from_numpy(a) for a in (x, mean, var)]
            assert_close(plain(evaluated, layout), torch.nn.functional.batch_norm(*args, *theirs).numpy())


def test_tensors_in_tensors_out_and_their_statistics_move(torch, rng):
    x = torch.from_numpy(rng.standard_normal((4, 3, 5, 6)))
    ours, theirs = ([torch.zeros(6, dtype=x.dtype)[::2], torch.ones(3, dtype=x.dtype)] for _ in range(2))
    y, mean, invstd = kernels.batch_norm(x, *ours, training=True, return_stats=True)
    expected = torch.nn.functional.batch_norm(x, *theirs, training=True)
    assert all(type(a) is torch.Tensor for a in (y, mean, invstd))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ours, theirs)
    grads = kernels.batch_norm_backward(x, x, mean, invstd)
    assert all(type(a) is torch.Tensor for a in grads)
    flat = kernels.batch_norm(x.reshape(-1, 6), None, None, training=True)
    torch.testing.assert_close(flat, torch.nn.functional.batch_norm(x.reshape(-1, 6), None, None, training=True))


# ------------------------------------------------------------------------------------ CPU kernels against the reference

# Planes and channels around: a vector, the block of 4096, a group of small planes, the super-rows of channels last.
SHAPES = [
    *((3, 5, 1, w) for w in (1, 2, 7, 8, 15, 16, 17, 63, 64, 65)),
    *((2, c, 3, 5) for c in (1, 2, 3, 31, 32, 33, 63, 64, 65, 257)),
    *((2, 2, 1, w) for w in (2047, 2048, 2049, 4095, 4096, 4097, 8191, 12289)),
    *((n, 17, 7, 7) for n in (1, 2, 31)),
    (1, 40, 50, 50), (2, 3, 150, 151), (70, 64, 3, 3), (5, 1000, 2, 2), (3, 513, 3, 7),
    (300, 3), (4097, 10), (2, 1), (3, 700), (33, 64),
    # rows of channels last: around the 4 and 8 that are taken together, a block of 32, of 128, and several pixels a row
    *((n, 70) for n in (3, 4, 5, 7, 8, 9, 31, 32, 33, 65)), *((n, 64) for n in (127, 128, 129, 257)),
    *((n, 2) for n in (255, 256, 257, 300)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cpu_is_the_reference(rng, layout, dtype):
    for number, shape in enumerate(SHAPES):
        x = (rng.standard_normal(shape) + 3).astype(dtype)
        grad = rng.standard_normal(shape).astype(dtype)
        vectors = statistics(rng, shape[1], dtype)
        values = x.size // shape[1]
        results = {}
        for name, training in product(("reference", "cpu"), (True, False)):
            kind = np.float64 if name == "reference" else dtype
            operands, state = laid(x, layout).astype(kind), [v.astype(kind) for v in vectors]
            activation = ACTIVATIONS[number % len(ACTIVATIONS)]
            with tilewise.using(backend=name):
                forward = kernels.batch_norm(
                    operands, *state, training, layout=layout, activation=activation, return_stats=True
                )
                cotangent = laid(grad, layout).astype(kind)
                stats = [s.astype(kind) for s in results[training][1:3]] if name == "cpu" else forward[1:]
                backward = kernels.batch_norm_backward(
                    cotangent, operands, *stats, state[2], training=training, layout=layout
                )
            if name == "reference":
                results[training] = [*forward, *state[:2], *backward]
                continue
            wanted = results[training]
            conditioning = 1 + 4 * float(np.abs(wanted[2]).max())  # digits lost where a channel's values are all near 3
            for actual, expected in zip([*forward, *state[:2]], wanted[:5], strict=True):
                assert actual.dtype == dtype
                assert_close(actual, expected, reduction=values, scale=conditioning * float(np.abs(expected).max()))
            # sums of `values` terms of size 1; two values per channel leave little of the gradient
            largest = float(np.abs(wanted[2]).max() * np.abs(vectors[2]).max()) * 4
            assert_close(backward[0], wanted[5], reduction=values, dtype=dtype, scale=largest)
            assert_close(backward[1], wanted[6], reduction=values, dtype=dtype, scale=4 * values**0.5)
            assert_close(backward[2], wanted[7], reduction=values, dtype=dtype, scale=4 * values**0.5)


def test_unbatched_images(rng, backend):
    x, grad = rng.standard_normal((2, 3, 6, 5))
    mean, var, weight, bias = statistics(rng, 3, np.float64)
    for layout, training in product(LAYOUTS, (True, False)):
        states = [[mean.copy(), var.copy(), weight, bias] for _ in range(2)]
        options = {"layout": layout, "return_stats": True}
        one = kernels.batch_norm(laid(x, layout), *states[0], training, **options)
        many = kernels.batch_norm(laid(x, layout)[None], *states[1], training, **options)
        assert one[0].shape == laid(x, layout).shape
        np.testing.assert_array_equal(one[0], many[0][0])
        for a, b in zip([*one[1:], *states[0]], [*many[1:], *states[1]], strict=True):
            np.testing.assert_array_equal(a, b)
        single = kernels.batch_norm_backward(laid(grad, layout), laid(x, layout), *one[1:], weight, layout=layout)
        batch = kernels.batch_norm_backward(
            laid(grad, layout)[None], laid(x, layout)[None], *one[1:], weight, layout=layout
        )
        np.testing.assert_array_equal(single[0], batch[0][0])
        np.testing.assert_array_equal(single[1], batch[1])


def test_any_memory_layout(rng, backend):
    x, grad = rng.standard_normal((2, 3, 4, 6, 5))
    mean, var, weight, bias = statistics(rng, 4, np.float64)
    running = [mean.copy(), var.copy()]
    expected = kernels.batch_norm(x, *running, weight, bias, True, return_stats=True)
    strided = [np.repeat(a, 2)[::2] for a in (mean, var, weight, bias)]
    frozen = np.asfortranarray(x)
    frozen.flags.writeable = False
    y, *stats = kernels.batch_norm(frozen, *strided, True, return_stats=True)
    for a, b in zip([y, *stats, *strided[:2]], [*expected, *running], strict=True):
        assert_close(a, b, reduction=90)
    wanted = kernels.batch_norm_backward(grad, x, *stats, weight)
    gradients = kernels.batch_norm_backward(np.asfortranarray(grad), frozen, *stats, strided[2])
    for a, b in zip(gradients, wanted, strict=True):
        assert_close(a, b, reduction=90)
    y = kernels.batch_norm(frozen, strided[0], strided[1], weight, bias)  # read-only ones are welcome in evaluation
    for a in strided[:2]:
        a.flags.writeable = False
    np.testing.assert_array_equal(kernels.batch_norm(frozen, strided[0], strided[1], weight, bias), y)


def test_empty_batch(backend):
    for shape, layout in (((0, 3, 4, 4), "NCHW"), ((0, 4, 4, 3), "NHWC"), ((2, 3, 0, 4), "NCHW"), ((0, 3), "NCHW")):
        x, mean, var = np.zeros(shape), np.full(3, 5.0), np.full(3, 7.0)
        for training in (True, False):
            y, *stats = kernels.batch_norm(x, mean, var, None, None, training, layout=layout, return_stats=True)
            assert y.shape == shape
            assert np.isfinite(stats).all()
            assert mean.tolist() == [5, 5, 5]
            assert var.tolist() == [7, 7, 7]
            grads = kernels.batch_norm_backward(x, x, *stats, training=training, layout=layout)
            assert grads[0].shape == shape
            assert [g.tolist() for g in grads[1:]] == [[0, 0, 0]] * 2


# ----------------------------------------------------------------------------------------------------- accuracy and NaN


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_survive_a_large_mean_and_outliers(rng, backend, layout):
    x = rng.standard_normal((4, 4, 50, 60)).astype(np.float32)
    x[:, 0] += 1e4
    x[:, 1] = x[:, 1] * 1e-2 - 1e4
    x[:, 2, 0] = 1e4  # the first row far from the rest
    x[:, 3] += 1e4
    x[0, 3, 0, 0] = 0  # and the first element
    state = [np.zeros(4, np.float32), np.zeros(4, np.float32)]
    y, mean, invstd = kernels.batch_norm(
        laid(x, layout), *state, training=True, momentum=1, layout=layout, return_stats=True
    )
    wide = x.astype(np.float64)
    variance = wide.var((0, 2, 3))
    np.testing.assert_allclose(mean, wide.mean((0, 2, 3)), rtol=1e-7)
    np.testing.assert_allclose(invstd, 1 / np.sqrt(variance + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(state[1], variance * 12000 / 11999, rtol=1e-6)
    exact = (wide - wide.mean((0, 2, 3), keepdims=True)) / np.sqrt(variance + 1e-5).reshape(1, 4, 1, 1)
    np.testing.assert_allclose(plain(y, layout), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_stay_in_their_channel(rng, backend, layout):
    for shape in ((2, 3, 4, 5), (2, 40, 20, 30)):
        x = rng.standard_normal(shape).astype(np.float32)
        x[1, 0, 2, 3], x[0, 1, 0, 0] = np.nan, np.inf
        for activation in (None, "relu"):
            y, mean, _ = kernels.batch_norm(
                laid(x, layout), None, None, training=True, layout=layout, activation=activation, return_stats=True
            )
            y = plain(y, layout)
            assert np.isnan(y[:, :2]).all()
            assert np.isfinite(y[:, 2:]).all()
            assert str(mean[:2].tolist()) in ("[nan, inf]", "[nan, nan]")
        y = plain(kernels.batch_norm(laid(x, layout), mean * 0 + 1, mean * 0 + 1, layout=layout), layout)
        assert np.isnan(y[1, 0, 2, 3])
        evaluated = kernels.batch_norm(
            laid(x, layout), np.zeros(shape[1], "f4"), np.ones(shape[1], "f4"), layout=layout
        )
        assert np.isnan(plain(evaluated, layout)).sum() == 1
        assert np.isinf(plain(evaluated, layout)).sum() == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_the_numerical_ones(rng, backend, training, layout):
    x, cotangent = (laid(a, layout) for a in rng.standard_normal((2, 3, 2, 2, 3)))
    mean, var, weight, bias = statistics(rng, 2, np.float64)

    def forward(x, weight, bias):
        return kernels.batch_norm(x, mean.copy(), var.copy(), weight, bias, training, layout=layout)

    stats = kernels.batch_norm(x, mean.copy(), var.copy(), weight, bias, training, layout=layout, return_stats=True)[1:]
    grads = kernels.batch_norm_backward(cotangent, x, *stats, weight, training=training, layout=layout)
    assert_gradient(grads[0], numerical_gradient(lambda x: forward(x, weight, bias), x, cotangent))
    assert_gradient(grads[1], numerical_gradient(lambda w: forward(x, w, bias), weight, cotangent))
    assert_gradient(grads[2], numerical_gradient(lambda b: forward(x, weight, b), bias, cotangent))


# ---------------------------------------------------------------------------------------------------------- wrong calls

X, ONES = np.zeros((2, 3, 4, 4)), np.ones(3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            (X, ONES, ONES[:2]),
            {},
            ValueError,
            r"running_var must have shape \(3,\), one .* got \(2,\)",
        ),
        ((X, ONES, ONES), {"layout": "NHWC"}, ValueError, r"running_mean must have shape \(4,\)"),
        ((X, ONES, ONES), {"layout": "CHWN"}, ValueError, 'layout must be "NCHW" or "NHWC"'),
        ((X[:, :, 0, 0], ONES, ONES), {"layout": "CHWN"}, ValueError, 'layout must be "NCHW" or "NHWC"'),
        ((X[0, 0, 0], ONES, ONES), {}, ValueError, "x must have 4 dimensions"),
        ((X, None, None), {}, ValueError, "running_mean and running_var are required in evaluation"),
        ((X, ONES, None), {"training": True}, ValueError, "must both be arrays or both None"),
        ((X[:1, :, :1, :1], ONES, ONES), {"training": True}, ValueError, "more than 1 value per channel is needed"),
        ((X[:1, :, 0, 0], ONES, ONES), {"training": True}, ValueError, "more than 1 value per channel is needed"),
        ((X, ONES, ONES), {"eps": 0.0, "training": True}, ValueError, "eps must be positive and finite, got 0.0"),
        ((X, ONES, ONES), {"eps": -1e-5}, ValueError, "eps must be at least 0 and finite"),
        ((X, ONES, ONES), {"momentum": None}, TypeError, "momentum must be a number, got None"),
        ((X, ONES, ONES), {"activation": "gelu"}, ValueError, "activation must be one of None, 'relu'"),
        ((X, ONES.astype("f4"), ONES), {}, TypeError, "running_mean is float32 but x is float64"),
        ((X.astype("f2"), ONES, ONES), {}, TypeError, "running_mean is float64 but x is float16"),
        ((X.tolist(), ONES, ONES), {}, TypeError, "x must be a NumPy array or a CPU torch tensor, got list"),
        ((None, ONES, ONES), {}, TypeError, "x must be an array, got None"),
    ],
)
def test_wrong_calls(backend, arguments, options, error, message):
    with pytest.raises(error, match=message):
        kernels.batch_norm(*arguments, **options)


def test_wrong_backward_calls(backend):
    with pytest.raises(ValueError, match=r"grad must have x's shape \(2, 3, 4, 4\), got \(2, 3, 4, 2\)"):
        kernels.batch_norm_backward(X[..., :2], X, ONES, ONES)
    with pytest.raises(ValueError, match=r"invstd must have shape \(3,\)"):
        kernels.batch_norm_backward(X, X, ONES, ONES[:1])
    with pytest.raises(TypeError, match="mean must be an array, got None"):
        kernels.batch_norm_backward(X, X, None, ONES)
    with pytest.raises(ValueError, match="grad must have x's shape"):
        kernels.batch_norm_backward(X, X[:, :, 0, 0], ONES, ONES)


def test_read_only_statistics_raise_in_training_at_every_call(backend):
    free, frozen = np.zeros(3), np.zeros(3)
    frozen.flags.writeable = False
    for _ in range(2):  # the second call finds the plan of the first
        kernels.batch_norm(X + ONES[0], free, np.ones(3), training=True)
        with pytest.raises(ValueError, match="running_mean is read-only, but training updates it in place"):
            kernels.batch_norm(X, frozen, np.ones(3), training=True)
    assert frozen.tolist() == [0, 0, 0]


def test_both_backends_have_the_same_signatures():
    from tilewise.kernels.cpu import batchnorm as cpu
    from tilewise.kernels.reference import batchnorm as reference

    for name in ("batch_norm", "batch_norm_backward"):
        assert inspect.signature(getattr(cpu, name)) == inspect.signature(getattr(reference, name))
