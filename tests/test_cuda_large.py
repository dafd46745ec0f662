"""Arrays of more than 2**32 elements: kernels count in 64 bits wherever an index may need them.

The emulator runs the last blocks of each launch, on memory that is zeros but for the operands' ends: there an index of
32 bits goes wrong. All arrays together are larger than the machine, but few of their pages are touched. What the blocks
before would have written is zeros, too, so that sums over everything are right as well.
"""

import math
from importlib import import_module

import numpy as np
import pytest
from simt import installed
from tolerances import assert_close

import tilewise
from tilewise import kernels
from tilewise.kernels import conv_winograd_plan
from tilewise.kernels.device_arrays import DeviceArray, HostPlace

MANY = 1 << 32
HALF, SINGLE = np.dtype(np.float16), np.dtype(np.float32)
ENOUGH = 16  # results that are looked at
MORE = 4096  # of them, so that the last block of kernels whose blocks take turns has the last image
N = None  # an axis as long as it takes for MANY elements
LAST = {"layout": "NHWC"}
WINDOW = {"kernel_size": 3, "padding": 1}
SAME, HALVED = WINDOW | {"stride": 1}, WINDOW | {"stride": 2}
PLANES, ROWS = (N, 2, 8, 16), (N, 8, 8, 16)
CONV = {"padding": 1}

# (name, dtype, shapes of the operands, options): every image, or row, has its own part of the results
OF_IMAGES = [
    ("relu", HALF, [(N, 2048)], {}),
    ("sigmoid_backward", HALF, [(N, 2048)] * 2, {}),
    ("softmax", HALF, [(N, 64)], {}),
    ("softmax", HALF, [(N, 5000)], {}),
    ("softmax", HALF, [(N, 40, 66)], {"axis": 1}),
    ("log_softmax_backward", HALF, [(N, 64)] * 2, {}),
    ("log_softmax_backward", HALF, [(N, 5000)] * 2, {}),
    ("softmax_backward", HALF, [(N, 40, 66)] * 2, {"axis": 1}),
    ("pad", HALF, [PLANES], {"padding": ((1, 2), (3, 0)), "mode": "reflect"}),
    ("max_pool2d", HALF, [(N, 3, 8, 7)], SAME | {"return_indices": True}),
    ("max_pool2d", np.dtype(np.int8), [PLANES], SAME),
    ("max_pool2d", HALF, [PLANES], HALVED),
    ("max_pool2d", HALF, [ROWS], SAME | LAST),
    ("avg_pool2d", HALF, [(N, 3, 8, 7)], SAME),
    ("avg_pool2d", HALF, [PLANES], HALVED),
    ("avg_pool2d", HALF, [ROWS], SAME | LAST),
    ("adaptive_avg_pool2d", HALF, [PLANES], {"output_size": 1}),
    ("adaptive_avg_pool2d", HALF, [ROWS], {"output_size": 1} | LAST),
    ("adaptive_max_pool2d", HALF, [PLANES], {"output_size": (3, 5)}),
    ("batch_norm", HALF, [PLANES, (2,), (2,), (2,), (2,)], {}),
    ("batch_norm", HALF, [ROWS, (16,), (16,), (16,), (16,)], LAST),
    ("conv2d", HALF, [PLANES, (8, 2, 3, 3), (8,)], CONV),
    ("conv2d", HALF, [ROWS, (16, 16, 3, 3), (16,)], CONV | LAST),
    *(
        ("conv2d", SINGLE, [(N, *image), (16, 16, 3, 3), (16,)], CONV | {"algorithm": algorithm} | layout)
        for algorithm in ("direct", "gemm", "winograd")
        for image, layout in (((16, 8, 8), {}), ((8, 8, 16), LAST))
    ),
    ("conv2d", HALF, [(N, 16, 8, 8), (16, 1, 3, 3)], CONV | {"groups": 16}),
    ("conv2d", HALF, [ROWS, (16, 1, 3, 3)], CONV | {"groups": 16} | LAST),
    ("conv_transpose2d", SINGLE, [(N, 8, 6, 6), (8, 8, 3, 3)], {"stride": 2}),
    ("matmul", HALF, [(N, 1024), (1024, 8)], {}),
    ("matmul", SINGLE, [(N, 1024), (1024, 128)], {}),
    ("matmul", SINGLE, [(N, 1023), (1023, 30)], {}),
    ("matmul", np.dtype(np.int8), [(N, 1024), (1024, 8)], {}),
    ("matmul", SINGLE, [(N, 512), (512,)], {}),
    ("matmul", SINGLE, [(N, 512), (512, 640)], {}),
    ("matmul", HALF, [(N, 512), (512, 640)], {}),
    ("matmul", SINGLE, [(N, 160, 12), (N, 12, 160)], {}),
    ("linear", HALF, [(N, 512), (40, 512), (40,)], {"activation": "relu"}),
]  # fmt: skip
# the same for gradients: more arguments after the operands
OF_GRADIENTS = [
    ("max_pool2d_backward", HALF, (N, 3, 8, 7), SAME),
    ("max_pool2d_backward", HALF, ROWS, SAME | LAST),
    ("avg_pool2d_backward", HALF, (N, 3, 8, 7), SAME),
    ("avg_pool2d_backward", HALF, ROWS, SAME | LAST),
    ("pad_backward", HALF, PLANES, {"padding": 0}),
]
# sums over all images: (name, dtype, images' shapes, other shapes, options)
SUMS = [
    ("conv2d_backward", SINGLE, [(N, 8, 8, 8), (N, 1024, 8, 8)], [(8, 1024, 1, 1)], {}),
    ("conv2d_backward", SINGLE, [(N, 8, 8, 8), (N, 8, 8, 1024)], [(8, 1024, 1, 1)], LAST),
    ("conv2d_backward", HALF, [(N, 8, 8, 8), (N, 8, 8, 1024)], [(8, 1024, 1, 1)], LAST),
    ("conv2d_backward", HALF, [(N, 64, 8, 8)] * 2, [(64, 1, 3, 3)], CONV | {"groups": 64}),
    ("linear_backward", SINGLE, [(N, 8), (N, 1024)], [(8, 1024)], {}),
]


