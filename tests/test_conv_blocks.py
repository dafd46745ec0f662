"""The convolution kernels around the edges of their blocks: each case says which path it is to reach, and does."""

import os
import subprocess
import sys
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conv_cases import FLOATS, LAYOUTS, Case, laid, nchw, reference
from tolerances import assert_close

from tilewise import explain, kernels, using
from tilewise.kernels import operation
from tilewise.kernels.cpu import conv_detours, conv_nchw_plan, conv_nhwc, conv_pass, conv_weight
from tilewise.kernels.cpu.simd import CHANNEL_NV, lane_count

# the places of conv_nchw_plan.plan's and conv_nhwc.plan's geometry
NCHW_FIELDS = {
    "planes": 11, "rows": 14, "images": 15, "splits": 16, "block": 17, "plane": 18, "line": 24, "in_place": 26,
    "per_line": 28,
}  # fmt: skip
NHWC_FIELDS = {"rows": 14, "images": 15, "in_place": 18, "splits": 24}
PANEL = CHANNEL_NV * lane_count(4)  # pixels


class Plan(NamedTuple):
    fields: dict
    arrays: tuple

    def __getattr__(self, name):
        return int(self.arrays[0][self.fields[name]])


def planned(case, layout, itemsize=4):
    """The plan of a forward convolution, through the same functions as the library's."""
    (top, _), (left, _) = case.pads()
    taps = [np.arange(k) * case.dilation - p for k, p in zip(case.kernel, (top, left), strict=True)]
    stride = (case.stride, case.stride)
    grid = tuple(
        (size + sum(p) - case.dilation * (k - 1) - 1) // case.stride + 1
        for size, p, k in zip((case.h, case.w), case.pads(), case.kernel, strict=True)
    )
    outputs, channels = case.o // case.groups, case.c // case.groups
    if layout == "NCHW":
        steps = (0, grid[0] * grid[1], grid[1], 1)
        shape = (case.n, channels, case.h, case.w)
        plan = conv_nchw_plan.plan(shape, outputs, taps, stride, grid, steps, case.groups, itemsize, 0)
        return Plan(NCHW_FIELDS, plan)
    steps = (0, grid[0] * grid[1] * case.o, grid[1] * case.o, case.o)
    shape = (case.n, case.h, case.w, channels)
    return Plan(NHWC_FIELDS, conv_nhwc.plan(shape, outputs, taps, stride, grid, steps, case.groups, 0))


