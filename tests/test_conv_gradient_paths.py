"""The gradients by columns, and of 1x1 layers over the pixels of all images, around the edges of their blocks. Each
test says that its case reaches the path.
"""

import numba
import numpy as np
import pytest
from conv_cases import FLOATS, LAYOUTS, Case, check, reference

from tilewise import kernels, using
from tilewise.kernels import operation
from tilewise.kernels.cpu import conv_columns, conv_detours, conv_pointwise_weight, conv_transposed, simd
from tilewise.kernels.cpu.simd import CHANNEL_NV, lane_count

# around 8 rows of k, panels of 48 pixels, blocks of rows and of channels
COLUMNS = [
    Case(1, 1, 1, 1, 1, (3, 3), 1, 1),
    Case(2, 3, 23, 25, 33, (7, 7), 2, 3),
    Case(9, 3, 12, 48, 8, (3, 3), 1, 1),  # a block of rows an image
    Case(1, 3, 40, 49, 16, (3, 3), 2, 1),  # several
    Case(2, 6, 14, 14, 17, (5, 5)),
    Case(1, 2, 19, 20, 31, (2, 3), (3, 1), 1),
    Case(1, 2, 13, 50, 9, (3, 3), 1, 2, 2),
    Case(2, 3, 16, 9, 32, (3, 3), 2, ((0, 1), (1, 0))),
    Case(1, 4, 9, 9, 16, (2, 2), 3),  # pixels that no tap meets
    Case(1, 120, 16, 33, 17, (3, 3), 2, 1),  # NCHW: channels in blocks
    Case(1, 3, 5, 400, 16, (3, 3), 1, 1),  # rows longer than the pixels at a time
]
# around panels of 48 channels, blocks of 64 outputs, steps of 144 pixels
POINTWISE = [
    Case(1, 1, 1, 1, 1, (1, 1)),
    Case(3, 47, 7, 7, 65, (1, 1)),
    Case(2, 49, 9, 16, 63, (1, 1)),
    Case(1, 97, 1, 145, 9, (1, 1)),
    Case(2, 17, 30, 40, 33, (1, 1)),  # pieces of 512 pixels
    Case(2, 20, 13, 15, 49, (1, 1), 2),
    Case(1, 16, 17, 33, 8, (1, 1), (3, 2)),
    Case(2, 15, 40, 38, 130, (1, 1), 2),
    # one row of output in pieces of columns; the last is shorter than what a square of pixels reaches
    Case(1, 16, 1, 1041, 16, (1, 1), 2),
    Case(1, 16, 2, 530, 16, (1, 1), (2, 1)),
]


def arrays(rng, case, dtype, layout):
    x, weight, _ = case.arrays(rng, dtype, layout)
    shape = reference(kernels.conv2d, x, weight, **case.options, layout=layout).shape
    return rng.standard_normal(shape).astype(dtype), x, weight


def watched(monkeypatch, owner, name):
    """Calls of owner.name, which still does its work."""
    calls, function = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: (calls.append(args), function(*args))[1])
    operation.forget_plans()
    return calls


def compare(case, dtype, layout, grad, x, weight):
    options = case.options | {"layout": layout}
    expected = reference(kernels.conv2d_backward, grad, x, weight, **options)
    grads = kernels.conv2d_backward(grad, x, weight, **options)
    sums = case.o * weight[0, 0].size, grad.size // case.o, grad.size // case.o
    for ours, theirs, length in zip(grads, expected, sums, strict=True):
        check(ours, theirs, length, (case, layout), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", COLUMNS, ids=str)
def test_input_gradient_by_columns(rng, monkeypatch, case, layout, dtype):
    monkeypatch.setitem(conv_columns.FEW_CHANNELS, (layout, case.stride != 1), case.c)
    monkeypatch.setattr(conv_columns, "JOINED_PIXELS", 0)
    check_by_columns(rng, monkeypatch, case, layout, dtype, "plan")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("images", [1, 2, 100])  # whose columns are taken together
@pytest.mark.parametrize("case", COLUMNS, ids=str)
def test_input_gradient_by_columns_of_joined_images(rng, monkeypatch, case, images, dtype):
    monkeypatch.setitem(conv_columns.FEW_CHANNELS, ("NCHW", case.stride != 1), case.c)
    monkeypatch.setattr(conv_columns, "JOINED_PIXELS", 1 << 30)
    monkeypatch.setattr(conv_columns, "JOINED_CHANNELS", 0)
    grad = arrays(rng, case, dtype, "NCHW")[0]
    columns = case.c * case.kernel[0] * case.kernel[1] * grad[0, 0].nbytes
    monkeypatch.setattr(conv_columns, "JOINED_BYTES", images * columns)
    check_by_columns(rng, monkeypatch, case, "NCHW", dtype, "product_by_blocks")


def check_by_columns(rng, monkeypatch, case, layout, dtype, called):
    """`called`: the name in conv_columns of what must have been called."""
    monkeypatch.setattr("tilewise.kernels.cpu.conv_transposed.DIRECT_BELOW", 0)
    calls = watched(monkeypatch, conv_columns, called)
    grad, x, weight = arrays(rng, case, dtype, layout)
    compare(case, dtype, layout, grad, x, weight)
    assert calls
    bias = rng.standard_normal(case.c).astype(dtype)
    options = case.options | {"layout": layout}
    result = kernels.conv_transpose2d(grad, weight, bias, **options)
    expected = reference(kernels.conv_transpose2d, grad, weight, bias, **options)
    check(result, expected, case.o * weight[0, 0].size, (case, layout, "transposed"), dtype)
    operation.forget_plans()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [8, 9, 16])