class Large(HostPlace):
    """Results stay where they are."""

    def wrap(self, array):
        return array


@pytest.fixture
def place(gpu, monkeypatch):
    if gpu.schedule == "real":
        pytest.skip("needs the emulator's memory")
    monkeypatch.setattr(gpu, "last_blocks", (48, 2, 36))
    return Large(gpu)


def on_host(array: DeviceArray) -> np.ndarray:
    return np.ndarray(array.shape, array.dtype, array.owner.bytes)


def with_end(place, shape, end) -> DeviceArray:
    """Zeros whose last rows are `end`."""
    array = place.empty((length(shape) if shape[0] is N else shape[0], *shape[1:]), end.dtype)
    on_host(array)[len(on_host(array)) - len(end) :] = end
    return array


def end_of(array: DeviceArray) -> np.ndarray:
    return on_host(array).reshape(-1)[-ENOUGH:]


def length(shape) -> int:
    return MANY // math.prod(shape[1:]) + MORE


def random(rng, dtype, *shape):
    if dtype.kind == "i":
        return rng.integers(-100, 100, shape, dtype)
    return (0.1 + rng.random(shape)).astype(dtype)  # a variance must not be negative


def each(result) -> tuple[np.ndarray, ...]:
    return result if isinstance(result, tuple) else (result,)


def reference(name, *operands, **options) -> tuple[np.ndarray, ...]:
    options = {k: v for k, v in options.items() if k != "algorithm"}
    with tilewise.using(backend="reference"):
        return each(getattr(kernels, name)(*operands, **options))


def on_backends(names: str, cases):
    """A test of each case (name, ..., options) on each backend that has it."""
    given = [(backend, *case) for backend in installed.BACKENDS for case in cases]
    return pytest.mark.parametrize(f"gpu, {names}", given, indirect=["gpu"])


on_both = pytest.mark.parametrize("gpu", installed.BACKENDS, indirect=True)


def _whole_where_it_lays_out(gpu):
    """The small right operand of a product, which the last block reads all of."""
    start = gpu.start

    def started(form, *launch):
        with pytest.MonkeyPatch.context() as patched:
            if "lay_out" in form.kernel.name:
                patched.setattr(gpu, "last_blocks", None)
            start(form, *launch)

    return started