NCHW_PATHS = {
    "read in place, the last block copied": (Case(5, 6, 14, 14, 16, (5, 5)), lambda p: p.in_place),
    "several images a block, in several planes": (Case(9, 40, 10, 6, 9, (2, 2), 2), lambda p: p.images > 1),
    "rows as one line": (Case(2, 8, 20, 20, 9, (3, 1)), lambda p: p.line > 20),
    "channels in blocks": (Case(2, 130, 12, 13, 17, (3, 3), 1, 1), lambda p: p.block < 130),
    "outputs in parts": (Case(1, 8, 8, 8, 8 * 36, (3, 3), 1, 1), lambda p: p.splits > 1),
    "a last block with fewer rows": (Case(1, 3, 75, 70, 9, (3, 3), 1, 1), lambda p: 75 % p.rows),
    "panels anew in each line": (Case(2, 3, 13, 224, 9, (3, 3), 2, 1), lambda p: p.per_line == ceil(112 / PANEL)),
    "panels anew, a single vector last": (
        Case(1, 3, 9, 224, 6, (3, 3), 1, 1),
        lambda p: p.per_line == ceil(224 / PANEL),
    ),
    "panels anew, channels in blocks": (
        Case(1, 72, 5, 221, 5, (3, 3), 1, 1),
        lambda p: p.per_line and p.block < 72,
    ),
    "a plane for each tap column": (Case(2, 4, 30, 28, 32, (5, 5), 1, 2), lambda p: p.planes == 5),
    "a plane for each tap column and row phase": (Case(1, 90, 27, 35, 64, (3, 3), 2, 1), lambda p: p.planes == 6),
    "a plane for each tap column, several images": (
        Case(9, 3, 8, 18, 112, (1, 5), 1, (0, 2)),
        lambda p: p.planes * p.images > 5,
    ),
    "a plane for each tap column, dilated": (Case(1, 3, 9, 18, 40, (5, 5), 1, (4, 4), 2), lambda p: p.planes == 5),
    "a plane for each tap column, padding behind": (
        Case(4, 8, 16, 14, 48, (3, 2), 1, ((1, 1), (0, 1))),
        lambda p: p.planes == 2 and not p.in_place,
    ),
    "three runs in a vector": (Case(2, 3, 9, 1, 9, (3, 3), 1, 1), lambda p: p.line < lane_count(8)),
    "stride 3": (Case(2, 3, 31, 29, 9, (3, 3), 3, 1), lambda p: True),
    "dilation 2, stride 2": (Case(2, 3, 31, 29, 9, (3, 3), 2, 3, 2), lambda p: True),
    "more padding than image": (Case(1, 3, 4, 5, 9, (3, 3), 1, 4), lambda p: True),
    "fewer taps than a vector": (Case(1, 1, 30, 30, 9, (1, 3), 1, 1), lambda p: True),
}
NHWC_PATHS = {
    "read in place": (Case(2, 5, 14, 14, 33, (3, 3)), lambda p: p.in_place),
    "read in place, groups": (Case(2, 8, 9, 9, 36, (3, 3), 2, 0, 1, 2), lambda p: p.in_place),
    "padded rows, groups": (Case(2, 8, 9, 9, 36, (3, 3), 1, 1, 1, 2), lambda p: not p.in_place),
    "pieces cut in two": (Case(1, 400, 8, 9, 9, (3, 3), 1, 1), lambda p: (p.arrays[2][:, 2] == 600).all()),
    "pieces cut in two, two panels": (Case(1, 400, 3, 9, 33, (3, 3), 1, 1), lambda p: len(p.arrays[2]) == 6),
    "a tap row is one piece": (Case(1, 3, 30, 31, 9, (5, 5), 1, 2), lambda p: (p.arrays[2][:, 2] == 15).all()),
    "dilation: each tap a piece": (Case(1, 3, 30, 31, 9, (3, 3), 1, 2, 2), lambda p: (p.arrays[2][:, 2] == 3).all()),
    "several images a block": (Case(40, 17, 5, 5, 40, (3, 3), 1, 1), lambda p: p.images > 1),
    "outputs in parts": (Case(1, 8, 7, 7, 300, (3, 3), 1, 1), lambda p: p.splits > 1),
    "a last block with fewer rows": (Case(1, 3, 73, 20, 9, (3, 3), 1, 1), lambda p: 73 % p.rows),
    "one vector of outputs": (Case(1, 3, 9, 9, 3, (3, 3), 1, 1), lambda p: True),
}
PATHS = [pytest.param(case, "NCHW", reached, id=f"NCHW {name}") for name, (case, reached) in NCHW_PATHS.items()]
PATHS += [pytest.param(case, "NHWC", reached, id=f"NHWC {name}") for name, (case, reached) in NHWC_PATHS.items()]


@pytest.mark.parametrize(("case", "layout", "reached"), PATHS)
def test_the_case_reaches_its_path(case, layout, reached):
    assert reached(planned(case, layout))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", [None, "relu", "tanh"])
@pytest.mark.parametrize(("case", "layout", "reached"), PATHS)
def test_forward(rng, case, layout, reached, activation, dtype):
    x, weight, bias = case.arrays(rng, dtype, layout)
    weight /= weight[0].size ** 0.5  # or tanh would be 1 everywhere
    options = case.options | {"layout": layout, "activation": activation}
    expected = reference(kernels.conv2d, x, weight, bias, **options)
    y = kernels.conv2d(x, weight, bias, **options, algorithm="gemm")
    assert_close(nchw(y, layout), nchw(expected, layout), reduction=case.taps)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("case", "layout", "reached"), PATHS)
