"""Convolution on tensor cores, executed on the CPU: float16, and float32 under tf32, against the reference."""

import numpy as np
import pytest
from conv_cases import LAYOUTS, Case, check, reference

import tilewise
from tilewise import kernels
from tilewise.kernels.cuda import conv_tensor, conv_tensor_weight
from tilewise.kernels.cuda.tensor_product import LARGE, NARROW, SMALL

DTYPES = [np.float16, np.float32]
# around the tiles (64 or 128 pixels, 64 or 128 outputs), a vector's 8 or 4 channels, and a step's 32 or 16
CASES = [
    Case(2, 16, 8, 8, 65, (1, 1)),
    Case(1, 7, 5, 13, 33, (3, 3), 1, 1),
    Case(3, 2, 7, 6, 9, (3, 2), (2, 1), ((1, 0), (0, 1)), (1, 2)),
    Case(1, 12, 9, 15, 24, (3, 3), 1, 2, 2, 2),
    Case(2, 16, 17, 17, 8, (3, 3), 1, 1),  # two parts of the weight gradient's pixels
]
# 65 and 160 pixels, 63 and 130 outputs: beside and beyond a tile's 64 or 128
EDGES = [Case(1, 40, 9, 25, 63, (3, 3), 2, 1), Case(1, 12, 13, 10, 130, (2, 3), 1, ((0, 2), (3, 1)))]
ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", "sigmoid", "tanh")


