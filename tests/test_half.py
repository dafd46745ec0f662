"""float16: every function against the float64 reference on the same float16 operands, with one rounding to float16."""

import os
import subprocess
import sys

import numpy as np
import pytest

import tilewise
from tilewise.kernels.cpu import half, half_convert, half_parts

HALF = np.dtype(np.float16)
EPS = float(np.finfo(HALF).eps)
LAYOUTS = ("NCHW", "NHWC")


def halves(rng, *shape):
    return rng.standard_normal(shape).astype(HALF)


def image(rng, layout, n=2, c=5, h=9, w=9):
    return halves(rng, n, c, h, w) if layout == "NCHW" else halves(rng, n, h, w, c)


def copies(args, dtype=None):
    return [a.astype(dtype or a.dtype) if isinstance(a, np.ndarray) and a.dtype == HALF else a for a in args]


def tupled(results):
    return results if isinstance(results, tuple) else (results,)


def check(function, *args, backend="cpu", **options):
    """Half a unit in the last place of each result, and of the largest result a float32's error."""
    ours, exact = copies(args), copies(args, np.float64)
    with tilewise.using(backend="reference"):
        expected = tupled(function(*exact, **options))
    with tilewise.using(backend=backend):
        actual = tupled(function(*ours, **options))
    # operands that are updated in place are results too
    for a, b in [*zip(actual, expected, strict=True), *zip(ours, exact, strict=True)]:
        if not isinstance(b, np.ndarray) or b.dtype != np.float64:
            np.testing.assert_array_equal(a, b)
            continue
        assert a.dtype == HALF
        assert a.shape == b.shape
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        finite = np.isfinite(b) & np.isfinite(a)
        np.testing.assert_array_equal(a[~finite & ~np.isnan(b)], b.astype(HALF)[~finite & ~np.isnan(b)])
        if finite.any():
            bound = 0.51 * EPS * np.abs(b[finite]) + 1e-4 * np.abs(b[finite]).max() + 2.0**-24
            assert (np.abs(a[finite] - b[finite]) <= bound).all(), (function.__name__, options)
    return actual


def pools(rng, layout, **size):
    t, at = tilewise, {"layout": layout}
    x = image(rng, layout, **size)
    y, indices = t.max_pool2d(x, 3, 2, 1, return_indices=True, **at)
    grad = halves(rng, *y.shape)
    plane = x.shape[2:] if layout == "NCHW" else x.shape[1:3]
    bins, of_bins = t.adaptive_max_pool2d(x, (3, 2), True, **at)
    return [
        (t.max_pool2d, (x, 3, 2, 1), at),
        (t.max_pool2d, (x, 3, 2, 1), at | {"return_indices": True}),
        (t.max_pool2d_backward, (grad, indices, x.shape, 3, 2, 1), at),
        (t.max_unpool2d, (y, indices, 3, 2, 1), at | {"output_size": plane}),
        (t.max_unpool2d_backward, (x, indices), at),
        (t.avg_pool2d, (x, 3, 2, 1), at),
        (t.avg_pool2d_backward, (grad, x.shape, 3, 2, 1), at),
        (t.adaptive_avg_pool2d, (x, (3, 2)), at),
        (t.adaptive_avg_pool2d_backward, (halves(rng, *bins.shape), x.shape), at),
        (t.adaptive_max_pool2d, (x, (3, 2), True), at),
        (t.adaptive_max_pool2d_backward, (halves(rng, *bins.shape), of_bins, x.shape), at),
    ]


def batch_norms(rng, layout, **size):
    x = image(rng, layout, **size)
    c = x.shape[1 if layout == "NCHW" else 3]
    mean, var = halves(rng, c), np.abs(halves(rng, c)) + HALF.type(0.5)
    for training in (True, False):
        at = {"training": training, "layout": layout}
        yield tilewise.batch_norm, (x, mean, var, halves(rng, c), halves(rng, c)), at | {"activation": "relu"}
        yield tilewise.batch_norm, (x, mean, var, halves(rng, c), halves(rng, c)), at | {"activation": "tanh"}
        yield tilewise.batch_norm, (x, mean, var), at | {"return_stats": True}
        yield tilewise.batch_norm_backward, (image(rng, layout, **size), x, mean, var, halves(rng, c)), at