def test_backward(rng, case, layout, reached, dtype):
    x, weight, _ = case.arrays(rng, dtype, layout)
    options = case.options | {"layout": layout}
    shape = reference(kernels.conv2d, x, weight, **options).shape
    grad = rng.standard_normal(shape).astype(dtype)
    expected = reference(kernels.conv2d_backward, grad, x, weight, **options)
    results = kernels.conv2d_backward(grad, x, weight, **options)
    sums = case.o * case.taps // case.c, grad[..., 0].size * shape[-1], grad.size
    for result, wanted, reduction in zip(results, expected, sums, strict=True):
        assert_close(result, wanted, reduction=reduction)


# 1x1 on 7x7: a quarter of NCHW's lanes would be empty
THROUGH = Case(8, 140, 7, 7, 70, (3, 3), 1, 1)
ONE_IMAGE = THROUGH._replace(n=1, h=14, w=14, o=64)
FEW_OUTPUTS = Case(20, 6, 14, 14, 16, (5, 5))  # LeNet's second layer: rows of 10 pixels


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", [THROUGH, THROUGH._replace(h=9, w=9, stride=2, o=64), ONE_IMAGE, FEW_OUTPUTS], ids=str)
def test_small_images_go_through_nhwc(rng, case, dtype, monkeypatch):
    turned = []
    turn = conv_detours.ThroughNHWC.__call__
    monkeypatch.setattr(conv_detours.ThroughNHWC, "__call__", lambda self, *a: (turned.append(1), turn(self, *a))[1])
    operation.forget_plans()
    x, weight, bias = case.arrays(rng, dtype)
    y = kernels.conv2d(x, weight, bias, **case.options, activation="relu", algorithm="gemm")
    expected = reference(kernels.conv2d, x, weight, bias, **case.options, activation="relu")
    assert turned
    assert_close(y, expected, reduction=case.taps)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_add", [False, True])
