"""Winograd's convolution of the GPU backends, executed on the CPU, against the reference in float64."""

import re

import numpy as np
import pytest
from conv_cases import LAYOUTS, Case, check, reference
from test_cuda_conv import backward, forward, operands

import tilewise
from tilewise import kernels
from tilewise.kernels import conv_geometry, conv_winograd_plan

GPU_BACKENDS = ("cuda", "cupy")
WINOGRAD_GROWTH = 16.0  # of the error, against a direct sum
SHORT_WINOGRAD = [
    Case(1, 1, 3, 3, 1, (3, 3)),
    Case(2, 7, 2, 3, 8, (3, 3), 1, 1),
    Case(1, 17, 6, 9, 33, (3, 3)),
    Case(2, 8, 9, 8, 5, (3, 3), 1, ((0, 2), (3, 1))),
    Case(1, 12, 7, 5, 10, (3, 3), 1, 1, 1, 2),
    Case(3, 16, 13, 14, 66, (3, 3), 1, "same"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("room", "together"), [(1 << 28, 32), (400_000, 32), (1, 5)])  # parts begin within images
def test_winograd(gpu, rng, monkeypatch, room, together, layout):
    monkeypatch.setattr(conv_winograd_plan, "_ROOM", room)
    monkeypatch.setattr(conv_winograd_plan, "_TOGETHER", together)
    for number, case in enumerate(SHORT_WINOGRAD):
        forward(rng, case, np.float32, layout, number, "winograd", WINOGRAD_GROWTH)


def test_memory_of_large_images():
    """V and M take as much as is stated, however large an image is."""
    window = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1), "groups": 1, "layout": "NCHW"}
    it = conv_geometry.forward((3, 64, 4096, 4096), (64, 64, 3, 3), (4096, 4096), **window)
    parts = list(conv_winograd_plan.tiles_of(it, 4).parts(it.images))
    assert sum(tiles for _, tiles in parts) == 3 * 1024 * 1024
    assert max(tiles for _, tiles in parts) * 36 * (64 + 64) * 4 <= 256 << 20


@pytest.mark.parametrize(("capability", "algorithm"), [((7, 5), "winograd"), ((8, 0), "gemm")])
def test_tf32_where_there_is_none(gpu, rng, monkeypatch, capability, algorithm):
    """Leave to round products does not make Winograd's the slower ones on a device that cannot."""
    monkeypatch.setattr(gpu, "capability", capability)
    monkeypatch.setattr(conv_winograd_plan, "_LEAST_TILES", 1)
    x, weight, _, _ = operands(rng, Case(1, 48, 8, 7, 48, (3, 3), 1, 1), np.float32, "NCHW")
    with tilewise.using(tf32=True):
        decision = tilewise.explain(kernels.conv2d, x, weight, padding=1)
        alone = tilewise.explain(kernels.conv2d, x, weight[:, :1], padding=1, groups=48)
        gpu.launched.clear()
        kernels.conv2d_backward(x, x, weight, padding=1, needs=("x",))
    assert (decision.algorithm, alone.algorithm) == (algorithm, "depthwise")
    assert decision.rejected.get("winograd") == (None if algorithm == "winograd" else "tensor cores are faster")
    assert alone.rejected["winograd"] == "too few channels or tiles"
    assert any("winograd" in name for name, _ in gpu.launched) == (algorithm == "winograd")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_winograd_backward(gpu, rng, monkeypatch, layout):
    monkeypatch.setattr(conv_winograd_plan, "_LEAST_CHANNELS", 0)
    monkeypatch.setattr(conv_winograd_plan, "_LEAST_TILES", 1)
    taken = 0
    for case in SHORT_WINOGRAD:
        gpu.launched.clear()
        backward(rng, case, np.float32, layout, WINOGRAD_GROWTH)
        taken += any("winograd" in name for name, _ in gpu.launched)
    assert taken >= 5


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_winograd_keeps_nan_and_inf_in_their_windows(gpu, rng, layout, value):
    case = Case(2, 5, 9, 10, 6, (3, 3), 1, 1)
    x, weight, bias, add = operands(rng, case, np.float32, layout)
    x.flat[137], x.flat[401] = value, -value
    options = {"padding": 1, "layout": layout, "activation": "relu"}
    y = kernels.conv2d(x, weight, bias, add=add, algorithm="winograd", **options)
    expected = reference(kernels.conv2d, x, weight, bias, add=add.astype(np.float64), **options)
    check(y, expected, case.taps, layout, np.float32, WINOGRAD_GROWTH)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("algorithm", "dtype"), [("winograd", np.float32), ("gemm", np.float32), ("gemm", np.float16)])
def test_prepared_weights_are_transformed_once(gpu, rng, algorithm, dtype, layout):
    case = Case(2, 16, 9, 10, 24, (3, 3), 1, 1, 1, 2)
    x, weight, bias, add = operands(rng, case, dtype, layout)
    options = case.options | {"layout": layout, "algorithm": algorithm}
    prepared = kernels.prepare_conv2d(weight, bias, **options)
    np.testing.assert_array_equal(prepared(x, add=add), kernels.conv2d(x, weight, bias, add=add, **options))
    kept = prepared.nbytes
    assert kept >= weight.nbytes * (6 if algorithm == "winograd" else 3)  # the host's, the device's, and this
    gpu.launched.clear()
    y = prepared(x[:1])
    names = {name for name, _ in gpu.launched}
    if dtype == np.float16 and layout == "NCHW":
        names.discard("cupy conv_pack<T>")  # of x: it packs weights, too, but those of both layouts
    assert not any(re.search("weight|pack|copy", name) for name in names)
    assert any(re.search(f"{algorithm}|product|implicit|tensor", name) for name in names)
    np.testing.assert_array_equal(y, kernels.conv2d(x[:1], weight, bias, **options))
    assert prepared.nbytes == kept


@pytest.mark.filterwarnings("ignore:invalid value")
def test_winograd_of_what_overflows_its_transforms(gpu, rng):
    """Numbers whose multiples are infinite; and an infinite weight, which meets padding: 0 * inf is NaN."""
    case = Case(1, 5, 9, 10, 6, (3, 3), 1, 1)
    x, weight, bias, _ = operands(rng, case, np.float32, "NCHW")
    large, small = x * np.float32(2.0**125), weight * np.float32(2.0**-20)
    weight[1, 2, 0, 0] = np.inf
    for images, filters in ((large, small), (x, weight)):
        y = kernels.conv2d(images, filters, bias, padding=1, algorithm="winograd")
        expected = reference(kernels.conv2d, images, filters, bias, padding=1)
        check(y, expected, case.taps, "overflow", np.float32, WINOGRAD_GROWTH)


def test_winograd_is_refused_where_it_does_not_apply(gpu, rng):
    x, weight = rng.standard_normal((1, 8, 9, 9)), rng.standard_normal((8, 8, 3, 3))
    for dtype, options in ((np.float64, {}), (np.float32, {"stride": 2}), (np.float32, {"dilation": 2})):
        with pytest.raises(ValueError, match="winograd"):
            kernels.conv2d(x.astype(dtype), weight.astype(dtype), algorithm="winograd", **options)
    many = rng.standard_normal((2, 48, 32, 32)).astype(np.float32)
    filters = rng.standard_normal((48, 48, 3, 3)).astype(np.float32)
    assert tilewise.explain(kernels.conv2d, many, filters, padding=1).algorithm == "winograd"