def added(x, weight, bias, add, **options):
    return tilewise.conv2d(x, weight, bias, add=add, **options)


def prepared(x, weight, bias, add, **options):
    return tilewise.prepare_conv2d(weight, bias, **options)(x, add=add)


def convolutions(rng, layout):
    t, x, at = tilewise, image(rng, layout), {"layout": layout, "padding": 1}
    w, v = halves(rng, 8, 5, 3, 3), halves(rng, 5, 8, 3, 3)
    grad = image(rng, layout, c=8)
    yield t.conv2d, (x, w, halves(rng, 8)), at | {"activation": "tanh"}
    yield t.conv2d, (x, w), at | {"algorithm": "winograd"}
    summand = image(rng, layout, c=8, h=5, w=5)
    for function in (added, prepared):
        yield function, (x, w, halves(rng, 8), summand), at | {"activation": "relu", "stride": 2}
    yield t.conv2d_backward, (grad, x, w), at
    yield t.conv_transpose2d, (x, v, halves(rng, 8)), at
    yield t.conv_transpose2d_backward, (grad, x, v), at | {"needs": ("x", "bias")}


def elementwise(rng, *shape):
    x = halves(rng, *shape)
    for name in ("relu", "leaky_relu", "sigmoid", "tanh", "step", "sign", "softmax", "log_softmax"):
        function = getattr(tilewise, name)
        yield function, (x,), {}
        if name not in ("step", "sign"):
            yield getattr(tilewise, f"{name}_backward"), (halves(rng, *shape), function(x)), {}
    yield tilewise.softmax, (x,), {"axis": 0}


def paddings(rng, *shape):
    x = halves(rng, *shape)
    padded = (*shape[:-2], shape[-2] + 3, shape[-1] + 5)
    for mode in ("constant", "reflect"):
        yield tilewise.pad, (x, ((1, 2), (3, 2)), mode), {}
        yield tilewise.pad_backward, (halves(rng, *padded), shape, ((1, 2), (3, 2)), mode), {}


def products(rng):
    t, a, b, w = tilewise, halves(rng, 37, 50), halves(rng, 50, 41), halves(rng, 41, 50)
    yield t.matmul, (a, b), {}
    yield t.matmul, (a, w.T), {}
    yield t.matmul, (a[::2, 1::2], halves(rng, 50, 25).T), {}
    yield t.matmul, (halves(rng, 50), halves(rng, 50)), {}
    yield t.matmul_backward, (halves(rng, 37, 41), a, b), {}
    yield t.linear, (a, w, halves(rng, 41)), {"activation": "sigmoid"}
    yield t.linear_backward, (halves(rng, 37, 41), a, w), {}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", [pools, batch_norms, convolutions])
def test_images(rng, backend, layout, family):
    for function, args, options in family(rng, layout):
        check(function, *args, backend=backend, **options)


@pytest.mark.parametrize("cases", [lambda r: elementwise(r, 4, 33), lambda r: paddings(r, 2, 3, 5, 7), products])
def test_other_functions(rng, backend, cases):
    for function, args, options in cases(rng):
        check(function, *args, backend=backend, **options)


@pytest.fixture
def small_parts(planned_anew):
    """Parts of a few hundred elements, so that small operands are cut, the last part being another size."""
    planned_anew(half, "PART", 300)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_of_images(rng, small_parts, layout):
    for family in (pools, batch_norms):
        for function, args, options in family(rng, layout, n=3, c=5, h=13, w=11):
            check(function, *args, **options)