@on_backends("name, dtype, shapes, options", OF_IMAGES)
def test_images(place, gpu, rng, monkeypatch, name, dtype, shapes, options):
    if options.get("algorithm") == "winograd":  # in two goes, the second for few images
        of_image = 36 * 4 * 32 * dtype.itemsize
        monkeypatch.setattr(conv_winograd_plan, "_ROOM", (length(shapes[0]) - 2) * of_image)
    # A block of these has more to do, or a launch more blocks.
    if name in ("relu", "sigmoid_backward", "batch_norm", "matmul", "linear"):
        monkeypatch.setattr(gpu, "last_blocks", (1, 1, 1))
        monkeypatch.setattr(gpu, "start", _whole_where_it_lays_out(gpu))
    small = [random(rng, dtype, *(2 if n is N else n for n in shape)) for shape in shapes]
    operands = [
        with_end(place, shape, a) if shape[0] is N else place.copy_in(a) for shape, a in zip(shapes, small, strict=True)
    ]
    expected = reference(name, *small, **options)
    for y, right in zip(each(getattr(kernels, name)(*operands, **options)), expected, strict=True):
        terms = shapes[0][-1] if name in ("matmul", "linear") else 200
        assert_close(end_of(y)[-right.size :], right.ravel()[-ENOUGH:], reduction=terms)


@on_backends("name, dtype, shape, options", OF_GRADIENTS)
def test_gradients_of_images(place, gpu, rng, name, dtype, shape, options):
    grad, images = random(rng, dtype, 2, *shape[1:]), length(shape)
    small, large = [grad], [with_end(place, shape, grad)]
    if "max" in name:
        x = random(rng, dtype, 2, *shape[1:])
        small.append(reference("max_pool2d", x, **options, return_indices=True)[1])
        large.append(with_end(place, shape, small[1]))
    y = getattr(kernels, name)(*large, (images, *shape[1:]), **options)
    assert_close(end_of(y), reference(name, *small, (2, *shape[1:]), **options)[0].ravel()[-ENOUGH:], reduction=9)


@on_backends("name, dtype, shapes, others, options", SUMS)
def test_sums_over_all_images(place, gpu, rng, monkeypatch, name, dtype, shapes, others, options):
    monkeypatch.setattr(gpu, "last_blocks", (1, 1, 1))
    ends = [random(rng, dtype, 2, *shape[1:]) for shape in shapes]
    rest = [random(rng, dtype, *shape) for shape in others]
    images = length(shapes[1])  # grad may be the smaller one
    given = [with_end(place, (images, *shape[1:]), a) for shape, a in zip(shapes, ends, strict=True)]
    _, *actual = getattr(kernels, name)(*given, *map(place.copy_in, rest), **options, needs=("weight", "bias"))
    _, *expected = reference(name, *ends, *rest, **options)
    for y, right in zip(actual, expected, strict=True):
        assert_close(end_of(y)[-1:], right.ravel()[-1:], reduction=1000)


@on_backends("shape, options", [((N, 64, 4, 8), {}), ((N, 4, 8, 64), LAST)])
def test_batch_norm_training(place, gpu, rng, monkeypatch, shape, options):
    monkeypatch.setattr(gpu, "last_blocks", (8, 1, 1))
    channel, axes = (1, (0, 2, 3)) if options == {} else (3, (0, 1, 2))
    end = random(rng, SINGLE, 2, *shape[1:])
    x, zeros = with_end(place, shape, end), np.zeros(64, SINGLE)
    running = place.copy_in(zeros), place.copy_in(zeros)
    y, mean, invstd = kernels.batch_norm(x, *running, training=True, return_stats=True, **options)
    count = x.size // 64
    means = end.sum(axes, np.float64) / count
    deviations = np.sqrt((end.astype(np.float64) ** 2).sum(axes) / count - means**2 + 1e-5)
    assert_close(on_host(mean)[-1:], means.astype(SINGLE)[-1:], reduction=64)
    assert_close(on_host(invstd)[-1:], (1 / deviations).astype(SINGLE)[-1:], reduction=64)
    last = np.take(end, -1, channel)[-1]
    expected = (last - means[-1]) / deviations[-1]
    assert_close(np.take(on_host(y)[-1:], -1, channel)[-1], expected.astype(SINGLE), reduction=64)
    grads = kernels.batch_norm_backward(x, x, mean, invstd, **options)
    assert_close(on_host(grads[2])[-1:], end.sum(axes, np.float64).astype(SINGLE)[-1:], reduction=64)