@pytest.mark.parametrize("case", [Case(1, 70, 5, 7, 130, (1, 1)), Case(3, 66, 2, 3, 33, (1, 1))], ids=str)
def test_few_pixels_of_nhwc_go_through_nchw(rng, case, dtype, with_add):
    x, weight, bias = case.arrays(rng, dtype, "NHWC")
    options: dict = {"layout": "NHWC", "activation": "relu", "algorithm": "gemm"}
    add = rng.standard_normal((*x.shape[:3], case.o)).astype(dtype) if with_add else None
    assert "through NCHW" in str(explain(kernels.conv2d, x, weight, bias, add=add, **options))
    wide = None if add is None else add.astype(np.float64)
    expected = reference(kernels.conv2d, x, weight, bias, add=wide, **options)
    assert_close(kernels.conv2d(x, weight, bias, add=add, **options), expected, reduction=case.taps)
    many = np.repeat(x, 9, axis=0)
    assert "through" not in str(explain(kernels.conv2d, many, weight, bias, layout="NHWC"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("with_add", [False, True])
def test_batches_that_are_copied_go_in_parts(rng, dtype, monkeypatch, kernel, with_add):
    """9 small images, 4 at a time, with a summand or without."""
    monkeypatch.setattr(conv_detours, "COPIES", 0)
    parts = []
    once = conv_detours.BatchInParts.__call__
    monkeypatch.setattr(
        conv_detours.BatchInParts, "__call__", lambda self, *a: (parts.append(self.some), once(self, *a))[1]
    )
    operation.forget_plans()
    case = Case(9, 400, 3, 1, 400, (kernel, kernel), 1, kernel // 2)
    x, weight, bias = case.arrays(rng, dtype)
    add = rng.standard_normal((9, 400, 3, 1)).astype(dtype) if with_add else None
    y = kernels.conv2d(x, weight, bias, **case.options, activation="relu", algorithm="gemm", add=add)
    operation.forget_plans()
    assert parts == [4]
    wide = None if add is None else add.astype(np.float64)
    expected = reference(kernels.conv2d, x, weight, bias, **case.options, activation="relu", add=wide)
    assert_close(y, expected, reduction=case.taps)


# what explain says of the way taken, which the tests above show to be taken
DETOURS = [
    (THROUGH, {}, "x and the result go through NHWC"),
    (THROUGH._replace(n=300), {}, "x and the result go through NHWC, 150 images at a time"),
    (THROUGH, {"layout": "NHWC"}, ""),
    (THROUGH._replace(h=17, w=17), {}, ""),
    (
        THROUGH._replace(n=8, c=400, h=1, w=3, o=400, kernel=(1, 1), padding=0),
        {},
        "the batch's small images are joined to one",
    ),
    (THROUGH._replace(n=1, c=400, o=400, kernel=(1, 1), padding=0), {}, ""),
    (Case(1, 64, 8, 8, 64, (3, 3), 1, 1), {"algorithm": "winograd"}, "x and the result go through NHWC"),
    (Case(0, 64, 8, 8, 64, (3, 3), 1, 1), {}, ""),
]


@pytest.mark.parametrize(("case", "options", "note"), DETOURS)
def test_explain_tells_of_copied_images(rng, case, options, note):
    layout = options.get("layout", "NCHW")
    x, weight, bias = case.arrays(rng, np.float32, layout)
    options = {"algorithm": "gemm"} | options | case.options
    decision = explain(kernels.conv2d, x, weight, bias, **options)
    assert decision.note == note
    assert note in str(decision)
    assert explain(kernels.prepare_conv2d(weight, bias, **options), x).note == note
    with using(backend="reference"):
        assert not explain(kernels.conv2d, x, weight, bias, **options).note


FENCED = """
import numpy as np
from fences import fenced, fenced_copy
from tilewise import kernels
from tilewise.kernels.cpu.plane_moves import turn_planes

rng = np.random.default_rng(0)
for layout in ("NCHW", "NHWC"):
    for channels, outputs, k, options in (
        (5, 9, 3, {"padding": 1}), (5, 9, 3, {"padding": 1, "stride": 2}), (6, 16, 5, {}), (40, 33, 1, {}),
        (40, 33, 1, {"stride": 2}), (70, 33, 1, {}),
        (70, 33, 1, {"stride": 2}), (6, 9, 2, {"stride": 2}), (3, 20, 3, {"stride": 3}),
        (6, 6, 3, {"groups": 6, "padding": 1}),
        (140, 70, 3, {"padding": 1}),
    ):
        for h, w in ((7, 7), (17, 19)):
            shape = (2, channels, h, w) if layout == "NCHW" else (2, h, w, channels)
            x = fenced_copy(rng.standard_normal(shape, dtype=np.float32))
            size = (outputs, channels // options.get("groups", 1), k, k)
            weight = fenced_copy(rng.standard_normal(size, dtype=np.float32))
            bias = fenced_copy(rng.standard_normal(outputs, dtype=np.float32))
            y = kernels.conv2d(x, weight, bias, layout=layout, **options)
            for algorithm in ("direct", "gemm", "winograd", "depthwise"):
                chosen = options | {"layout": layout, "algorithm": algorithm}
                try:
                    out = fenced_copy(kernels.conv2d(x, weight, bias, **chosen))
                except ValueError as error:
                    assert "does not apply" in str(error)
                    continue
                added = kernels.conv2d(x, weight, bias, add=fenced_copy(y), out=out, **chosen)
                prepared = kernels.prepare_conv2d(weight, bias, **chosen)
                assert (prepared(x, add=fenced_copy(y), out=fenced_copy(y)) == added).all()
            kernels.conv2d_backward(y, x, weight, layout=layout, **options)
x = fenced_copy(rng.standard_normal((3, 400, 5, 5), dtype=np.float32))  # joined to one image
kernels.conv2d(x, fenced_copy(rng.standard_normal((400, 400, 1, 1), dtype=np.float32)), add=fenced_copy(x))
x = fenced_copy(rng.standard_normal((1, 16, 1, 1041), dtype=np.float32))  # one row of output, in two pieces
weight = fenced_copy(rng.standard_normal((16, 16, 1, 1), dtype=np.float32))
kernels.conv2d_backward(kernels.conv2d(x, weight, stride=2), x, weight, stride=2)
for rows, columns in ((6, 35), (35, 6), (3, 5)):
    x = fenced_copy(rng.standard_normal((2, rows, columns), dtype=np.float32))
    turned = fenced((2, columns, rows))
    turn_planes(0, x.ravel(), 2, rows, columns, turned.ravel())
    assert (turned == x.swapaxes(1, 2)).all()
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects a page with mprotect, as Linux has it")
def test_nothing_beyond_an_array_is_touched():
    """Operands and results end before a page that may not be read; a stray vector kills the process."""
    folder = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", FENCED], capture_output=True, text=True, timeout=600, check=False,
        env=os.environ | {"PYTHONPATH": str(folder)},
    )  # fmt: skip
    assert result.returncode == 0, (result.returncode, result.stderr)
    assert result.stdout == "done\n"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_of_the_pixels_are_added_in_order(rng, split_everything, layout):
    """Few weights, many pixels: the weight gradient adds up in parts, whatever the number of threads."""
    import tilewise

    case = Case(6, 1, 29, 31, 6, (5, 5), 1, 2)
    x, weight, _ = case.arrays(rng, np.float32, layout)
    grad = laid(rng.standard_normal((6, 6, 29, 31)).astype(np.float32), layout)
    taps = [np.arange(5) - 2] * 2
    sizes = {
        "NCHW": lambda: conv_weight.plan_nchw((6, 1, 29, 31), 6, taps, (1, 1), (29, 31), 1, 4)[-1],
        "NHWC": lambda: conv_weight.plan_nhwc((6, 29, 31, 1), 6, taps, (1, 1), (29, 31), 1)[-1],
    }[layout]()
    assert sizes[2] > 1
    results = []
    for threads in (1, 2, 3):
        with tilewise.using(threads=threads):
            results.append(kernels.conv2d_backward(grad, x, weight, padding=2, layout=layout)[1])
    assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()


# padding wider before than behind, as wide, narrower; taps that reach over it; a last block with fewer rows
SHARED = [((1, 1), (1, 1)), ((2, 2), (3, 1)), ((2, 2), (1, 3)), ((0, 0), (2, 2)), ((4, 4), (4, 4)), ((1, 0), (0, 2))]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("padding", SHARED, ids=str)
def test_rows_of_a_plane_share_the_padding_between_them(rng, padding, dtype):
    """What lies behind a plane's last row is padding too, whatever the memory held before."""
    for h, w, kernel in ((5, 7, (5, 5)), (37, 41, (3, 5)), (67, 15, (3, 3)), (71, 15, (3, 3)), (70, 13, (3, 2))):
        case = Case(2, 3, h, w, 9, kernel, 1, padding)
        x, weight, bias = case.arrays(rng, dtype)
        expected = reference(kernels.conv2d, x, weight, bias, **case.options)
        used = [np.full(size, np.nan, dtype) for size in range(64, 16384, 64)]
        del used  # what is allocated next starts on them
        y = kernels.conv2d(x, weight, bias, **case.options, algorithm="gemm")
        assert_close(y, expected, reduction=case.taps)


def test_pitch_is_as_short_as_shared_padding_allows():
    for case, pitch in (
        (Case(1, 3, 28, 28, 9, (5, 5), 1, 2), 30),
        (Case(1, 3, 28, 28, 9, (3, 3), 1, ((1, 1), (0, 2))), 30),
        (Case(1, 3, 28, 28, 9, (3, 3), 1, 0), 28),
        (Case(1, 3, 28, 28, 9, (3, 3), 2, 1), 15),
    ):
        assert planned(case, "NCHW").arrays[0][13] == pitch


# about 640 steps, in blocks but for the last
SPREAD = [
    (Case(8, 71, 56, 56, 128, (3, 3), 2, 1), 4),
    (Case(8, 128, 28, 28, 256, (1, 5), 1, (0, 2)), 8),
    (Case(8, 128, 20, 20, 256, (1, 5), 1, (0, 2)), 4),
    (Case(8, 128, 10, 10, 256, (1, 5), 1, (0, 2)), 4),
]


@pytest.mark.parametrize(("case", "itemsize"), SPREAD)
def test_planes_for_each_tap_column_stay_in_l2(case, itemsize):
    plan = planned(case, "NCHW", itemsize)
    assert plan.planes % case.kernel[1] == 0  # else another path was taken
    assert plan.block * plan.planes * plan.plane * itemsize <= conv_nchw_plan.SPREAD_BYTES


def test_planes_with_room_for_few_rows_are_not_made(monkeypatch):
    """A block of three rows would copy eleven."""
    case = Case(1, 71, 32, 26, 32, (3, 3), 1, (0, 4), 4)
    for size, planes in ((2 << 20, 3), (80 << 10, 1)):
        monkeypatch.setattr(conv_nchw_plan, "SPREAD_BYTES", size)
        assert planned(case, "NCHW").planes == planes


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("outputs", [1, 3, 5, 7, 9, 13, 17])
def test_few_outputs_overwrite_neighbours_of_their_own_only(rng, outputs, groups, dtype):
    """NHWC: whole vectors are stored beyond a pixel's outputs, but not beyond the result; with a summand neither."""
    lane = 64 // np.dtype(dtype).itemsize
    for h, w in ((1, 1), (3, 5), (40, 31)):
        case = Case(2, 4, h, w, outputs * groups, (3, 3), 1, 1, 1, groups)
        x, weight, bias = case.arrays(rng, dtype, "NHWC")
        options = case.options | {"layout": "NHWC"}
        expected = reference(kernels.conv2d, x, weight, bias, **options)
        memory = np.full(expected.size + 2 * lane, np.nan, dtype)
        y = memory[lane:-lane].reshape(expected.shape)
        kernels.conv2d(x, weight, bias, **options, algorithm="gemm", out=y)
        assert_close(nchw(y, "NHWC"), nchw(expected, "NHWC"), reduction=case.taps)
        twice = kernels.conv2d(x, weight, bias, **options, algorithm="gemm", add=y)
        assert_close(nchw(twice, "NHWC"), nchw(2 * expected, "NHWC"), reduction=case.taps)
        assert np.isnan(memory[:lane]).all()
        assert np.isnan(memory[-lane:]).all()


def test_a_summand_that_is_the_result_is_read_before_it_is_overwritten(rng):
    """NHWC, few outputs: a vector stored whole would reach the next pixel's summand."""
    x, weight, bias = Case(1, 3, 5, 7, 3, (3, 3), 1, 1).arrays(rng, np.float32, "NHWC")
    expected = kernels.conv2d(x, weight, bias, padding=1, layout="NHWC")
    taps = [np.arange(3) - 1] * 2
    y = np.ones((1, 5, 7, 3), np.float32)
    run = conv_pass.prepare_pass(
        x.shape, weight.shape, y.shape, y.dtype, taps, (1, 1), (0, 0, 1, 1, 5, 7), 1, "NHWC", "gemm"
    )
    run(x, weight, y, bias, y.ravel())
    assert_close(y, expected + 1, reduction=27)