def test_parts_of_other_operands(rng, small_parts):
    for cases in (elementwise(rng, 7, 11, 13), paddings(rng, 7, 3, 5, 7), paddings(rng, 1, 3, 37, 41)):
        for function, args, options in cases:
            check(function, *args, **options)


@pytest.mark.parametrize("rows", [1, 2, 9, 64])
def test_parts_of_a_weight(rng, small_parts, rows):
    x, weight, bias = halves(rng, rows, 50), halves(rng, 131, 50), halves(rng, 131)
    for operands in ((x, weight, bias), (x, weight, None), (x, np.asfortranarray(weight), bias)):
        check(tilewise.linear, *operands, activation="relu")
    out = np.empty((rows, 131), HALF)
    assert tilewise.linear(x, weight, bias, out=out) is out
    np.testing.assert_array_equal(out, tilewise.linear(x, weight, bias))
    cut = half_parts.cut("linear", [x.shape, weight.shape, bias.shape], {})
    assert cut is not None
    assert cut.part(7)[0] == [x.shape, (7, 50), (7,)]
    assert half_parts.cut("linear", [(65, 50), weight.shape, None], {}) is None


def test_parts_do_not_change_a_bit(rng, planned_anew):
    calls = [*pools(rng, "NCHW", n=3, h=13), *pools(rng, "NHWC", n=3, h=13), *elementwise(rng, 7, 11, 13)]
    whole = [tupled(function(*args, **options)) for function, args, options in calls]
    planned_anew(half, "PART", 300)
    for (function, args, options), expected in zip(calls, whole, strict=True):
        for a, b in zip(tupled(function(*args, **options)), expected, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=function.__name__)


def test_parts_are_used_where_operands_are_large(monkeypatch):
    shapes = [(8, 64, 112, 112)]
    options = {"layout": "NCHW"}
    parts = half_parts.cut("max_pool2d", shapes, options)
    assert parts.length * parts.largest() == 8 * 64 * 112 * 112
    assert half_parts.cut("conv2d", shapes, options) is None
    assert half_parts.cut("softmax", [(4, 5)], {"axis": 0}) is None


def test_threads_do_not_change_a_bit(rng, split_everything, small_parts):
    calls = [
        *pools(rng, "NCHW", n=3, h=13), *batch_norms(rng, "NCHW"), *elementwise(rng, 7, 11, 13), *products(rng)
    ]  # fmt: skip
    for function, args, options in calls:
        results = []
        for threads in (1, 2, 3):
            with tilewise.using(threads=threads):
                results.append(tupled(function(*copies(args), **options)))
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                np.testing.assert_array_equal(a, b, err_msg=function.__name__)


def test_out_strides_and_empty_batches(rng):
    a, b = halves(rng, 33, 40), halves(rng, 40, 29)
    out = np.empty((33, 29), HALF)
    assert tilewise.matmul(a, b, out=out) is out
    np.testing.assert_array_equal(out, tilewise.matmul(a, b))
    with pytest.raises(ValueError, match="out must have shape"):
        tilewise.matmul(a, b, out=out.astype(np.float32))
    wide = halves(rng, 4, 10, 18, 18)
    x = wide[::2, ::2, ::2, ::-2]
    copy = np.ascontiguousarray(x)
    for function, options in ((tilewise.max_pool2d, {"kernel_size": 2}), (tilewise.relu, {}), (tilewise.softmax, {})):
        np.testing.assert_array_equal(function(x, **options), function(copy, **options))
    x.flags.writeable = False
    np.testing.assert_array_equal(tilewise.tanh(x), tilewise.tanh(copy))
    weight = halves(rng, 3, 5, 3, 3)
    assert tilewise.conv2d(x[:0], weight).shape == (0, 3, 7, 7)
    assert tilewise.max_pool2d(copy[0], 2).shape == (5, 4, 4)
    assert tilewise.relu(x[:0]).dtype == HALF
    for training in (True, False):
        y = tilewise.batch_norm(copy[:0], np.zeros(5, HALF), np.ones(5, HALF), training=training)
        assert y.shape == (0, 5, 9, 9)


