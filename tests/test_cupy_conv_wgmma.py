"""Convolution on Hopper's tensor cores, executed on the CPU, against the reference in float64."""

import ml_dtypes
import numpy as np
import pytest
from conv_cases import LAYOUTS, Case, check, reference
from test_cuda_conv import ACTIVATIONS, operands
from test_cupy_bfloat import assert_rounded
from test_cupy_gemm import need

import tilewise
from tilewise import kernels
from tilewise.kernels.cupy import conv_wgmma
from tilewise.kernels.cupy.gemm_wgmma import NARROW, WIDE

GPU_BACKENDS = ("cupy",)
B = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float16), B]
# Tiles are 128 pixels x 128 or 256 outputs, of which more than half are filled; a step is 64 of k, of four stages.
NARROW_CASES = [
    Case(2, 16, 7, 9, 72, (3, 3), 1, 1),  # less than a tile; steps with several taps
    Case(1, 72, 9, 8, 128, (3, 3), 1, 1),  # taps of more than a step; around the stages
    Case(1, 5, 17, 19, 66, (3, 2), (2, 1), ((1, 0), (0, 1)), (1, 2)),  # no whole vectors anywhere; two tiles of pixels
    Case(3, 24, 5, 9, 144, (3, 3), 1, 2, 2, 2),  # groups; three images in two tiles
]
WIDE_CASES = [
    Case(1, 40, 8, 9, 130, (2, 3), 1, ((0, 1), (1, 1))),
    Case(3, 64, 9, 7, 264, (1, 1)),  # two tiles of both; one step; no whole vectors in a plane
]
CASES = [(case, 128) for case in NARROW_CASES] + [(case, 256) for case in WIDE_CASES]


@pytest.fixture(autouse=True)
def hopper(gpu, one_multiprocessor):
    need(gpu, conv_wgmma.CONVOLUTIONS[WIDE, True])
    gpu.launched.clear()


def kernel_name(columns, layout):
    return f"cupy conv_wgmma<T, {columns}, {str(layout == 'NHWC').lower()}>"


def assert_near(actual, expected, reduction, what):
    if actual.dtype == B:
        assert_rounded(actual, expected, reduction, reduction**0.5)
    else:
        check(actual, expected, reduction, what)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward(gpu, rng, layout):
    for number, (case, columns) in enumerate(CASES):
        dtype = DTYPES[(number + LAYOUTS.index(layout)) % 2]
        gpu.eager_copies = number % 2 == 0
        x, weight, bias, add = operands(rng, case, dtype, layout)
        bias, add = None if number % 3 == 1 else bias, None if number % 3 == 2 else add
        options = case.options | {"layout": layout, "activation": ACTIVATIONS[number % len(ACTIVATIONS)]}
        y = kernels.conv2d(x, weight, bias, add=add, **options)
        added = {} if add is None else {"add": add.astype(np.float64)}
        assert_near(y, reference(kernels.conv2d, x, weight, bias, **options, **added), case.taps, (case, options))
        assert (kernel_name(columns, layout), dtype.name) in gpu.launched
        gpu.launched.clear()


