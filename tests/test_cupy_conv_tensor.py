"""Convolution on tensor cores in CUDA C++, executed on the CPU, against the reference in float64."""

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import test_cuda_conv_tensor as shared
from conv_cases import LAYOUTS, Case, check, reference
from simt import emulator
from test_cupy_bfloat import assert_rounded
from test_cupy_gemm import need

import tilewise
from tilewise import kernels
from tilewise.kernels import conv_geometry
from tilewise.kernels.cupy import (
    conv,
    conv_packing,
    conv_product_weight,
    conv_sums,
    conv_tensor,
    conv_tensor_weight,
    gemm_plan,
    gemm_tile,
)
from tilewise.kernels.cupy.gemm_tensor import LARGE, MATHS, MEDIUM
from tilewise.kernels.cupy.gemm_wgmma import NARROW

GPU_BACKENDS = ("cupy",)
B = np.dtype(ml_dtypes.bfloat16)
FEW = shared.CASES[1]  # 7 channels of 8, 33 outputs
# more than half of 128 pixels and of 64 outputs: float32 goes by three products
WORK = [Case(1, 12, 9, 10, 40, (3, 3), 1, 1), Case(2, 16, 12, 13, 72, (3, 2), 2, 1)]
TILES = {
    f"{way} {tile.name} {'NHWC' if last else 'NCHW'}": (way, tile, last)
    for way in MATHS for last in (False, True)
    for tile in conv_tensor.tiles_of(way, last)
}  # fmt: skip


def names(gpu) -> set[str]:
    """What was launched of the kernels on tensor cores, and what of the product without."""
    return {
        name.removeprefix("cupy ")
        for name, _ in gpu.launched
        if any(part in name for part in ("tensor", "product", "pointwise"))
    }


def rounded_forward(rng, case, layout, number=0):
    """In bfloat16."""
    x, weight, bias, add = shared.operands(rng, case, B, layout)
    options = case.options | {"layout": layout, "activation": shared.ACTIVATIONS[number % 6]}
    y = kernels.conv2d(x, weight, bias, add=add, algorithm="gemm", **options)
    expected = reference(kernels.conv2d, x, weight, bias, add=add.astype(np.float64), **options)
    assert_rounded(y, expected, case.taps, case.taps**0.5)