def test_strided_running_statistics_are_updated(rng):
    x, both = image(rng, "NCHW"), np.ones((5, 2), HALF)
    mean, var = np.ones(5, HALF), np.ones(5, HALF)
    tilewise.batch_norm(x, mean, var, training=True)
    tilewise.batch_norm(x, both[:, 0], both[:, 1], training=True)
    np.testing.assert_array_equal(both, np.stack([mean, var], axis=1))
    assert (mean != 1).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(rng, value):
    x = image(rng, "NCHW")
    x[1, 2, 3, 4] = value
    with np.errstate(invalid="ignore"):
        check(tilewise.max_pool2d, x, 3)
        check(tilewise.avg_pool2d, x, 3)
        check(tilewise.relu, x)
        check(tilewise.conv2d, x, halves(rng, 4, 5, 3, 3), algorithm="winograd")


def test_too_large_a_sum_is_infinite(rng, backend):
    a = np.full((8, 64), 100, HALF)
    assert np.isposinf(tilewise.matmul(a, a.T)).all()
    # but a partial sum may be: float32 holds it
    b = a * np.where(np.arange(64) < 32, 1, -1).astype(HALF)
    np.testing.assert_array_equal(tilewise.matmul(a, b.T), 0)


@pytest.fixture
def tiny_calls(monkeypatch):
    """How many plans took the short way for tiny operands."""
    from tilewise.kernels import operation

    made = []
    prepare = half._prepare_tiny
    monkeypatch.setattr(half, "_prepare_tiny", lambda *a: (made.append(1), prepare(*a))[1])
    operation.forget_plans()
    yield made
    operation.forget_plans()


@pytest.mark.parametrize("count", [half.TINY - 1, half.TINY, half.TINY + 1])
def test_tiny_operands_take_the_short_way(rng, tiny_calls, count):
    x = halves(rng, count)
    x[:4] = np.nan, np.inf, -np.inf, -0.0
    y = tilewise.relu(x)
    assert len(tiny_calls) == (count <= half.TINY)
    np.testing.assert_array_equal(y.view(np.uint16), tilewise.relu(x.astype(np.float32)).astype(HALF).view(np.uint16))
    np.testing.assert_array_equal(tilewise.relu(x[::-2]), y[::-2])
    assert (tilewise.relu(np.stack([x] * 3).T[:, 1]) == y)[1:].all()


def test_tiny_operands_of_every_kind_take_the_short_way(rng, tiny_calls):
    """Several results, results of other dtypes, absent operands, and results that are not tiny."""
    x, w, bias = halves(rng, 2, 3, 6, 6), halves(rng, 3, 3, 3, 3), halves(rng, 3)
    check(tilewise.conv2d, x, w, bias, padding=1)
    check(tilewise.conv2d, x, w, None, padding=1)
    check(tilewise.conv2d_backward, x, x, w, padding=1)
    check(tilewise.max_pool2d, x, 2, return_indices=True)
    check(tilewise.avg_pool2d, x, 2)
    check(tilewise.matmul, halves(rng, 40, 3), halves(rng, 3, 40))  # 1600 results
    check(tilewise.matmul, halves(rng, 0, 3), halves(rng, 3, 4))
    out = np.empty_like(x)
    assert tilewise.conv2d(x, w, bias, padding=1, out=out) is out
    np.testing.assert_array_equal(out, tilewise.conv2d(x, w, bias, padding=1))
    assert len(tiny_calls) == 8


def test_statistics_that_are_updated_do_not_take_the_short_way(rng, tiny_calls):
    x = halves(rng, 2, 3, 4, 4)
    mean, variance = np.zeros(3, HALF), np.ones(3, HALF)
    check(tilewise.batch_norm, x, mean, variance, training=True, activation="tanh")
    assert not tiny_calls
    check(tilewise.batch_norm, x, mean, variance, activation="tanh")
    assert len(tiny_calls) == 1


