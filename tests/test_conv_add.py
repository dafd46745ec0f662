"""conv2d's `add`: a summand before the activation, in one pass, by every algorithm; also where it is the result."""

import numpy as np
import pytest
from conv_cases import DEPTHWISE, EDGES, FLOATS, LAYOUTS, Case, check, laid, nchw, reference

import tilewise
from tilewise import kernels

ACTIVATIONS = (None, "relu", "tanh")
WINOGRAD_GROWTH = 16.0
# every third case around each edge, and those that take a path of their own: by way of NHWC, few and many tiles
CASES = [case for cases in EDGES.values() for case in cases[::3]] + [
    Case(3, 140, 7, 7, 70, (3, 3), 1, 1),
    Case(1, 64, 9, 9, 64, (3, 3), 1, 1),
    Case(2, 130, 14, 15, 40, (3, 3), 1, 1, 1, 2),
    Case(2, 256, 6, 7, 64, (1, 1)),
    Case(1, 12, 33, 40, 50, (1, 1)),
]


def operands(rng, case, dtype, layout):
    x, weight, bias = case.arrays(rng, dtype, layout)
    weight /= max(weight[0].size, 1) ** 0.5  # or tanh would be 1 everywhere
    with tilewise.using(backend="reference"):
        shape = kernels.conv2d(x, weight, **case.options, layout=layout).shape
    return x, weight, bias, rng.standard_normal(shape).astype(dtype)