def rounded_backward(rng, case, layout):
    x, weight, _, grad = shared.operands(rng, case, B, layout)
    options = case.options | {"layout": layout, "needs": ("x", "weight")}
    got = kernels.conv2d_backward(grad, x, weight, **options)
    expected = reference(kernels.conv2d_backward, grad, x, weight, **options)
    for mine, right in zip(got[:2], expected[:2], strict=True):
        assert_rounded(mine, right, grad.size // case.o, grad.size**0.5)


def whole_forward(rng, case, layout, number=0):
    """In float32 without leave to round."""
    x, weight, bias, _ = shared.operands(rng, case, np.float32, layout)
    y = kernels.conv2d(x, weight, bias, algorithm="gemm", layout=layout, **case.options)
    check(y, reference(kernels.conv2d, x, weight, bias, layout=layout, **case.options), case.taps, case, np.float32)


def whole_backward(rng, case, layout):
    x, weight, _, grad = shared.operands(rng, case, np.float32, layout)
    options = case.options | {"layout": layout, "needs": ("x", "weight")}
    got = kernels.conv2d_backward(grad, x, weight, **options)
    expected = reference(kernels.conv2d_backward, grad, x, weight, **options)
    for name, mine, right in zip("xw", got[:2], expected[:2], strict=True):
        check(mine, right, max(case.taps, grad.size // case.o), (name, case), np.float32)


FORWARD = {
    "half": lambda rng, case, layout, number=0: shared.forward(rng, case, np.float16, layout, number),
    "bfloat": rounded_forward,
    "tf32": lambda rng, case, layout, number=0: shared.forward(rng, case, np.float32, layout, number),
    "split": whole_forward,
}
BACKWARD = {
    "half": lambda rng, case, layout: shared.backward(rng, case, np.float16, layout),
    "bfloat": rounded_backward,
    "tf32": lambda rng, case, layout: shared.backward(rng, case, np.float32, layout),
    "split": whole_backward,
}


@pytest.mark.parametrize("way", ["half", "bfloat", "tf32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_and_backward(gpu, rng, layout, way):
    for number, case in enumerate(shared.CASES if way != "bfloat" else shared.CASES[1::2]):
        gpu.eager_copies = number % 2 == 0
        gpu.launched.clear()
        FORWARD[way](rng, case, layout, number)
        BACKWARD[way](rng, case, layout)
        assert {name.partition("<")[0] for name in names(gpu)} == {"conv_tensor", "conv_tensor_weight"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_of_one_pixel_have_their_channels_last(gpu, rng, layout):
    for channels in (16, 7):  # in whole vectors, and to be filled up
        case = Case(33, channels, 1, 1, 24, (3, 3), 1, 1)
        gpu.launched.clear()
        FORWARD["half"](rng, case, layout)
        assert {name.partition("<")[0] for name in names(gpu)} == {"conv_tensor"}
        BACKWARD["half"](rng, case, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_by_three_products(gpu, rng, one_multiprocessor, layout):
    for case in WORK:
        gpu.launched.clear()
        whole_forward(rng, case, layout)
        assert all("conv_tensor<SplitMath" in name for name in names(gpu)), names(gpu)
        gpu.launched.clear()
        whole_backward(rng, case, layout)
        assert any("conv_tensor_weight<SplitMath" in name for name in names(gpu))


@pytest.mark.parametrize("tile", TILES)
def test_every_tile(gpu, rng, monkeypatch, tile):
    """160 pixels and 130 outputs, or 65 and 63: beyond and beside a tile's."""
    way, shape, last = TILES[tile]
    monkeypatch.setattr(conv_tensor, "choose", lambda *arguments: (conv_tensor.Choice(way, shape), {}))
    gpu.launched.clear()
    case = shared.EDGES[1 if shape in (LARGE, MEDIUM) else 0]
    FORWARD[way](rng, case, LAYOUTS[last], 1)
    assert [name.partition("<")[2].split(", ")[1] for name in names(gpu)] == [shape.name]


@pytest.mark.parametrize("way", BACKWARD)
def test_every_tile_of_the_weight_gradient(gpu, rng, monkeypatch, way):
    for tile in conv_tensor.tiles_of(way, False):
        choice = conv_tensor.Choice(way, tile)
        monkeypatch.setattr(conv_tensor_weight, "choose", lambda *arguments, choice=choice: (choice, {}))
        gpu.launched.clear()
        BACKWARD[way](rng, Case(2, 12, 6, 7, 72, (3, 3), 1, 1), "NHWC")
        assert any(f"conv_tensor_weight<{MATHS[way]}, {tile.name}>" in name for name in names(gpu))


@pytest.mark.parametrize("kind", ["normal", "positive", "wide"])
def test_three_products_are_as_good_as_float32(gpu, rng, one_multiprocessor, monkeypatch, kind):
    """At most twice the error of FFMA, although what tensor cores add is cut off: at worst what has one sign."""
    draw = {
        "normal": lambda *s: rng.standard_normal(s),
        "positive": lambda *s: rng.random(s),
        "wide": lambda *s: rng.standard_normal(s) * np.exp(4 * rng.standard_normal(s)),
    }[kind]
    x, weight, grad = draw(1, 16, 22, 22), draw(40, 16, 3, 3), draw(1, 40, 20, 20)
    operands = [a.astype(np.float32) for a in (grad, x, weight)]

    def results():
        gpu.launched.clear()
        y = kernels.conv2d(*operands[1:], algorithm="gemm")
        return y, kernels.conv2d_backward(*operands, needs=("weight",))[1]

    sizes = [np.abs(a) for a in operands]
    exact = reference(kernels.conv2d, *operands[1:]), reference(kernels.conv2d_backward, *operands)[1]
    scale = reference(kernels.conv2d, *sizes[1:]), reference(kernels.conv2d_backward, *sizes)[1]
    split = results()
    assert len(names(gpu)) == 2
    assert all("SplitMath" in name for name in names(gpu))
    with monkeypatch.context() as plain:
        plain.setattr(gemm_plan, "SPLIT_ON", ())
        whole = results()
        assert not any("tensor" in name for name in names(gpu))
    for ours, theirs, right, size in zip(split, whole, exact, scale, strict=True):
        error, usual = np.abs(ours - right) / size, np.abs(theirs - right) / size
        assert error.max() <= 2 * usual.max()
        assert np.sqrt((error**2).mean()) <= 2 * np.sqrt((usual**2).mean())


@pytest.mark.parametrize("schedule", ["reverse", "shuffled", "warps reversed"])
def test_the_same_bits_in_every_schedule(gpu, rng, schedule):
    x, weight, _, grad = shared.operands(rng, shared.CASES[4], np.float16, "NCHW")

    def results():
        y = kernels.conv2d(x, weight, padding=1)
        return y, kernels.conv2d_backward(grad, x, weight, padding=1, needs=("weight",))[1]

    gpu.schedule = "forward"
    expected = results()
    gpu.schedule = schedule
    for mine, right in zip(results(), expected, strict=True):
        np.testing.assert_array_equal(mine, right)


def test_before_asynchronous_copies(gpu, rng, one_multiprocessor, monkeypatch):
    """float16 has tensor cores then, the others none."""
    monkeypatch.setattr(gpu, "capability", (7, 5))
    for layout in LAYOUTS:
        for way, expected in (("half", {"conv_tensor", "conv_tensor_weight"}), ("bfloat", set()), ("tf32", set())):
            gpu.launched.clear()
            if way == "tf32":
                whole_forward(rng, FEW, layout)
                whole_backward(rng, FEW, layout)
            else:
                FORWARD[way](rng, FEW, layout)
                BACKWARD[way](rng, FEW, layout)
            found = {name.partition("<")[0] for name in names(gpu)}
            assert found == (expected or {"conv_product", "conv_product_weight"})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_stay_in_their_windows(gpu, rng, one_multiprocessor, value):
    """Also in channels that were filled up to a vector, and in what three products make of them."""
    for case, dtype in ((FEW, np.float16), (WORK[0], np.float32)):
        x, weight, bias, _ = shared.operands(rng, case, dtype, "NCHW")
        x.flat[137], x.flat[401] = value, -value
        y = kernels.conv2d(x, weight, bias, padding=1, algorithm="gemm")
        expected = reference(kernels.conv2d, x, weight, bias, padding=1)
        np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
        np.testing.assert_array_equal(np.isinf(y), np.isinf(expected))


FEW_CHANNELS = "its channels or outputs, filled up to whole vectors of 16 bytes, would be zeros for too great a part"
NO_HOPPER = "not wgmma: needs compute capability 9.0, and no later one"
LEAVE = "not mma in TF32: using(tf32=True) would allow it"


@pytest.mark.parametrize(
    ("capability", "tf32", "dtype", "case", "note"),
    [
        ((9, 0), False, "float16", Case(1, 64, 56, 56, 256), "wgmma, tiles of 128 x 256 pixels x outputs"),
        ((8, 0), False, "float16", Case(1, 64, 56, 56, 256), f"mma, tiles of 128 x 128 pixels x outputs; {NO_HOPPER}"),
        ((9, 0), False, "bfloat16", Case(1, 64, 56, 56, 64),
         f"mma, tiles of 128 x 64 pixels x outputs; not wgmma: {gemm_plan.TOO_LITTLE}"),
        ((9, 0), False, "float16", Case(1, 64, 8, 8, 64),
         f"mma, tiles of 64 x 64 pixels x outputs; not wgmma: {gemm_plan.TOO_LITTLE}"),
        ((7, 5), False, "float16", Case(1, 64, 56, 56, 256), f"mma, tiles of 64 x 64 pixels x outputs; {NO_HOPPER}"),
        ((7, 5), False, "bfloat16", Case(1, 64, 8, 8, 64),
         f"tiles of 64 x 64 pixels x outputs; {NO_HOPPER}; not mma: needs compute capability 8.0"),
        ((8, 6), True, "float32", Case(1, 64, 56, 56, 256), "mma in TF32, tiles of 128 x 128 pixels x outputs"),
        ((9, 0), False, "float32", Case(1, 64, 56, 56, 256),
         f"mma in 3xTF32, tiles of 128 x 128 pixels x outputs; {LEAVE}"),
        ((8, 6), False, "float32", Case(1, 64, 8, 8, 64),
         f"tiles of 64 x 64 pixels x outputs; {LEAVE}; not mma in 3xTF32: predicted to be slower than float32 on this "
         "device"),
        ((9, 0), False, "float32", Case(1, 64, 8, 8, 64),
         f"tiles of 64 x 64 pixels x outputs; {LEAVE}; not mma in 3xTF32: {gemm_plan.TOO_LITTLE}"),
        ((9, 0), False, "float32", Case(1, 5, 56, 56, 64),
         f"tiles of 64 x 64 pixels x outputs; {LEAVE}; not mma in 3xTF32: sums of fewer than 64 products"),
        ((9, 0), False, "float32", Case(1, 5, 56, 56, 64, (5, 5)),
         f"tiles of 64 x 64 pixels x outputs; {LEAVE}; not mma in 3xTF32: {FEW_CHANNELS}"),
        ((9, 0), False, "float64", Case(1, 64, 8, 8, 64), "tiles of 64 x 64 pixels x outputs"),
    ],
)  # fmt: skip
def test_explain(gpu, monkeypatch, capability, tf32, dtype, case, note):
    monkeypatch.setattr(gpu, "capability", capability)
    monkeypatch.setattr(gpu, "multiprocessors", 4)  # which these images occupy
    x = np.empty((case.n, case.h, case.w, case.c), B if dtype == "bfloat16" else dtype)
    weight = np.empty((case.o, case.c, *case.kernel), x.dtype)
    with tilewise.using(tf32=tf32):
        decision = tilewise.explain(kernels.conv2d, x, weight, layout="NHWC", algorithm="gemm")
    assert (decision.algorithm, decision.note) == ("gemm", note)


TILE_OF_NAME = {
    tile.name: (tile.rows, tile.columns)
    for tile in (*(shape for _, shape, _ in TILES.values()), gemm_tile.BIG, gemm_tile.TALL, gemm_tile.SMALL)
} | {"128": (128, 128), "256": (128, 256)}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_choice_is_the_launch(gpu, rng, one_multiprocessor, layout):
    """What explain says is what is launched: the way, and the tile."""
    ways = []
    for case, dtype in ((FEW, np.float16), (FEW, np.float32), (WORK[0], np.float32), (shared.EDGES[1], np.float16)):
        x, weight, _, _ = shared.operands(rng, case, dtype, layout)
        options = case.options | {"layout": layout, "algorithm": "gemm"}
        note = tilewise.explain(kernels.conv2d, x, weight, **options).note
        gpu.launched.clear()
        kernels.conv2d(x, weight, **options)
        (launched,) = (name for name, _ in gpu.launched if "pack" not in name)
        kernel, _, arguments = launched.removeprefix("cupy ").partition("<")
        way = {"conv_wgmma": "wgmma", "conv_tensor": "mma", "conv_product": ""}[kernel]
        tile = TILE_OF_NAME[arguments.split(", ")[1].rstrip(">")]
        assert note.startswith(f"{way}" if way else "tiles")
        assert f"tiles of {tile[0]} x {tile[1]} " in note
        ways.append(way)
    assert ways == ["mma", "", "mma", "wgmma"]


def window(layout):
    return {"stride": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1), "groups": 1, "layout": layout}


def test_images_that_32_bits_cannot_count(gpu, monkeypatch):
    """The tiles of the weight's gradient count them so."""
    taken = []
    for module in (conv_tensor_weight, conv_product_weight, conv_sums):
        monkeypatch.setattr(module, "weight_gradient", lambda *given, module=module: taken.append(module))
    x = SimpleNamespace(dtype=np.dtype(np.float16), place=SimpleNamespace(ordinal=0))
    for images in (1 << 30, 1 << 31):
        it = conv_geometry.forward((images, 16, 2, 2), (16, 16, 1, 1), (2, 2), **window("NCHW"))
        conv._weight_gradient(it, x, x, (16, 16, 1, 1), {})
    assert taken == [conv_tensor_weight, conv_sums]


def test_images_that_a_grid_has_no_room_for(gpu, rng, monkeypatch):
    """They are turned in parts."""
    monkeypatch.setattr(conv_packing, "_MOST_BLOCKS", 30)
    monkeypatch.setattr(emulator, "_MOST_BLOCKS", (30, 30, 30))
    case = Case(40, 16, 2, 3, 8, (3, 3), 1, 1)
    FORWARD["half"](rng, case, "NCHW")
    BACKWARD["half"](rng, case, "NCHW")
    assert {"conv_tensor", "conv_tensor_weight"} <= {name.partition("<")[0] for name in names(gpu)}


def test_x_is_turned_once_for_all_phases_of_its_gradient(gpu, rng, monkeypatch):
    turned = []
    in_vectors = conv_tensor.in_vectors
    monkeypatch.setattr(conv_tensor, "in_vectors", lambda *given: turned.append(1) or in_vectors(*given))
    x, weight, _, grad = shared.operands(rng, Case(1, 8, 9, 9, 16, (3, 3), 2, 1), np.float16, "NCHW")
    kernels.conv2d_backward(grad, x, weight, stride=2, padding=1, needs=("x",))
    assert len(turned) == 1


def test_a_cotangent_is_turned_once_for_both_gradients(gpu, rng, monkeypatch):
    turned, in_vectors = [], conv_tensor.in_vectors
    for module in (conv_tensor, conv_tensor_weight):
        monkeypatch.setattr(module, "in_vectors", lambda *given: turned.append(1) or in_vectors(*given))
    x, weight, _, grad = shared.operands(rng, Case(1, 16, 8, 8, 16, (3, 3), 1, 1), np.float16, "NCHW")
    kernels.conv2d_backward(grad, x, weight, padding=1, needs=("x", "weight"))
    assert len(turned) == 2  # and x


@pytest.mark.parametrize("way", ["half", "bfloat", "tf32", "split"])
def test_one_tap_needs_no_other_order_of_x(gpu, rng, one_multiprocessor, way):
    """In NCHW, forward and backward, in both tiles; where rows are no whole vectors, x is turned."""
    for case in (Case(2, 72, 12, 16, 70, (1, 1)), Case(3, 128, 4, 34, 80, (1, 1), groups=2)):
        gpu.launched.clear()
        FORWARD[way](rng, case, "NCHW")
        assert {name.partition("<")[0] for name in names(gpu)} == {"conv_pointwise"}
    BACKWARD[way](rng, Case(2, 70, 8, 8, 68, (1, 1)), "NCHW")
    gpu.launched.clear()
    FORWARD[way](rng, Case(2, 72, 9, 11, 72, (1, 1)), "NCHW")
    assert not any("pointwise" in name for name in names(gpu))


@pytest.mark.parametrize(("outputs", "way"), [(512, "mma"), (520, "wgmma")])
def test_many_outputs_are_worth_turning_images(gpu, one_multiprocessor, outputs, way):
    need(gpu, conv_tensor._kernels["wgmma", NARROW, False])
    x, weight = np.empty((1, 128, 16, 16), np.float16), np.empty((outputs, 128, 1, 1), np.float16)
    assert tilewise.explain(kernels.conv2d, x, weight).note.startswith(way)


@pytest.mark.parametrize("way", ["half", "tf32"])
def test_images_are_turned_by_vectors(gpu, rng, way):
    """By more than one tile of pixels, and of channels, of each group."""
    case = Case(2, 144, 10, 16, 16, (1, 2), groups=2)
    gpu.launched.clear()
    FORWARD[way](rng, case, "NCHW")
    BACKWARD[way](rng, case, "NCHW")
    assert "cupy conv_pack_vectors<T>" in {name for name, _ in gpu.launched}