def rounded(array):
    """To TF32's 10 bits, as the kernels do; float16 as it is."""
    if array is None or array.dtype != np.float32:
        return array
    return ((array.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def operands(rng, case, dtype, layout):
    """x, weight, bias, and something of the result's shape."""
    x, weight, bias = case.arrays(rng, np.float32, layout)
    weight /= case.taps**0.5
    with tilewise.using(backend="reference"):
        shape = kernels.conv2d(x, weight, **case.options, layout=layout).shape
    return tuple(a.astype(dtype) for a in (x, weight, bias, rng.standard_normal(shape)))


def forward(rng, case, dtype, layout, number=0):
    x, weight, bias, add = operands(rng, case, dtype, layout)
    bias, add = None if number % 3 == 1 else bias, None if number % 3 == 2 else add
    options = case.options | {"layout": layout, "activation": ACTIVATIONS[number % len(ACTIVATIONS)]}
    with tilewise.using(tf32=True):
        y = kernels.conv2d(x, weight, bias, add=add, algorithm="gemm", **options)
    added = {} if add is None else {"add": add.astype(np.float64)}
    expected = reference(kernels.conv2d, rounded(x), rounded(weight), bias, **options, **added)
    check(y, expected, case.taps, (case, layout, options), dtype)


def backward(rng, case, dtype, layout):
    x, weight, _, grad = operands(rng, case, dtype, layout)
    options = case.options | {"layout": layout}
    with tilewise.using(tf32=True):
        got = kernels.conv2d_backward(grad, x, weight, **options, needs=("x", "weight"))
    expected = reference(kernels.conv2d_backward, rounded(grad), rounded(x), rounded(weight), **options)
    lengths = case.o // case.groups * case.kernel[0] * case.kernel[1], grad.size // case.o
    for name, mine, right, length in zip(("x", "weight"), got[:2], expected[:2], lengths, strict=True):
        check(mine, right, length, (name, case, layout), dtype)


def launched_tensor_kernels(gpu) -> set[str]:
    return {name for name, _ in gpu.launched if " tensor " in name}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_and_backward(gpu, rng, monkeypatch, layout, dtype):
    gpu.launched -= {(name, dtype_) for name, dtype_ in gpu.launched if " tensor " in name}
    for number, case in enumerate(CASES):
        gpu.eager_copies = number % 2 == 0
        forward(rng, case, dtype, layout, number)
        backward(rng, case, dtype, layout)
    assert any("convolution" in name for name in launched_tensor_kernels(gpu))
    assert any("weight gradient" in name for name in launched_tensor_kernels(gpu))


@pytest.mark.parametrize("tile", [t[w] for t in (LARGE, NARROW, SMALL) for w in (8, 4)], ids=lambda tile: tile.name)
def test_every_tile_in_both_layouts(gpu, rng, monkeypatch, tile):
    dtype = np.dtype(tile.dtype)
    monkeypatch.setattr(conv_tensor, "choose_tile", lambda *arguments: tile)
    taken = []
    for module, make in ((conv_tensor, "convolutions"), (conv_tensor_weight, "weight_gradients")):
        made = getattr(module, make)
        if tile in made:
            monkeypatch.setitem(made, tile, _Counting(made[tile], taken))
    for layout in LAYOUTS:
        for number, case in enumerate(EDGES):
            forward(rng, case, dtype, layout, number)
    assert len(taken) == 4


class _Counting:
    """A kernel with a record of its launches."""

    def __init__(self, kernel, taken):
        self.kernel, self.taken = kernel, taken

    def __call__(self, *arguments, **options):
        self.taken.append(self.kernel.name)
        self.kernel(*arguments, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_gradient_in_both_tiles(gpu, rng, layout):
    for dtype in DTYPES:
        for case in (Case(2, 24, 6, 7, 72, (3, 3), 1, 1), Case(1, 8, 5, 9, 64, (1, 1))):
            backward(rng, case, dtype, layout)


def test_float32_stays_float32_without_leave(gpu, rng):
    case = Case(1, 16, 6, 7, 24, (3, 3), 1, 1)
    x, weight, bias, _ = operands(rng, case, np.float32, "NHWC")
    y = kernels.conv2d(x, weight, bias, padding=1, layout="NHWC", algorithm="gemm")
    expected = reference(kernels.conv2d, x, weight, bias, padding=1, layout="NHWC")
    check(y, expected, case.taps, "float32", np.float32)
    with tilewise.using(tf32=True):
        quick = kernels.conv2d(x, weight, bias, padding=1, layout="NHWC")
    assert np.abs(quick - expected).max() > 1e-5, "it did not round: this was not TF32"
    assert np.abs(quick - expected).max() < 1e-2


def test_before_tensor_cores_float16_takes_the_plain_kernel(gpu, rng, monkeypatch):
    monkeypatch.setattr(gpu, "capability", (7, 5))
    case = Case(1, 16, 6, 7, 24, (3, 3), 1, 1)
    for layout in LAYOUTS:
        forward(rng, case, np.float16, layout)
        backward(rng, case, np.float16, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_channels_than_the_grid_that_turns_them(gpu, rng, planned_anew, layout):
    planned_anew(conv_tensor, "MOST_CHANNELS", 31)
    gpu.launched -= {(name, dtype) for name, dtype in gpu.launched if " tensor " in name or "turn" in name}
    for case in (Case(1, 24, 4, 5, 8, (3, 3), 1, 1, 1, 2), Case(1, 8, 4, 5, 34, (3, 3), 1, 1, 1, 2)):
        forward(rng, case, np.float16, layout)
        backward(rng, case, np.float16, layout)
    assert not any(" tensor " in name or "turn" in name for name, _ in gpu.launched)
    planned_anew(conv_tensor, "MOST_CHANNELS", 32)
    forward(rng, Case(1, 24, 4, 5, 8, (3, 3), 1, 1, 1, 2), np.float16, layout)
    assert launched_tensor_kernels(gpu)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_stay_in_their_windows(gpu, rng, value):
    case = Case(1, 8, 9, 10, 8, (3, 3), 1, 1)
    x, weight, bias, _ = operands(rng, case, np.float16, "NHWC")
    x.flat[137], x.flat[401] = value, -value
    y = kernels.conv2d(x, weight, bias, padding=1, layout="NHWC")
    expected = reference(kernels.conv2d, x, weight, bias, padding=1, layout="NHWC")
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    np.testing.assert_array_equal(np.isinf(y), np.isinf(expected))


def test_choice_of_the_tile():
    from tilewise.kernels.conv_geometry import forward as correlation

    window = {"stride": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1), "groups": 1, "layout": "NHWC"}

    def chosen(pixels, outputs):
        it = correlation((1, pixels, 1, 64), (outputs, 64, 1, 1), (pixels, 1), **window)
        return conv_tensor.choose_tile(it, 8, 132)

    assert chosen(100_000, 256) is LARGE[8]
    assert chosen(100_000, 64) is NARROW[8]
    assert chosen(1_568, 512) is SMALL[8]
    assert chosen(100_000, 8) is SMALL[8]