def allowed(case, x, weight, layout, algorithm):
    with tilewise.using(backend="cpu"):
        try:
            tilewise.explain(kernels.conv2d, x, weight, **case.options, layout=layout, algorithm=algorithm)
        except ValueError:
            return False
    return True


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_adds_before_the_activation(rng, layout, activation):
    f = {None: lambda v: v, "relu": lambda v: np.maximum(v, 0), "tanh": np.tanh}[activation]
    x, weight, bias, add = operands(rng, Case(2, 3, 6, 7, 4, (3, 3), 1, 1), np.float64, layout)
    with tilewise.using(backend="reference"):
        plain = kernels.conv2d(x, weight, bias, padding=1, layout=layout)
        y = kernels.conv2d(x, weight, bias, padding=1, layout=layout, activation=activation, add=add)
    np.testing.assert_allclose(y, f(plain + add), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("algorithm", ["gemm", "direct", "depthwise", "winograd"])
def test_every_algorithm_adds(rng, algorithm, layout, dtype):
    taken = 0
    for i, case in enumerate(CASES if algorithm != "depthwise" else DEPTHWISE):
        x, weight, bias, add = operands(rng, case, dtype, layout)
        if not allowed(case, x, weight, layout, algorithm):
            continue
        taken += 1
        options = case.options | {"layout": layout, "activation": ACTIVATIONS[i % 3]}
        expected = reference(
            lambda x, w, b, a, **o: kernels.conv2d(x, w, b, add=a, **o), x, weight, bias, add, **options
        )
        growth = WINOGRAD_GROWTH if algorithm == "winograd" else 1.0
        with tilewise.using(backend="cpu"):
            call = {"add": add, "algorithm": algorithm} | options
            y = kernels.conv2d(x, weight, bias, **call)
            check(y, expected, case.taps + 2, (case, layout, algorithm), dtype, growth)
            target = add.copy()
            assert kernels.conv2d(x, weight, bias, **call | {"add": target}, out=target) is target
            np.testing.assert_array_equal(target, y, err_msg=f"{case} {layout}: in place")
            bare = kernels.conv2d(x, weight, **call)
            no_bias = kernels.conv2d(x, weight, np.zeros_like(bias), **call)
            np.testing.assert_array_equal(bare, no_bias, err_msg=f"{case} {layout}: without a bias")
    assert taken >= 5 or (algorithm == "winograd" and dtype == np.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_unbatched_and_in_place(backend, rng, layout):
    case = Case(2, 4, 7, 9, 6, (3, 3), 1, 1)
    x, weight, bias, add = operands(rng, case, np.float32, layout)
    options = case.options | {"layout": layout, "activation": "relu"}
    y = kernels.conv2d(x, weight, bias, **options, add=add)
    turned = np.asfortranarray(add)
    np.testing.assert_array_equal(kernels.conv2d(x, weight, bias, **options, add=turned), y)
    frozen = add.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(kernels.conv2d(x, weight, bias, **options, add=frozen), y)
    wider = np.full((*add.shape[:-1], add.shape[-1] + 2), np.nan, add.dtype)
    inside = wider[..., 1:-1]
    inside[...] = add
    assert kernels.conv2d(x, weight, bias, **options, add=inside, out=inside) is inside
    np.testing.assert_array_equal(inside, y)
    assert np.isnan(wider[..., 0]).all()
    one, target = kernels.conv2d(x[0], weight, bias, **options, add=add[0]), add[0].copy()
    np.testing.assert_allclose(one, y[0], rtol=1e-5, atol=1e-5)
    kernels.conv2d(x[0], weight, bias, **options, add=target, out=target)
    np.testing.assert_array_equal(target, one)
    same_values_elsewhere = target[:]  # another array object over the same memory
    assert kernels.conv2d(x[0], weight, bias, **options, add=target, out=same_values_elsewhere) is same_values_elsewhere


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("channels", [5, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("algorithm", ["gemm", "direct", "winograd"])
def test_what_is_not_finite(rng, algorithm, layout, channels):
    """Winograd computes tiles with a NaN or an Inf anew: from the summand, not from what is in its place already."""
    x, weight, bias, add = operands(rng, Case(2, channels, 13, 14, 36, (3, 3), 1, 1), np.float32, "NCHW")
    x[0, 2, 5, 6], x[1, 4, 12, 13] = np.inf, np.nan
    add[0, 3, 0, 0], add[1, 1, 5, 5] = np.nan, -np.inf
    expected = reference(lambda x, w, b, a: kernels.conv2d(x, w, b, padding=1, add=a), x, weight, bias, add)
    target = laid(add, layout)
    options = {"padding": 1, "layout": layout, "algorithm": algorithm}
    with tilewise.using(backend="cpu"):
        y = kernels.conv2d(laid(x, layout), weight, bias, **options, add=target)
        kernels.conv2d(laid(x, layout), weight, bias, **options, add=target, out=target)
    np.testing.assert_array_equal(target, y)
    y = nchw(y, layout)
    finite = np.isfinite(expected)
    assert finite.sum() == expected.size - 36 * (9 + 4) - 2
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    np.testing.assert_array_equal(y[~finite], expected[~finite].astype(np.float32))
    assert np.abs(y[finite] - expected[finite]).max() <= 1e-4 * np.abs(expected[finite]).max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_number_of_threads_gives_the_same_bits(rng, split_everything, layout):
    for case in (
        Case(1, 64, 28, 28, 64, (3, 3), 1, 1),
        Case(2, 48, 14, 14, 40, (1, 1)),
        Case(3, 9, 15, 17, 9, groups=9),
    ):
        x, weight, bias, add = operands(rng, case, np.float32, layout)
        for algorithm in ("auto", "direct", "gemm"):
            results = []
            for threads in (1, 2, 3):
                with tilewise.using(backend="cpu", threads=threads):
                    options = case.options | {"layout": layout, "algorithm": algorithm, "activation": "relu"}
                    results.append(kernels.conv2d(x, weight, bias, **options, add=add).tobytes())
            assert results[0] == results[1] == results[2]


def test_tensors(torch, backend):
    x, weight, add = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(2, 4, 6, 6)
    expected = torch.nn.functional.conv2d(x, weight) + add
    y = kernels.conv2d(x, weight, add=add)
    torch.testing.assert_close(y, expected)
    assert kernels.conv2d(x, weight, add=add, out=add) is add
    torch.testing.assert_close(add, expected)


x, w, y = np.ones((2, 3, 8, 8)), np.ones((4, 3, 3, 3)), np.ones((2, 4, 6, 6))
WRONG = [
    (
        lambda: kernels.conv2d(x, w, add=y[:1]),
        ValueError,
        r"conv2d: add must have the result's shape \(2, 4, 6, 6\), got",
    ),
    (
        lambda: kernels.conv2d(x, w, add=y[0]),
        ValueError,
        r"add must have the result's shape \(2, 4, 6, 6\), got \(4, 6",
    ),
    (lambda: kernels.conv2d(x[0], w, add=y[:1]), ValueError, r"the result's shape \(4, 6, 6\), got \(1, 4, 6, 6\)"),
    (lambda: kernels.conv2d(x, w, add=y.astype("f4")), TypeError, "conv2d: add is float32 but x is float64"),
    (lambda: kernels.conv2d(x, w, add=1.0), TypeError, "conv2d: add must be a NumPy array or a CPU torch tensor"),
    (lambda: kernels.conv2d(x, w, add=y, out=y.transpose(0, 1, 3, 2)), ValueError, "out overlaps add without being"),
    (lambda: kernels.conv2d(np.ones((2, 4, 8, 8)), np.ones((4, 4, 1, 1)), add=x), ValueError, "the result's shape"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_wrong_calls(call, error, message):
    with tilewise.using(backend="reference"), pytest.raises(error, match=message):
        call()


def test_out_may_not_overlap_the_other_operands():
    image, pointwise = np.ones((2, 4, 6, 6)), np.ones((4, 4, 1, 1))
    with pytest.raises(ValueError, match="conv2d: out overlaps x"):
        kernels.conv2d(image, pointwise, add=image, out=image)


def test_explain_counts_its_bytes():
    without, with_add = (tilewise.explain(kernels.conv2d, x, w, **o) for o in ({}, {"add": y}))
    assert with_add.bytes - without.bytes == y.nbytes