def test_explain_says_what_is_computed_in(rng):
    x, w = halves(rng, 8, 256, 14, 14), halves(rng, 256, 256, 3, 3)
    decision = tilewise.explain(tilewise.conv2d, x, w, padding=1)
    single = tilewise.explain(tilewise.conv2d, x.astype("f4"), w.astype("f4"), padding=1)
    assert decision.algorithm == single.algorithm
    assert "float16 is computed in float32" in str(decision)
    assert "float16" not in str(single)


def test_layers_in_float16(rng):
    from tilewise import nn

    x = halves(rng, 4, 3, 8, 8)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, rng=0, dtype=HALF), nn.BatchNorm2d(4, dtype=HALF), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64, 5, rng=0, dtype=HALF),
    )  # fmt: skip
    y = model(x)
    assert y.dtype == HALF
    assert model.backward(np.ones_like(y)).dtype == HALF
    assert all(p.grad.dtype == HALF for p in model.parameters())


def test_torch_tensors(torch):
    a = torch.ones(2, 3, dtype=torch.half)
    result = tilewise.matmul(a, a.T)
    assert result.dtype == torch.half
    assert (result == 3).all()


# ------------------------------------------------------------------------------------------------------- conversions


def every_pattern():
    """All of float16; and of float32 what lies on, beside and between them, and random patterns."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(invalid="ignore", over="ignore"):
        values = bits.view(HALF).astype(np.float32)
        finite = np.sort(values[np.isfinite(values)]).astype(np.float64)
        middles = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
        beside = [np.nextafter(v, np.float32(to)) for v in (middles, values) for to in (-np.inf, np.inf)]
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32).view(np.float32)
    edges = np.array([65519.996, 65520, 65536, -65520, 2**-25, -(2**-25), 2**-26, 1e-45, -0.0], np.float32)
    return bits, np.concatenate([values, middles, *beside, random, edges])


def test_conversions_are_exact():
    bits, singles = every_pattern()
    with np.errstate(invalid="ignore", over="ignore"):
        expected, rounded = bits.view(HALF).astype(np.float32), singles.astype(HALF)
    widened = np.empty(bits.size, np.float32)
    half_convert.convert(0, bits, 0, 0, widened, 0, 0, 1, bits.size)
    narrowed = np.empty(singles.size, np.uint16)
    half_convert.convert(0, singles, 0, 0, narrowed, 0, 0, 1, singles.size)
    for actual, wanted in ((widened, expected), (narrowed.view(HALF), rounded)):
        number = ~np.isnan(wanted)
        np.testing.assert_array_equal(np.isnan(actual), ~number)
        np.testing.assert_array_equal(actual[number], wanted[number])
        np.testing.assert_array_equal(np.signbit(actual[number]), np.signbit(wanted[number]))


@pytest.mark.parametrize(("rows", "length", "step", "start"), [(1, 1, 1, 0), (3, 17, 40, 5), (2, 16385, 20000, 1)])
def test_rows_are_converted_in_place(rng, rows, length, step, start):
    source = halves(rng, rows * step + start)
    index = start + step * np.arange(rows)[:, None] + np.arange(length)
    target = np.full(rows * length + 16, 7, np.float32)
    half_convert.convert(1e9, source.view(np.uint16), start, step, target, 0, length, rows, length)
    np.testing.assert_array_equal(target[: rows * length].reshape(rows, length), source[index])
    assert (target[rows * length :] == 7).all()
    back = np.full(source.size, 7, HALF)
    half_convert.convert(1e9, target, 0, length, back.view(np.uint16), start, step, rows, length)
    expected = np.full(source.size, 7, HALF)
    expected[index] = source[index]
    np.testing.assert_array_equal(back, expected)


def test_conversions_without_instructions_for_them():
    """Integer arithmetic, in a process that compiles for a processor without them: the tests above, here."""
    code = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_half
assert not test_half.half_convert.HARDWARE
test_half.test_conversions_are_exact()
"""
    environment = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