def test_channels_that_fill_a_vector_of_nhwc_go_by_the_convolution(rng, monkeypatch, channels, dtype):
    calls = watched(monkeypatch, conv_columns, "plan")
    case = Case(2, channels, 9, 11, 32, (5, 5), 1, 2)
    compare(case, dtype, "NHWC", *arrays(rng, case, dtype, "NHWC"))
    assert bool(calls) == (channels <= 8)
    operation.forget_plans()


STRIDED = [
    Case(5, 20, 13, 15, 49, (1, 1), 2),
    Case(1, 16, 17, 33, 8, (1, 1), (3, 2)),
    Case(2, 12, 8, 10, 30, (1, 1), (2, 1), groups=2),
]
# padding below or to the right: grad has pixels that result has not
STRIDED_BEYOND = [
    Case(2, 12, 8, 10, 30, (1, 1), 2, ((0, 1), (0, 1))),
    Case(2, 12, 9, 10, 30, (1, 1), (2, 1), ((0, 0), (0, 1))),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("at_once", [0, 1 << 30])
@pytest.mark.parametrize("case", STRIDED, ids=str)
def test_input_gradient_of_strided_1x1(rng, monkeypatch, case, at_once, dtype):
    """A dense image whose pixels are set apart: of the whole batch, and in parts."""
    monkeypatch.setattr(conv_detours, "COPIES", at_once)
    calls = watched(monkeypatch, conv_detours.PointwiseSpread, "__call__")
    grad, x, weight = arrays(rng, case, dtype, "NCHW")
    compare(case, dtype, "NCHW", grad, x, weight)
    assert len(calls) == (1 if at_once else -(-case.n // max(1, case.n // 2)))
    bias = rng.standard_normal(case.c).astype(dtype)
    result = kernels.conv_transpose2d(grad, weight, bias, **case.options)
    expected = reference(kernels.conv_transpose2d, grad, weight, bias, **case.options)
    check(result, expected, case.o, case, dtype)
    operation.forget_plans()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", STRIDED_BEYOND, ids=str)
def test_input_gradient_of_strided_1x1_with_padding_behind(rng, monkeypatch, case, dtype):
    calls = watched(monkeypatch, conv_detours.PointwiseSpread, "__call__")
    compare(case, dtype, "NCHW", *arrays(rng, case, dtype, "NCHW"))
    assert calls == []


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", POINTWISE, ids=str)
@pytest.mark.parametrize("pieces", [1, 3, 1000])
def test_weight_gradient_of_1x1(rng, monkeypatch, case, layout, dtype, pieces):
    """Also with so few pieces of pixels in a part."""
    width = CHANNEL_NV * lane_count(np.dtype(dtype).itemsize)
    piece = np.dtype(dtype).itemsize * (-(-case.c // width) * width + case.o + 16) * conv_pointwise_weight.PIECE
    monkeypatch.setattr(conv_pointwise_weight, "SMALL_BYTES", pieces * piece)
    calls = watched(monkeypatch, conv_pointwise_weight, "plan")
    grad, x, weight = arrays(rng, case, dtype, layout)
    compare(case, dtype, layout, grad, x, weight)
    assert calls
    operation.forget_plans()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", [POINTWISE[1], POINTWISE[4]], ids=str)
def test_input_gradient_of_large_1x1_layers(rng, monkeypatch, case, dtype):
    monkeypatch.setattr(conv_transposed, "LARGE", 0)
    monkeypatch.setattr(conv_transposed, "DIRECT_BELOW", 0)
    calls = watched(monkeypatch, conv_transposed, "prepare_pass")
    compare(case, dtype, "NHWC", *arrays(rng, case, dtype, "NHWC"))
    assert calls
    operation.forget_plans()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", POINTWISE[1:], ids=str)
def test_weight_gradient_of_1x1_by_shares_of_the_pixels(rng, monkeypatch, split_everything, case, layout, dtype):
    """Three shares of pieces that differ in number, and the last piece of an image in its pixels."""
    monkeypatch.setattr(conv_pointwise_weight, "SHARES", 3)
    monkeypatch.setattr(conv_pointwise_weight, "PIECE", 19)
    monkeypatch.setattr(conv_pointwise_weight, "SHARE_PIXELS", 1)
    calls, plan = watched(monkeypatch, conv_pointwise_weight, "plan"), conv_pointwise_weight.plan
    grad, x, weight = arrays(rng, case, dtype, layout)
    compare(case, dtype, layout, grad, x, weight)
    assert plan(*calls[0])[14] == 3
    options = case.options | {"layout": layout}
    both = kernels.conv2d_backward(grad, x, weight, **options, needs=("weight", "bias"))[1:]
    for i, name in enumerate(("weight", "bias"), 1):
        for threads in (1, 2):
            with using(threads=threads):
                alone = kernels.conv2d_backward(grad, x, weight, **options, needs=(name,))[i]
            assert alone.tobytes() == both[i - 1].tobytes()
    operation.forget_plans()


@pytest.mark.parametrize(
    ("n", "channels", "outputs", "size", "shared"),
    [
        (64, 96, 24, 12, True),
        (64, 96, 24, 1, False),  # 64 products of one pixel
        (64, 96, 24, 11, False),
        (15, 96, 24, 12, False),
        (64, 512, 64, 12, True),
        (64, 8192, 4, 12, False),  # 5 MB a thread
        (64, 96, 512, 12, False),
    ],
)
def test_shares_have_many_pixels_and_little_memory(n, channels, outputs, size, shared):
    plan = conv_pointwise_weight.plan(n, channels, (size, size), outputs, (size, size), (1, 1), False, 4)
    assert (plan[14] > 1) == shared


@numba.njit
def packed(source, start, plane, w, row_step, stride, rows, columns, stage, panels):
    width = simd.lanes(source)
    conv_pointwise_weight._pack_strided_planes(
        source, start, plane, width, w, row_step, stride, rows, columns, 0, width, stage, panels
    )


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 16, 17, 18, 33])
def test_strided_pixels_keep_to_their_row_and_stage(rng, stride, columns):
    """What lies left of the columns' end in the row: nothing, or more pixels for the pieces that follow."""
    width, rows = lane_count(8), 2
    for more in (0, stride - 1, stride * 40):
        w = (columns - 1) * stride + 1 + more
        source = np.full((width, rows, w), np.nan)
        source[:, :, ::stride] = rng.standard_normal((width, rows, -(-w // stride)))
        memory = np.full((columns + 1 + 2 * width) * width, np.nan)
        memory[(columns + 1) * width :] = 7  # what lies behind the stage
        panels = np.empty(rows * columns * width)
        packed(source.ravel(), 0, rows * w, w, w, stride, rows, columns, memory[: (columns + 1) * width], panels)
        wanted = source[:, :, ::stride][:, :, :columns].transpose(1, 2, 0)
        np.testing.assert_array_equal(panels.reshape(wanted.shape), wanted)
        assert (memory[(columns + 1) * width :] == 7).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "case",
    [
        COLUMNS[1],
        COLUMNS[9],
        POINTWISE[4],
        POINTWISE[7],
        Case(3, 20, 12, 13, 24, (3, 3), 1, 1),
        Case(3, 4, 9, 9, 5),
        Case(5, 40, 4, 4, 300, (3, 3), 2, 1),
    ],
    ids=str,
)
def test_same_bits_alone_together_and_for_any_number_of_threads(rng, split_everything, case, layout):
    grad, x, weight = arrays(rng, case, np.float32, layout)
    options = case.options | {"layout": layout}
    together = kernels.conv2d_backward(grad, x, weight, **options)
    for i, name in enumerate(("x", "weight", "bias")):
        for threads in (1, 2, 3):
            with using(threads=threads):
                alone = kernels.conv2d_backward(grad, x, weight, **options, needs=(name,))[i]
            assert alone.tobytes() == together[i].tobytes(), name