@on_both
@pytest.mark.parametrize("name", ["sgd_step", "adagrad_step", "rmsprop_step", "adam_step"])
def test_optimisers(place, gpu, rng, monkeypatch, name):
    monkeypatch.setattr(gpu, "last_blocks", (1, 1, 1))
    shape, options = (N, 2048), {"lr": 0.5} | ({"step": 1} if name == "adam_step" else {})
    states = {"sgd_step": 1, "adagrad_step": 2, "rmsprop_step": 2, "adam_step": 3}[name]
    small = [random(rng, SINGLE, 2, *shape[1:]) for _ in range(1 + states)]
    large = [with_end(place, shape, a) for a in small]
    getattr(kernels, name)(*large, **options)
    with tilewise.using(backend="reference"):
        getattr(kernels, name)(*small, **options)
    for array, right in zip(large, small, strict=True):
        assert_close(end_of(array), right.ravel()[-ENOUGH:])


@on_both
def test_strided_operands(place, gpu, rng):
    end = random(rng, HALF, 2, 32)
    x = with_end(place, (N, 32), end)
    turned = DeviceArray(place, x.pointer, (32, x.shape[0]), HALF, x.owner, x.strides[::-1])
    y = import_module(f"tilewise.kernels.{gpu.backend}.copying").contiguous(turned)
    np.testing.assert_array_equal(on_host(y)[-1, -2:], end[:, -1])


@on_both
def test_unpooling(place, gpu, rng):
    shape = (N, 3, 8, 8)
    values = random(rng, HALF, 2, *shape[1:])
    y, indices = reference("max_pool2d", values, kernel_size=2, return_indices=True)
    pooled = (N, 3, 4, 4)
    small = y, indices
    given = [with_end(place, pooled, a) for a in small]
    unpooled = kernels.max_unpool2d(*given, 2)
    assert_close(on_host(unpooled)[-2:], reference("max_unpool2d", *small, 2)[0])
    back = kernels.max_unpool2d_backward(unpooled, given[1])
    assert_close(on_host(back)[-2:], y)


# ---- one plane of so many pixels

PLANE = (1, 1, (MANY >> 15) + 9, 1 << 15)


@on_backends(
    "name, others, options",
    [
        ("max_pool2d", [], SAME | {"return_indices": True}), ("avg_pool2d", [], SAME), ("max_pool2d", [], HALVED),
        ("pad", [], {"padding": 1}),
        *(("conv2d", [(8, 1, 3, 3)], CONV | {"algorithm": a}) for a in ("direct", "gemm", "winograd")),
    ],
)  # fmt: skip
def test_one_plane(place, gpu, rng, monkeypatch, name, others, options):
    monkeypatch.setattr(conv_winograd_plan, "_ROOM", 1 << 50)  # all tiles at once, instead of 650 times three launches
    end, rest = random(rng, SINGLE, 8, 64), [random(rng, SINGLE, *shape) for shape in others]
    x = place.empty(PLANE, SINGLE)
    on_host(x)[0, 0, -8:, -64:] = end
    small = np.zeros((1, 1, 21, 128), SINGLE)  # as the plane's, one more row above: windows begin at even rows
    small[0, 0, -8:, -64:] = end
    expected = reference(name, small, *rest, **options)
    actual = each(getattr(kernels, name)(x, *map(place.copy_in, rest), **options))
    assert_close(on_host(actual[0])[0, -1, -1, -ENOUGH:], expected[0][0, -1, -1, -ENOUGH:], reduction=9)
    if len(actual) > 1:
        index, right = on_host(actual[1])[0, 0, -1, -1], expected[1][0, 0, -1, -1]
        rows, columns = divmod(int(right), 128)
        assert index == (PLANE[2] - 21 + rows) * PLANE[3] + PLANE[3] - 128 + columns


def test_images_whose_pixels_32_bits_cannot_count_leave_tensor_cores(gpu):
    from tilewise.kernels import conv_geometry
    from tilewise.kernels.cuda import conv_tensor

    answers = []
    for shape in ((1, 8, 1 << 16, (1 << 16) - 1), (1, 8, 1 << 16, 1 << 16), (1, 8, 1 << 30, 1)):
        window = {"stride": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1), "groups": 1, "layout": "NCHW"}
        answers.append(conv_tensor.applies(conv_geometry.forward(shape, (8, 8, 1, 1), shape[2:], **window), HALF, gpu))
    assert answers == [True, False, False]
