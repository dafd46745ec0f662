"""Depthwise convolution: the strips and regions of its kernels around their edges, forward, transposed, gradients."""

from itertools import product
from typing import Any

import numpy as np
import pytest
from conv_cases import FLOATS, LAYOUTS, Case, both, check, laid, nchw, reference

import tilewise
from tilewise import explain, kernels
from tilewise.kernels import operation
from tilewise.kernels.cpu import (
    conv_depthwise,
    conv_depthwise_nchw,
    conv_depthwise_rows,
    conv_depthwise_same,
    conv_depthwise_weight,
    conv_transposed,
    recycling,
    scratch,
)
from tilewise.kernels.cpu.depthwise_vector import TILE
from tilewise.kernels.cpu.simd import lane_count


def depthwise(c, h, w, kernel=(3, 3), stride=1, padding: object = 1, dilation=1, n=1, outputs=1):
    return Case(n, c, h, w, c * outputs, kernel, stride, padding, dilation, c)


_HEIGHTS = [TILE - 1, TILE, TILE + 1, 1, 2, 7, 8, 2 * TILE + 1, 13]
_WIDTHS = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49]  # vectors have 4, 8 or 16 floats
_CHANNELS = [2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33]
CASES = {
    # one vector, whole vectors, and a tail, in rows (NCHW) and in channels (NHWC); less than a tile, tiles, an overlap
    "3x3": [depthwise(_CHANNELS[i % 13], _HEIGHTS[i % 9], w, n=1 + i % 2) for i, w in enumerate(_WIDTHS * 2)],
    "3x3 stride 2": [depthwise(_CHANNELS[-i % 13], 2 * _HEIGHTS[i % 9], 2 * w - i % 2, stride=2, n=1 + i % 2)
                     for i, w in enumerate(_WIDTHS)],
    # rows of at most one vector, planes enough for row after row; padding above and to the left, and none
    "narrow, stride 2": [depthwise(8, 3 + (w + i) % 4, 2 * w - i % 2, stride=2, padding=((i, 1), (1 - i % 2, 1)))
                         for w in (2, 3, 4, 5, 7, 8, 9, 15, 16, 17) for i in (0, 1)],
    # 3x3 as large as x: one row, two; a tile and less; pixels far apart, whose channels are copied, and nearly so
    "same": [
        depthwise(6, 1, 4), depthwise(6, 2, 5), depthwise(6, 3, 3), depthwise(19, 5, 4, n=2),
        depthwise(512, 5, 6, n=2), depthwise(528, 4, 5), depthwise(576, 9, 4), depthwise(1024, 3, 7),
    ],
    "padding": [
        depthwise(5, 9, 17, padding=0),
        depthwise(5, 9, 17, padding=5),
        depthwise(5, 9, 40, padding=(0, 33)),  # whole vectors of padding
        depthwise(5, 9, 40, stride=2, padding=(33, 37)),
        depthwise(3, 8, 19, padding=((0, 2), (3, 0))),
        # begins like the convolution of x's size, but does not end like it
        depthwise(6, 7, 9, padding=((1, 1), (1, 0))),
        depthwise(6, 7, 9, padding=((1, 1), (1, 2))),
        depthwise(6, 7, 9, padding=((1, 0), (1, 1))),
        depthwise(3, 8, 19, stride=2, padding=((2, 1), (0, 3))),
        depthwise(3, 6, 7, stride=2, padding="same"),
        depthwise(4, 3, 3, (2, 2), padding=((4, 5), (6, 1))),  # windows that see padding only
        depthwise(4, 3, 3, (1, 1), stride=2, padding=3),
    ],
    "kernels": [
        depthwise(17, 9, 18, (5, 5), padding=2),
        depthwise(5, 12, 33, (5, 5), 2, 2),
        depthwise(9, 9, 10, (7, 7), padding=3),
        depthwise(3, 4, 5, (7, 7), padding=3),  # a kernel larger than the image
        depthwise(6, 9, 17, (1, 3), padding=(0, 1)),
        depthwise(6, 17, 9, (4, 1), padding=(2, 0)),
        depthwise(8, 7, 9, (1, 1), padding=0),
        depthwise(8, 11, 12, (3, 3), 1, 2, 2),
        depthwise(8, 13, 21, (3, 3), 2, 2, 2),
        depthwise(8, 13, 21, (3, 3), 1, (3, 1), (3, 1)),
        depthwise(8, 13, 37, (3, 3), (1, 2)),
        depthwise(8, 13, 37, (3, 3), (2, 1)),
        depthwise(7, 14, 40, (3, 3), 3),
        depthwise(7, 14, 40, (5, 4), (1, 3), 2),
        depthwise(7, 9, 9, (2, 2), 3, 0),  # pixels of x that no window sees
        depthwise(7, 14, 40, (5, 5), 5, ((0, 3), (4, 4))),
        # one row of outputs: the transpose's only phase has taps [4, 2, 0] of rows, one row apart like a 3x3 kernel's
        depthwise(4, 1, 9, (5, 3), (2, 1), (2, 1), n=2),
    ],
    "outputs": [
        depthwise(3, 9, 17, outputs=2),
        depthwise(3, 9, 18, stride=2, outputs=3, n=2),
        depthwise(2, 9, 18, (5, 5), padding=2, outputs=4),
    ],
    # planes larger than a strip, images larger than a band, more pieces than chunks
    "blocks": [
        depthwise(2, 70, 75, n=2),
        depthwise(2, 141, 70, stride=2),
        depthwise(9, 90, 93),  # a plane of 32 KB: row after row
        depthwise(4, 89, 97, padding=((0, 1), (1, 0)), n=2),
        depthwise(2, 6, 1100),
        depthwise(40, 30, 40),
        depthwise(67, 5, 6, n=3),
        # a pixel of 1 KB and more: the weights' gradient copies its channels, the last of them few
        depthwise(259, 9, 7, n=2),
        depthwise(264, 13, 10, stride=2, n=2),
        depthwise(264, 6, 5, padding=((0, 2), (3, 0))),
        depthwise(512, 9, 8, stride=2, padding=((2, 1), (0, 3)), n=2),
        depthwise(576, 8, 9, (2, 3), padding=(2, 3)),  # windows that see padding only
        depthwise(576, 6, 5, (2, 3), padding=(4, 3), dilation=2),  # so wide a border that nothing is copied
        depthwise(512, 8, 9, (2, 2), 3, 0),  # pixels of x that no window sees
        depthwise(2, 4, 5, n=70),
        depthwise(2, 29, 300, (9, 9), padding=4),
    ],
}  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", CASES)
def test_forward(rng, kind, layout, dtype):
    for case in CASES[kind]:
        x, weight, bias = case.arrays(rng, dtype, layout)
        options = case.options | {"layout": layout}
        for b, activation in ((bias, None), (None, None), (bias, "relu"), (bias, "tanh")):
            expected = reference(kernels.conv2d, x, weight, b, **options, activation=activation)
            with tilewise.using(backend="cpu"):
                y = kernels.conv2d(x, weight, b, **options, activation=activation)
            check(y, expected, case.taps + 1, (case, layout, activation), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_shorter_than_a_vector_touch_nothing_behind_the_result(rng, dtype):
    """All but the last of them may be stored as whole vectors, over the rows that follow."""
    for width in (3, 6, 14, 30):
        case = depthwise(8, 5, width, stride=2)
        x, weight, bias = case.arrays(rng, dtype, "NCHW")
        expected = reference(kernels.conv2d, x, weight, bias, **case.options)
        memory = np.full(expected.size + 64, 7, dtype)
        out = memory[: expected.size].reshape(expected.shape)
        with tilewise.using(backend="cpu"):
            kernels.conv2d(x, weight, bias, **case.options, out=out)
        check(out, expected, case.taps + 1, (case, width), dtype)
        assert (memory[expected.size :] == 7).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", CASES)
def test_gradients(rng, kind, layout, dtype):
    for case in CASES[kind]:
        x, weight, _ = case.arrays(rng, dtype, layout)
        options = case.options | {"layout": layout}
        y = reference(kernels.conv2d, x, weight, **options)
        grad = rng.standard_normal(y.shape).astype(dtype)
        expected = reference(kernels.conv2d_backward, grad, x, weight, **options)
        lengths = (case.taps * case.o // case.c, y.size // case.o, y.size // case.o)
        for needs in (("x", "weight", "bias"), ("x",), ("weight",), ("bias",)):
            with tilewise.using(backend="cpu"):
                gradients = kernels.conv2d_backward(grad, x, weight, **options, needs=needs)
            for name, actual, right, length in zip(("x", "weight", "bias"), gradients, expected, lengths, strict=True):
                assert (actual is None) == (name not in needs)
                if actual is not None:
                    check(actual, right, length, (case, layout, name), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_transposed_convolution(rng, layout, dtype):
    for case in CASES["kernels"] + CASES["3x3 stride 2"]:
        if np.maximum(*case.pads()).max() > min(case.kernel):
            continue
        x, weight, bias = case.arrays(rng, dtype, layout)
        options = {"stride": case.stride, "dilation": case.dilation, "groups": case.c, "layout": layout}
        extra = tuple(max(s, d) - 1 for s, d in zip(both(case.stride), both(case.dilation), strict=True))
        for output_padding in ((0, 0), extra):
            expected = reference(kernels.conv_transpose2d, x, weight, bias, output_padding=output_padding, **options)
            with tilewise.using(backend="cpu"):
                y = kernels.conv_transpose2d(x, weight, bias, output_padding=output_padding, **options)
            check(y, expected, case.taps + 1, (case, layout, output_padding), dtype)
            grad = rng.standard_normal(y.shape).astype(dtype)
            options_back = options | {"output_padding": output_padding}
            expected = reference(kernels.conv_transpose2d_backward, grad, x, weight, **options_back)
            with tilewise.using(backend="cpu"):
                gradients = kernels.conv_transpose2d_backward(grad, x, weight, **options_back)
            lengths = (case.taps, x.size // case.c, y.size // case.c)
            for actual, right, length in zip(gradients, expected, lengths, strict=True):
                check(actual, right, length, (case, layout, output_padding), dtype)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_with_its_windows(rng, value, layout, dtype):
    """In particular, what a vector loads beyond the end of a row or of the channels reaches nobody."""
    for case in (depthwise(17, 9, 18), depthwise(17, 9, 18, stride=2), depthwise(7, 11, 13, (5, 5), padding=2)):
        x, weight, _ = case.arrays(rng, dtype)
        options = case.options | {"layout": layout}
        x[0, 1, 3, 0] = x[0, 2, 3, case.w - 1] = x[0, 5, 0, 4] = x[0, case.c - 1, case.h - 1, case.w - 1] = value
        y = reference(kernels.conv2d, laid(x, layout), weight, **options)
        grad = laid(rng.standard_normal(nchw(y, layout).shape).astype(dtype), layout)
        with tilewise.using(backend="cpu"):
            check(kernels.conv2d(laid(x, layout), weight, **options), y, case.taps, case, dtype)
            gradients = kernels.conv2d_backward(grad, laid(x, layout), weight, **options)
        expected = reference(kernels.conv2d_backward, grad, laid(x, layout), weight, **options)
        for actual, right in zip(gradients, expected, strict=True):
            check(actual, right, y.size // case.o, case, dtype)
        assert np.isfinite(gradients[0]).all()
        assert np.isnan(gradients[1]).any(axis=(1, 2, 3)).sum() <= 4


@pytest.mark.parametrize("apart", [1, 1000])
def test_a_border_is_copied_only_where_it_is_small(rng, apart):
    """A thread copies at most BORDERED images of the channels that it sums, not all that lies between the taps."""
    case = depthwise(512, 8, 8, padding=apart, dilation=apart)
    x, weight, _ = case.arrays(rng, np.float32, "NHWC")
    taps = [np.arange(3) * apart - apart] * 2
    plan = conv_depthwise_weight.WeightGradient(x.shape, x.shape, weight.shape, taps, (1, 1), "NHWC", x.dtype)
    assert (0 < plan.room <= conv_depthwise_weight.BORDERED * x.size // 4) if apart == 1 else plan.room == 0
    grad = rng.standard_normal(x.shape, dtype=np.float32)
    options = case.options | {"layout": "NHWC", "needs": ("weight",)}
    expected = reference(kernels.conv2d_backward, grad, x, weight, **options)[1]
    with tilewise.using(backend="cpu"):
        check(kernels.conv2d_backward(grad, x, weight, **options)[1], expected, x.size // 512, case)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_for_any_number_of_threads(rng, split_everything, layout, dtype):
    for case in (
        depthwise(96, 28, 28, n=2),
        depthwise(13, 27, 29, stride=2, n=7),
        depthwise(3, 50, 49, (5, 5), padding=2),
        depthwise(2, 60, 40, n=5),
        depthwise(512, 14, 14, n=2),
    ):
        x, weight, bias = case.arrays(rng, dtype, layout)
        options = case.options | {"layout": layout}
        results = []
        for threads in (1, 2, 3):
            with tilewise.using(backend="cpu", threads=threads):
                y = kernels.conv2d(x, weight, bias, **options)
                results.append([y, *kernels.conv2d_backward(y, x, weight, **options)])
        for other in results[1:]:
            assert all(one.tobytes() == more.tobytes() for one, more in zip(results[0], other, strict=True)), case


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_around_the_operands_is_read_or_written(rng, layout):
    """Operands and results inside memory that is full of NaN."""
    for case in (
        depthwise(17, 6, 13),
        depthwise(512, 4, 5),
        depthwise(5, 9, 17, stride=2),
        depthwise(9, 9, 37, stride=2),  # enough planes for row after row, and large ones for it with stride 1
        depthwise(9, 6, 13, stride=2),  # the same, of at most one vector
        depthwise(9, 90, 93),
        depthwise(3, 5, 5, (5, 5), padding=2),
    ):
        around = 64 + case.w * case.c  # more than a row
        x, weight, bias = case.arrays(rng, np.float32, layout)
        options = case.options | {"layout": layout}
        y = reference(kernels.conv2d, x, weight, bias, **options).astype(np.float32)
        grad = rng.standard_normal(y.shape, dtype=np.float32)
        arrays = {"x": x, "y": y, "grad": grad}
        memory = {name: np.full(a.size + 2 * around, np.nan, np.float32) for name, a in arrays.items()}
        inside = {name: memory[name][around:-around].reshape(a.shape) for name, a in arrays.items()}
        inside["x"][...], inside["grad"][...] = x, grad
        with tilewise.using(backend="cpu"):
            kernels.conv2d(inside["x"], weight, bias, **options, out=inside["y"])
            gradients = kernels.conv2d_backward(inside["grad"], inside["x"], weight, **options)
        check(inside["y"], y, case.taps + 1, case)
        assert all(np.isnan(m[:around]).all() and np.isnan(m[-around:]).all() for m in memory.values())
        expected = reference(kernels.conv2d_backward, grad, x, weight, **options)
        for actual, right in zip(gradients, expected, strict=True):
            check(actual, right, y.size // case.o, case)


def test_chosen_where_it_applies():
    x, weight = np.ones((1, 8, 9, 9), np.float32), np.ones((8, 1, 3, 3), np.float32)
    with tilewise.using(backend="cpu"):
        assert explain(kernels.conv2d, x, weight, groups=8).algorithm == "depthwise"
        last = explain(kernels.conv2d, laid(x, "NHWC"), np.ones((16, 1, 3, 3), np.float32), groups=8, layout="NHWC")
    assert "one output channel a group" in last.rejected["depthwise"]


def test_the_cases_reach_every_path():
    """Less than a tile, the code for 3x3 kernels at both strides, several bands, and every way of dealing columns."""
    seen, width = set(), lane_count(4)
    for case in (case for cases in CASES.values() for case in cases):
        pads, stride, dilation = np.array(case.pads()), both(case.stride), both(case.dilation)
        offsets = [np.arange(k) * d - p for k, d, p in zip(case.kernel, dilation, pads[:, 0], strict=True)]
        axes = [[(np.arange(o.size), o)] for o in offsets]
        sizes = zip((case.h, case.w), pads.sum(1), dilation, case.kernel, stride, strict=True)
        size = tuple(int(n + p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sizes)
        strips = conv_depthwise_nchw.Strips(case.n * case.c, size, case.kernel[1], axes, stride, np.dtype("f4"))
        seen |= {("stride", stride[1]), ("square", strips.square, stride[0])}
        seen |= {("bands", strips.constants[1] > 1), ("a tile", size[0] >= TILE)}
        problem = axes, stride, case.o // case.c, (case.h, case.w), size
        # forward and, by the same condition, the weights' gradient
        if conv_depthwise_rows.by_rows(case.n * case.c, *problem, 4):
            if size[1] <= width:
                lengths = "short" if size[1] < width else "one vector"
            else:
                lengths = "whole" if size[1] % width == 0 else "overlapping"
            seen.add(("rows", stride[0], lengths))
        if conv_depthwise_same.is_same(*problem):
            cuts = conv_depthwise_same.channel_cuts(case.n, size, case.c, np.dtype("f4"))
            seen.add(("same", cuts is not None))
        sides = zip(stride, pads[:, 0].tolist(), dilation, case.kernel, (case.h, case.w), strict=True)
        phases = [[conv_transposed._phase(i, s, p, d, k) for i in range(min(s, n))] for s, p, d, k, n in sides]
        transposed = phases, (1, 1), case.o // case.c, size, (case.h, case.w)
        seen.add(("doubled", conv_depthwise_rows.is_doubled(case.n * case.c, *transposed)))
    assert seen >= {("stride", 1), ("stride", 2), ("stride", 3), ("square", 3, 1), ("square", 3, 2), ("square", 0, 1)}
    assert seen >= {("bands", True), ("bands", False), ("a tile", True), ("a tile", False)}
    assert seen >= {("same", True), ("same", False), ("rows", 1, "overlapping")}
    assert seen >= {("rows", 2, "short"), ("rows", 2, "one vector"), ("rows", 2, "whole"), ("rows", 2, "overlapping")}
    assert seen >= {("doubled", True), ("doubled", False)}


@pytest.mark.skipif(not recycling.AVAILABLE, reason="no memory is known to have been used")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_written_past_the_caches_are_the_same(rng, monkeypatch, layout, dtype):
    """The transpose of stride 2 in NCHW; in NHWC the convolution of stride 1, and its transpose."""
    taken = []
    monkeypatch.setattr(conv_depthwise, "is_used", lambda y: taken.append(recycling.is_used(y)) or taken[-1])
    passes = 1 if layout == "NCHW" else 2 * conv_depthwise_same.WHOLE_LINES

    def results(x, weight, grad, options):
        y = kernels.conv2d(x, weight, **options)
        grad_x, *_ = kernels.conv2d_backward(grad, x, weight, needs=("x",), **options)
        return y.copy(), grad_x.copy()  # the originals' memory is free again

    # the last row of x alone, and not; tiles that overlap, and not
    cases = [depthwise(8, 5, 128, stride=2), depthwise(8, 6, 96, stride=2)]
    if layout == "NHWC":
        cases = [depthwise(32, 17, 9), depthwise(48, 16, 8)]
    for case, threads in product(cases, (1, 2)):
        x, weight, _ = case.arrays(rng, dtype, layout)
        options = case.options | {"layout": layout}
        arguments = x, weight, rng.standard_normal(kernels.conv2d(x, weight, **options).shape).astype(dtype), options
        with tilewise.using(backend="cpu", threads=threads):
            kept = results(*arguments)
            with monkeypatch.context() as patch:
                patch.setattr(conv_depthwise_rows, "memory_from", lambda: 1 << 12)
                for module, name in ((recycling, "FROM"), (scratch, "ALIGNED_FROM")):
                    patch.setattr(module, name, 1 << 12)
                operation.forget_plans()
                results(*arguments)
                taken.clear()
                past = results(*arguments)
            operation.forget_plans()
        assert taken.count(True) == passes, case
        for one, other in zip(past, kept, strict=True):
            np.testing.assert_array_equal(one, other)


def test_planes_from_memory_are_taken_row_after_row_from_a_smaller_size_on(rng, monkeypatch, planned_anew):
    """Of 16 to 32 KB: in the caches down their columns."""
    chosen = []
    for module in (conv_depthwise, conv_depthwise_weight):
        monkeypatch.setattr(
            module, "by_rows", lambda *problem: chosen.append(conv_depthwise_rows.by_rows(*problem)) or chosen[-1]
        )
    for dtype, case in ((np.float32, depthwise(9, 70, 71)), (np.float64, depthwise(4, 50, 51, n=2))):
        assert 16 << 10 <= case.h * case.w * np.dtype(dtype).itemsize < 32 << 10
        x, weight, bias = case.arrays(rng, dtype)
        y = reference(kernels.conv2d, x, weight, bias, **case.options)
        grad = rng.standard_normal(y.shape).astype(dtype)
        expected = reference(kernels.conv2d_backward, grad, x, weight, needs=("weight",), **case.options)[1]
        for size, rows in ((1 << 30, False), (0, True)):
            planned_anew(conv_depthwise_rows, "memory_from", lambda size=size: size)
            chosen.clear()
            with tilewise.using(backend="cpu"):
                check(kernels.conv2d(x, weight, bias, **case.options), y, case.taps + 1, case, dtype)
                gradient = kernels.conv2d_backward(grad, x, weight, needs=("weight",), **case.options)[1]
            check(gradient, expected, y.size // case.o, case, dtype)
            assert chosen == [rows, rows], case


@pytest.mark.parametrize(
    ("images", "height", "bands", "wanted"),
    [(1, 14, 10, 7), (1, 7, 8, 4), (1, 4, 4, 2), (1, 17, 8, 8), (1, 56, 25, 14), (1, 112, 98, 28), (8, 14, 10, 4)],
)
def test_bands_of_one_image_are_enough_for_the_threads(monkeypatch, images, height, bands, wanted):
    """Of two tiles where images are many, of one where they are few."""
    monkeypatch.setattr(conv_depthwise_same, "ROWS", 2)
    assert conv_depthwise_same.whole_tiles(images, height, bands) == wanted
    device: Any = conv_depthwise_same._band
    ends = [device.py_func(height, wanted, band) for band in range(wanted)]
    assert [first for first, _ in ends] == [0, *(end for _, end in ends[:-1])]
    assert ends[-1][1] == height
    assert all(first < end and first % 2 == 0 for first, end in ends)
