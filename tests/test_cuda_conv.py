"""Convolution of the GPU backends, executed on the CPU, against the reference in float64."""

import re

import numpy as np
import pytest
from conv_cases import DEPTHWISE, LAYOUTS, OPTIONS, SMALL, Case, check, reference

import tilewise
from tilewise import kernels
from tilewise.kernels import conv_geometry, conv_plan

GPU_BACKENDS = ("cuda", "cupy")
DTYPES = [np.float16, np.float32, np.float64]
# what the CPU's tests have, without the large ones: each thread is executed
CASES = {"options": OPTIONS, "depthwise": DEPTHWISE, "small": SMALL}
# every kernel for depthwise convolution; 8 channels, so that float16 has 16 bytes
ALL_DEPTHWISE = [
    Case(1, 8, 7, 9, 8, (k, k), stride, k // 2, 1, 8) for k, stride in ((3, 1), (3, 2), (5, 1), (5, 2), (7, 1))
]
ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", "sigmoid", "tanh")


def operands(rng, case, dtype, layout):
    """x, weight, bias, add: the weights small enough for float16 and for tanh."""
    x, weight, bias = case.arrays(rng, np.float32, layout)
    weight /= max(case.taps, 1) ** 0.5
    with tilewise.using(backend="reference"):
        shape = kernels.conv2d(x, weight, **case.options, layout=layout).shape
    add = rng.standard_normal(shape)
    return tuple(a.astype(dtype) for a in (x, weight, bias, add))


def forward(rng, case, dtype, layout, number=0, algorithm="auto", growth=1.0):
    x, weight, bias, add = operands(rng, case, dtype, layout)
    options = case.options | {"layout": layout, "activation": ACTIVATIONS[number % len(ACTIVATIONS)]}
    bias, add = None if number % 3 == 1 else bias, None if number % 3 == 2 else add
    y = kernels.conv2d(x, weight, bias, add=add, algorithm=algorithm, **options)
    added = {} if add is None else {"add": add.astype(np.float64)}
    expected = reference(kernels.conv2d, x, weight, bias, **options, **added)
    check(y, expected, case.taps, (case, layout, options), dtype, growth)


def backward(rng, case, dtype, layout, growth=1.0):
    x, weight, _, grad = operands(rng, case, dtype, layout)
    options = case.options | {"layout": layout}
    got = kernels.conv2d_backward(grad, x, weight, **options)
    expected = reference(kernels.conv2d_backward, grad, x, weight, **options)
    pixels = grad.size // case.o
    lengths = case.o // case.groups * case.kernel[0] * case.kernel[1], pixels, pixels
    for name, mine, right, length in zip(("x", "weight", "bias"), got, expected, lengths, strict=True):
        check(mine, right, length, (name, case, layout), dtype, growth)


def chosen(name, dtype):
    """All cases in float32, every third in the other dtypes, which differ in little."""
    return CASES[name][:: 1 if dtype == np.float32 else 3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_depthwise_kernel(gpu, rng, layout, dtype):
    for number, case in enumerate(ALL_DEPTHWISE):
        forward(rng, case, dtype, layout, number, "auto")
        backward(rng, case, dtype, layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_forward(gpu, rng, name, layout, dtype):
    for number, case in enumerate(chosen(name, dtype)):
        forward(rng, case, dtype, layout, number)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_the_definition(gpu, rng, name, layout, dtype):
    for number, case in enumerate(CASES[name][::4]):
        forward(rng, case, dtype, layout, number, "direct")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_backward(gpu, rng, name, layout, dtype):
    for case in chosen(name, dtype):
        backward(rng, case, dtype, layout)


# around the tiles of the implicit product: 32 x 128, 64 x 64 and 128 x 128 outputs x pixels, 8 rows of the sum
TILES = [
    Case(1, 7, 1, 63, 31, (1, 1)),
    Case(2, 8, 8, 8, 32, (1, 1)),
    Case(1, 9, 5, 13, 33, (1, 1)),
    Case(1, 16, 13, 10, 63, (3, 3), 2, 1),
    Case(1, 5, 11, 12, 65, (3, 2), 1, ((1, 0), (0, 1)), 1),
    Case(2, 8, 9, 15, 129, (3, 3), (1, 2), 1),
    Case(2, 16, 7, 9, 70, (3, 3), 1, 2, 2, 2),
    Case(2, 8, 17, 17, 66, (3, 3), 1, 1),  # two parts of the weight gradient's pixels
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_of_the_implicit_product(gpu, rng, monkeypatch, layout, dtype):
    monkeypatch.setattr(gpu, "capability", (7, 5))  # later, float16 has tensor cores: test_cuda_conv_tensor.py
    for number, case in enumerate(TILES):
        forward(rng, case, dtype, layout, number, "gemm")
        backward(rng, case, dtype, layout)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_tiles(gpu, rng, monkeypatch, layout, dtype):
    # where there are no tensor cores for it; float16 of CUDA C++ has them everywhere
    monkeypatch.setattr(gpu, "capability", (7, 5) if gpu.backend == "cuda" else (8, 6))
    monkeypatch.setattr(conv_plan, "ENOUGH_TILES", 1)
    gpu.launched.clear()
    for number, case in enumerate(TILES[-4:]):
        forward(rng, case, dtype, layout, number, "gemm")
    large = any(re.search("128x128|Big", name) for name, _ in gpu.launched)
    assert large == (gpu.backend == "cuda" or dtype == np.float32)


TRANSPOSED = [
    (Case(2, 5, 4, 5, 6, (3, 3), 2, 1), 1),
    (Case(1, 4, 5, 4, 6, (4, 4), 2, 1), 0),
    (Case(1, 8, 6, 5, 8, (3, 3), 1, 1, 1, 4), 0),
    (Case(2, 8, 3, 4, 8, (3, 3), 2, 0, 1, 8), 1),
    (Case(1, 3, 4, 4, 4, (2, 3), (1, 3), ((0, 1), (1, 0)), (2, 1)), (1, 2)),
    (Case(1, 2, 3, 3, 3, (2, 2), 2, 1, 3), 2),  # more pixels added than the stride
    (Case(2, 3, 3, 3, 2, (1, 1), 3, 0), 1),  # most pixels meet no tap
    (Case(0, 3, 3, 3, 2, (3, 3), 2, 1), 0),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_transposed(gpu, rng, layout, dtype):
    for case, extra in TRANSPOSED:
        x, _, bias = case.arrays(rng, dtype, layout)
        shape = (case.c, case.o // case.groups, *case.kernel)
        weight = (rng.standard_normal(shape) / case.taps**0.5).astype(dtype)
        options = case.options | {"layout": layout, "output_padding": extra}
        y = kernels.conv_transpose2d(x, weight, bias, **options)
        expected = reference(kernels.conv_transpose2d, x, weight, bias, **options)
        check(y, expected, case.taps, ("y", case, layout), dtype)
        grad = rng.standard_normal(y.shape).astype(dtype)
        got = kernels.conv_transpose2d_backward(grad, x, weight, **options)
        expected = reference(kernels.conv_transpose2d_backward, grad, x, weight, **options)
        pixels = max(y.size // case.o, 1)
        for name, mine, right in zip(("x", "weight", "bias"), got, expected, strict=True):
            check(mine, right, case.taps if name == "x" else pixels, (name, case, layout), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_needed_is_none(gpu, rng, layout):
    case = Case(1, 2, 4, 5, 3, (3, 3), 1, 1)
    x, weight, _, grad = operands(rng, case, np.float32, layout)
    for needs in (("x",), ("weight",), ("bias",), ()):
        got = kernels.conv2d_backward(grad, x, weight, **case.options, layout=layout, needs=needs)
        assert [name for name, g in zip(("x", "weight", "bias"), got, strict=True) if g is not None] == list(needs)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 8])
def test_nan_and_inf_stay_in_their_windows(gpu, rng, groups, layout, value):
    case = Case(1, 8, 9, 10, 8, (3, 3), 1, 1, 1, groups)
    x, weight, bias, _ = operands(rng, case, np.float32, layout)
    x.flat[137], x.flat[401] = value, -value
    y = kernels.conv2d(x, weight, bias, padding=1, groups=groups, layout=layout)
    expected = reference(kernels.conv2d, x, weight, bias, padding=1, groups=groups, layout=layout)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    np.testing.assert_array_equal(np.isinf(y), np.isinf(expected))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("depthwise", [False, True])
def test_padding_is_zeros_that_infinity_meets(gpu, rng, depthwise, layout):
    """0 * inf is NaN, for any kernel: in the result an infinite weight's, in its gradient an infinite cotangent's."""
    for channels in (1, 2, 8):  # of the little ones, the weight's gradient is not a product
        case = Case(1, channels, 5, 6, channels, (3, 3), 1, 1, 1, channels if depthwise else 1)
        x, weight, _, grad = operands(rng, case, np.float32, layout)
        options = case.options | {"layout": layout}
        weight.flat[0], grad.flat[0] = np.inf, np.inf
        for algorithm in ("auto", "direct"):
            y = kernels.conv2d(x, weight, algorithm=algorithm, **options)
            np.testing.assert_array_equal(np.isnan(y), np.isnan(reference(kernels.conv2d, x, weight, **options)))
        assert np.isnan(y).sum() == 5 + 6 - 1
        needs = {"needs": ("weight",)}
        _, gradient, _ = kernels.conv2d_backward(grad, x, weight, **options, **needs)
        _, expected, _ = reference(kernels.conv2d_backward, grad, x, weight, **options, **needs)
        np.testing.assert_array_equal(np.isnan(gradient), np.isnan(expected))
        assert np.isnan(gradient).sum() == 5 * weight.shape[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prepared(gpu, rng, layout, dtype):
    case = Case(2, 6, 7, 8, 9, (3, 3), 1, 1)
    x, weight, bias, add = operands(rng, case, dtype, layout)
    prepared = kernels.prepare_conv2d(weight, bias, padding=1, layout=layout, activation="relu")
    for given in (x, x[:1]):
        expected = reference(kernels.conv2d, given, weight, bias, padding=1, layout=layout, activation="relu")
        check(prepared(given), expected, case.taps, layout, dtype)
    expected = kernels.conv2d(x, weight, bias, padding=1, layout=layout, activation="relu", add=add)
    np.testing.assert_array_equal(prepared(x, add=add), expected)


def test_choices(gpu, rng):
    x, weight = rng.standard_normal((1, 8, 9, 9)), rng.standard_normal((8, 1, 3, 3))
    assert tilewise.explain(kernels.conv2d, x, weight, groups=8).algorithm == "depthwise"
    full = rng.standard_normal((8, 8, 3, 3))
    assert tilewise.explain(kernels.conv2d, x, full).algorithm == "gemm"
    assert tilewise.explain(kernels.conv2d, x[:, :1, :3, :3], full[:, :1]).algorithm == "direct"
    with pytest.raises(ValueError, match="does not apply"):
        kernels.conv2d(x, full, algorithm="depthwise")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_output_a_group_wastes_no_tile(gpu, rng, layout):
    """A product computes 32 outputs of each group at least."""
    for kernel, stride, channels, expected in (
        ((7, 7), 1, 1, "depthwise"), ((7, 7), 2, 1, "direct"), ((9, 9), 1, 1, "direct"), ((6, 5), 1, 2, "direct")
    ):  # fmt: skip
        case = Case(1, 4 * channels, 20, 20, 4, kernel, stride, 3, 1, 4)
        x, weight, _, _ = operands(rng, case, np.float32, layout)
        decision = tilewise.explain(kernels.conv2d, x, weight, **case.options, layout=layout)
        wanted = "depthwise" if layout == "NHWC" and channels == 1 else expected
        assert decision.algorithm == wanted, (case, layout)
        assert "too thin for a tile" in decision.rejected["gemm"]


def launched(gpu) -> set[str]:
    """The kernels' names, without the arguments of their templates."""
    return {name.removeprefix("cupy conv_").partition("<")[0] for name, _ in gpu.launched}


def test_more_groups_than_a_grid_has(gpu, rng, planned_anew):
    planned_anew(conv_plan, "MOST_BLOCKS", 2)
    case = Case(1, 12, 5, 5, 12, (3, 3), padding=1, groups=3)
    assert conv_plan.DIRECT_BELOW < 2 * 25 * 12 * 4 * 9
    gpu.launched.clear()
    forward(rng, case, np.float32, "NCHW")
    backward(rng, case, np.float32, "NCHW")
    assert {"direct", "weight_sums"} <= launched(gpu)
    assert not any(re.search("implicit|product|tensor", name) for name in launched(gpu))
    x, weight = np.zeros((1, 12, 5, 5), np.float32), np.zeros((12, 4, 3, 3), np.float32)
    with pytest.raises(ValueError, match="algorithm 'gemm' does not apply: too many groups or outputs for a grid"):
        kernels.conv2d(x, weight, groups=3, algorithm="gemm")


def test_more_rows_than_32_bits_count(gpu, rng, planned_anew):
    """The product of CUDA C++ counts rows and columns in 32 bits; where they do not do, `explain` says so."""
    planned_anew(conv_geometry, "_NARROW_BELOW", 8)
    case = Case(1, 8, 9, 9, 40, (3, 3), padding=1)
    x, weight, _, _ = operands(rng, case, np.float32, "NCHW")
    decision = tilewise.explain(kernels.conv2d, x, weight, padding=1)
    assert decision.algorithm == ("direct" if gpu.backend == "cupy" else "gemm")
    gpu.launched.clear()
    forward(rng, case, np.float32, "NCHW")
    backward(rng, case, np.float32, "NCHW")
    if gpu.backend == "cupy":
        assert {"direct", "weight_sums"} <= launched(gpu)
        assert not any(re.search("product|tensor", name) for name in launched(gpu))
        assert "32 bits" in decision.rejected["gemm"]
        with pytest.raises(ValueError, match=r"algorithm 'gemm' does not apply: .* count in 32 bits"):
            kernels.conv2d(x, weight, padding=1, algorithm="gemm")


def test_one_output_more_than_the_tiles_of_a_grid(gpu, rng, planned_anew):
    planned_anew(conv_plan, "MOST_BLOCKS", 2)
    case = Case(1, 8, 5, 5, 65, (3, 3), padding=1)  # three tiles of 32 outputs
    forward(rng, case, np.float64, "NCHW")
    assert "direct" in launched(gpu)
    x, weight = np.zeros((1, 8, 5, 5)), np.zeros((65, 8, 3, 3))
    with pytest.raises(ValueError, match="algorithm 'gemm' does not apply: too many groups or outputs for a grid"):
        kernels.conv2d(x, weight, padding=1, algorithm="gemm")
    y = kernels.conv2d(x, weight[:64], padding=1, algorithm="gemm")
    assert y.shape == (1, 64, 5, 5)