# channels are outputs here: of the phases of stride 2 some fill a tile by more than half, and some do not
BACKWARD = [
    (Case(2, 72, 7, 8, 24, (3, 3), 1, 1), 128),
    (Case(1, 80, 17, 18, 9, (3, 2), 2, 1), 128),
    (Case(1, 72, 17, 18, 16, (1, 1), 2), 128),  # three phases without a tap
    (Case(1, 272, 9, 15, 16, (3, 3), 1, 2, 2, 2), 256),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_x(gpu, rng, layout):
    for number, (case, columns) in enumerate(BACKWARD):
        dtype = DTYPES[(number + LAYOUTS.index(layout)) % 2]
        gpu.eager_copies = number % 2 == 1
        x, weight, _, grad = operands(rng, case, dtype, layout)
        options = case.options | {"layout": layout, "needs": ("x",)}
        actual, _, _ = kernels.conv2d_backward(grad, x, weight, **options)
        expected, _, _ = reference(kernels.conv2d_backward, grad, x, weight, **options)
        reduction = case.o // case.groups * case.kernel[0] * case.kernel[1]
        assert_near(actual, expected, reduction, (case, layout))
        assert (kernel_name(columns, layout), dtype.name) in gpu.launched
        gpu.launched.clear()


# outputs x (tap, channel), summed over pixels; a step is 64 of them
WEIGHTS = [
    (Case(1, 72, 9, 15, 70, (1, 1)), 128),  # outputs that are no whole vectors; part of a step
    (Case(1, 12, 17, 19, 66, (3, 2), (2, 1), ((1, 0), (0, 1)), (1, 2)), 128),  # channels that are none
    (Case(2, 8, 17, 17, 72, (3, 3), 1, 1), 128),  # two parts of the sums, around the stages
    (Case(3, 48, 5, 9, 144, (3, 3), 1, 2, 2, 2), 256),  # groups
    (Case(1, 32, 9, 9, 136, (3, 3)), 256),  # two tiles of both
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_the_weight(gpu, rng, layout):
    for number, (case, columns) in enumerate(WEIGHTS):
        dtype = DTYPES[(number + LAYOUTS.index(layout)) % 2]
        gpu.eager_copies = number % 2 == 0
        x, weight, _, grad = operands(rng, case, dtype, layout)
        options = case.options | {"layout": layout, "needs": ("weight",)}
        _, actual, _ = kernels.conv2d_backward(grad, x, weight, **options)
        _, expected, _ = reference(kernels.conv2d_backward, grad, x, weight, **options)
        assert_near(actual, expected, grad.size // case.o, (case, layout))
        assert (f"cupy conv_wgmma_weight<T, {columns}>", dtype.name) in gpu.launched
        gpu.launched.clear()


def test_infinity_in_the_last_pixel(gpu, rng):
    """Nothing that follows it in a step, where grad is 0, may meet it."""
    case = WEIGHTS[2][0]
    x, weight, _, grad = operands(rng, case, np.float16, "NHWC")
    x[-1, -1, -1, :3] = np.inf
    options = case.options | {"layout": "NHWC", "needs": ("weight",)}
    _, actual, _ = kernels.conv2d_backward(grad, x, weight, **options)
    _, expected, _ = reference(kernels.conv2d_backward, grad, x, weight, **options)
    np.testing.assert_array_equal(np.isinf(actual), np.isinf(expected))
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    assert np.isinf(expected).any()
    assert ("cupy conv_wgmma_weight<T, 128>", "float16") in gpu.launched


@pytest.mark.parametrize("schedule", ["reverse", "shuffled", "warps reversed"])
def test_every_schedule_gives_the_same_bits(gpu, rng, schedule):
    """Of sums that go around the stages."""
    case, summed = NARROW_CASES[1], WEIGHTS[2][0]
    x, weight, *_ = operands(rng, case, np.float16, "NHWC")
    image, other, _, grad = operands(rng, summed, np.float16, "NHWC")
    results = []
    for gpu.schedule in ("forward", schedule):
        y = kernels.conv2d(x, weight, **case.options, layout="NHWC")
        gradients = kernels.conv2d_backward(grad, image, other, **summed.options, layout="NHWC", needs=("weight",))
        results.append((y, gradients[1]))
    for mine, right in zip(*results, strict=True):
        np.testing.assert_array_equal(mine, right)
    assert {kernel_name(128, "NHWC"), "cupy conv_wgmma_weight<T, 128>"} <= {name for name, _ in gpu.launched}


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_inf_stay_in_their_windows(gpu, rng, layout):
    """In a row or column of zeros beyond the image, in channels beyond the last, they would spread."""
    case = NARROW_CASES[2]
    x, weight, bias, _ = operands(rng, case, np.float16, layout)
    x.flat[137], x.flat[401], weight.flat[5] = np.nan, -np.inf, np.inf
    options = case.options | {"layout": layout}
    y, expected = kernels.conv2d(x, weight, bias, **options), reference(kernels.conv2d, x, weight, bias, **options)
    assert 0 < np.isfinite(expected).sum() < expected.size
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    np.testing.assert_array_equal(np.isinf(y), np.isinf(expected))
    assert (kernel_name(128, layout), "float16") in gpu.launched


TOO_LITTLE = "too few rows or columns for its tiles, or too few tiles to occupy the device"


@pytest.mark.parametrize(
    ("capability", "dtype", "case", "taken"),
    [
        ((9, 0), "float16", WIDE_CASES[1], "wgmma, tiles of 128 x 256 pixels x outputs"),
        ((9, 0), "bfloat16", NARROW_CASES[0], "wgmma, tiles of 128 x 128 pixels x outputs"),
        ((9, 0), "float16", Case(1, 16, 7, 9, 72, (3, 3), 1, 1), f"not wgmma: {TOO_LITTLE}"),
        ((10, 0), "float16", WIDE_CASES[1], "not wgmma: needs compute capability 9.0, and no later one"),
    ],
)
def test_explain(gpu, monkeypatch, capability, dtype, case, taken):
    monkeypatch.setattr(gpu, "capability", capability)
    x, weight, _ = case.arrays(np.random.default_rng(1), dict(zip(("float16", "bfloat16"), DTYPES, strict=True))[dtype])
    decision = tilewise.explain(kernels.conv2d, x, weight, **case.options)
    assert taken in decision.note
    if taken.startswith("not"):
        assert decision.note.startswith("mma, tiles of")


def test_choice_of_the_tile(gpu, monkeypatch):
    """The largest of which more than half is filled, and which occupies the device."""
    monkeypatch.setattr(gpu, "multiprocessors", 132)

    def tile(rows, columns):
        return conv_wgmma.choose_tile(rows, columns, 1, gpu)

    assert tile(132 * 128, 256) is tile(66 * 128, 512) is tile(132 * 128, 129) is WIDE
    assert tile(131 * 128, 256) is tile(132 * 128, 128) is tile(132 * 128, 65) is NARROW
    assert tile(132 * 128, 64) == tile(65 * 128, 256) == TOO_LITTLE
    assert conv_wgmma.choose_tile(65 * 128, 256, 2, gpu) is NARROW
