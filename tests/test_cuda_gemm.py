"""matmul and linear of the GPU backends, executed on the CPU, against the reference: every tile, order and dtype."""

from importlib import import_module

import numpy as np
import pytest
from tolerances import assert_close

import tilewise
from tilewise import kernels

GPU_BACKENDS = ("cuda", "cupy")
FLOATS = [np.float16, np.float32, np.float64]
INTEGERS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]
ORDERS = [(True, True), (True, False), (False, True), (False, False)]
# (m, n, depth) around the tiles' edges, each with what it is for
STRIDED = [(5, 7, 3), (33, 31, 33), (63, 65, 15), (64, 64, 16), (67, 129, 17)]
VECTORS = [
    (32, 32, 32), (36, 28, 36), (8, 8, 8),  # 32 x 32
    (64, 64, 16), (68, 60, 20), (60, 132, 12),  # 64 x 64
    (128, 64, 16), (132, 56, 20), (260, 40, 32),  # 128 x 64
    (128, 128, 16), (124, 132, 12), (132, 124, 36), (256, 72, 4),  # 128 x 128
]  # fmt: skip


def reference(name, *operands, **options):
    with tilewise.using(backend="reference"):
        return getattr(kernels, name)(*operands, **options)


def wide(*arrays):
    return [None if a is None else a.astype(np.float64) for a in arrays]


def random(rng, dtype, *shape):
    return rng.standard_normal(shape).astype(dtype)


def product(gpu, a, b, k_contiguous):
    """a @ b by the GPU's plan, with either operand stored by rows or by columns."""
    from tilewise.kernels.device_arrays import HostPlace
    from tilewise.kernels.gemm_matrices import Matrices

    place, (m, depth), n = HostPlace(gpu), a.shape, b.shape[1]
    left = Matrices(place.copy_in(np.ascontiguousarray(a)), (), m, depth, depth, 1)
    if not k_contiguous[0]:
        left = Matrices(place.copy_in(np.ascontiguousarray(a.T)), (), depth, m, m, 1).transposed()
    right = Matrices(place.copy_in(np.ascontiguousarray(b)), (), depth, n, n, 1)
    if k_contiguous[1]:
        right = Matrices(place.copy_in(np.ascontiguousarray(b.T)), (), n, depth, depth, 1).transposed()
    result = place.empty((m, n), a.dtype)
    import_module(f"tilewise.kernels.{gpu.backend}.gemm").multiply(left, right, (), result)
    return place.copy_out(result)


def launched(gpu, name, dtype):
    """Whether a kernel was launched since it was asked last. name: numba.cuda's and CUDA C++'s."""
    form = name[gpu.backend], np.dtype(dtype).name
    was = form in gpu.launched
    gpu.launched.discard(form)
    return was


# ---------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_strided_tiles(gpu, rng, dtype, order):
    for m, n, depth in STRIDED:
        a, b = random(rng, dtype, m, depth), random(rng, dtype, depth, n)
        assert_close(product(gpu, a, b, order), np.matmul(*wide(a, b)), reduction=depth)


@pytest.fixture
def without_splitting(monkeypatch):
    """float32 by one product each, where CUDA C++ would take three of TF32."""
    monkeypatch.setattr(import_module("tilewise.kernels.cupy.gemm_plan"), "SPLIT_ON", ())


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_vector_tiles(gpu, rng, one_multiprocessor, without_splitting, dtype, order):
    for m, n, depth in VECTORS:
        a, b = random(rng, dtype, m, depth), random(rng, dtype, depth, n)
        assert_close(product(gpu, a, b, order), np.matmul(*wide(a, b)), reduction=depth)


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_asynchronous_copies_change_no_bit(gpu, rng, one_multiprocessor, without_splitting, monkeypatch, order, eager):
    gpu.eager_copies = eager
    by_numba = " ".join("k" if by_k else "row" for by_k in order)
    copied, kept = (", ".join("ALONG_K" if by_k else way for by_k in order) for way in ("COPIED", "ALONG_ROWS"))
    asynchronous = {"cuda": f"matmul 128x128x16 copies {by_numba}", "cupy": f"cupy matmul<T, Big, {copied}>"}
    plain = {"cuda": f"matmul 128x128x16 vectors {by_numba}", "cupy": f"cupy matmul<T, Big, {kept}>"}
    for m, n, depth in ((124, 132, 12), (132, 124, 36), (128, 128, 64)):
        a, b = random(rng, np.float32, m, depth), random(rng, np.float32, depth, n)
        for kernel in (asynchronous, plain):
            launched(gpu, kernel, np.float32)
        y = product(gpu, a, b, order)
        assert launched(gpu, plain if order == (True, True) else asynchronous, np.float32)
        assert_close(y, np.matmul(*wide(a, b)), reduction=depth)
        with monkeypatch.context() as older:
            older.setattr(gpu, "capability", (7, 5))
            np.testing.assert_array_equal(product(gpu, a, b, order), y)
        assert launched(gpu, plain, np.float32)


def test_before_tensor_cores_float16_takes_the_plain_kernels(gpu, rng, one_multiprocessor, monkeypatch):
    """CUDA C++ has them on the oldest device, too, where rows are whole vectors."""
    monkeypatch.setattr(gpu, "capability", (7, 5))
    for m, n, depth, name, tile in (
        (40, 72, 48, "64x64x16 vectors", None),
        (24, 40, 16, "32x32x32 vectors", None),
        (41, 40, 19, "64x64x16 strided", "Small, SINGLY, SINGLY"),
    ):
        kernel = {"cuda": f"matmul {name}", "cupy": f"cupy matmul<T, {tile}>"}
        launched(gpu, kernel, np.float16)
        a, b = random(rng, np.float16, m, depth), random(rng, np.float16, depth, n)
        for order in ORDERS:
            assert_close(product(gpu, a, b, order), np.matmul(*wide(a, b)), reduction=depth)
        assert launched(gpu, kernel, np.float16) == (gpu.backend == "cuda" or tile is not None)


@pytest.mark.parametrize("schedule", ["forward", "reverse", "shuffled", "warp by warp", "warps reversed"])
def test_every_schedule_gives_the_same_bits(gpu, rng, schedule):
    a, b = random(rng, np.float32, 132, 68), random(rng, np.float32, 68, 132)
    for dtype in (np.float32, np.float16):
        gpu.schedule = "forward"
        expected = kernels.matmul(a[:, :64].astype(dtype), b[:64, :128].astype(dtype))
        gpu.schedule = schedule
        np.testing.assert_array_equal(kernels.matmul(a[:, :64].astype(dtype), b[:64, :128].astype(dtype)), expected)


# ------------------------------------------------------------------------------------------------- public functions


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shapes",
    [((3,), (3,)), ((3,), (3, 4)), ((4, 3), (3,)), ((2, 3, 4), (4, 5)), ((3, 4), (2, 4, 5)), ((2, 1, 3, 4), (5, 4, 2)),
     ((2, 1, 3, 1, 3, 4), (1, 2, 1, 2, 4, 3)), ((2, 3, 2, 4), (2, 1, 4, 3)), ((0, 3), (3, 2)), ((2, 0), (0, 3)),
     ((0, 2, 3), (3, 2)), ((2, 3, 4), (4,))],
    ids=str,
)  # fmt: skip
def test_shapes_and_gradients(gpu, rng, shapes, dtype):
    a, b = (random(rng, dtype, *shape) for shape in shapes)
    y = kernels.matmul(a, b)
    assert y.dtype == dtype
    assert_close(y, np.asarray(np.matmul(*wide(a, b))), reduction=a.shape[-1])
    grad = np.asarray(random(rng, dtype, *y.shape))
    ours = kernels.matmul_backward(grad, a, b)
    theirs = reference("matmul_backward", *wide(grad, a, b))
    for got, expected in zip(ours, theirs, strict=True):
        assert got.dtype == dtype
        assert_close(got, expected, reduction=max(grad.size, 1) * 4)
    assert kernels.matmul_backward(grad, a, b, needs=("b",))[0] is None


@pytest.mark.parametrize("dtype", FLOATS)
def test_deep_products_are_split(gpu, rng, dtype):
    for m, n, depth in ((6, 5, 1501), (8, 16, 1600)):
        a, b = random(rng, dtype, m, depth), random(rng, dtype, depth, n)
        y = kernels.matmul(a, b)
        assert_close(y, np.matmul(*wide(a, b)), reduction=depth)
        np.testing.assert_array_equal(kernels.matmul(a, b), y)
        bias, weight = random(rng, dtype, n), np.ascontiguousarray(b.T)
        for activation in ("leaky_relu", "tanh"):
            actual = kernels.linear(a, weight, bias, activation=activation)
            expected = reference("linear", *wide(a, weight, bias), activation=activation)
            size = np.abs(np.matmul(*wide(a, b))).max()
            assert_close(actual, expected, reduction=depth, scale=size)
    assert launched(gpu, {"cuda": "add_parts", "cupy": "cupy add_parts<T>"}, dtype)


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_few_vectors(gpu, rng, dtype, order):
    for big, few, depth in ((9, 1, 33), (17, 4, 512), (8, 3, 264), (1, 1, 1), (300, 2, 2080)):
        a, b = random(rng, dtype, big, depth), random(rng, dtype, depth, few)
        assert_close(product(gpu, a, b, order), np.matmul(*wide(a, b)), reduction=depth)
        assert_close(product(gpu, b.T, a.T, order), np.matmul(*wide(b.T, a.T)), reduction=depth)
    ours = "multiply_few<T, 4, 2, 2>" if any(order) else "multiply_few<T, 1, 1, 4>"
    assert launched(gpu, {"cuda": "multiply_few", "cupy": f"cupy {ours}"}, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_eight_vectors_and_rows_that_lie_side_by_side(gpu, rng, dtype):
    """Beyond the last row, vector and step; in one part and in some."""
    for big, few, depth in ((37, 8, 72), (41, 5, 8 * 520), (264, 7, 24)):
        a, b = random(rng, dtype, big, depth), random(rng, dtype, depth, few)
        assert_close(product(gpu, a, b, (True, True)), np.matmul(*wide(a, b)), reduction=depth)
        assert_close(product(gpu, b.T, a.T, (True, True)), np.matmul(*wide(b.T, a.T)), reduction=depth)
    ours = gpu.backend == "cupy" and dtype != np.float16
    assert launched(gpu, dict.fromkeys(("cuda", "cupy"), "cupy multiply_few<T, 8, 4, 1>"), dtype) == ours
    for big, few, depth in ((264, 1, 131), (264, 3, 1), (304, 4, 72)):
        a, b = random(rng, dtype, big, depth), random(rng, dtype, depth, few)
        assert_close(product(gpu, a, b, (False, True)), np.matmul(*wide(a, b)), reduction=depth)
        assert_close(product(gpu, b.T, a.T, (False, False)), np.matmul(*wide(b.T, a.T)), reduction=depth)
    assert launched(gpu, dict.fromkeys(("cuda", "cupy"), "cupy multiply_few_across<T, 4, 4>"), dtype) == ours
    weight, x, bias = (random(rng, dtype, *s) for s in ((40, 4160), (6, 4160), (40,)))
    expected = reference("linear", *wide(x, weight, bias), activation="relu")
    size = float(np.abs(reference("linear", *wide(x, weight, bias))).max())
    actual = kernels.linear(x, weight, bias, activation="relu")
    assert_close(actual, expected, reduction=4160, scale=size)


@pytest.mark.parametrize("activation", [None, "relu", "relu6", "leaky_relu", "sigmoid", "tanh"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_linear(gpu, rng, dtype, activation):
    for rows, features, outputs in ((1, 1, 1), (2, 17, 33), (9, 24, 3), (33, 40, 72), (65, 24, 8)):
        x, weight, bias = (random(rng, dtype, *s) for s in ((rows, features), (outputs, features), (outputs,)))
        size = float(np.abs(reference("linear", *wide(x, weight, bias))).max())
        for b in (bias, None):
            expected = reference("linear", *wide(x, weight, b), activation=activation)
            y = kernels.linear(x, weight, b, activation=activation)
            assert y.dtype == dtype
            assert_close(y, expected, reduction=features, scale=max(size, 1))
            out = np.full((rows, outputs), np.nan, dtype)
            assert kernels.linear(np.asfortranarray(x), weight, b, activation=activation, out=out) is out
            np.testing.assert_array_equal(out, y)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_linear_backward(gpu, rng, lead, dtype):
    x, weight, grad = random(rng, dtype, *lead, 5), random(rng, dtype, 40, 5), random(rng, dtype, *lead, 40)
    actual = kernels.linear_backward(grad, x, weight)
    for ours, theirs in zip(actual, reference("linear_backward", *wide(grad, x, weight)), strict=True):
        assert ours.dtype == dtype
        assert_close(ours, theirs, reduction=40)
    alone = kernels.linear_backward(grad, x, weight, needs=("bias",))
    assert alone[:2] == (None, None)
    np.testing.assert_array_equal(alone[2], actual[2])


def test_sums_over_many_rows(gpu, rng):
    grad, x, weight = (
        random(rng, np.float32, 1100, 35),
        random(rng, np.float32, 1100, 3),
        random(rng, np.float32, 35, 3),
    )
    for ours, theirs in zip(
        kernels.linear_backward(grad, x, weight), reference("linear_backward", *wide(grad, x, weight)), strict=True
    ):
        assert_close(ours, theirs, reduction=1100)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_are_exact_or_wrap(gpu, rng, dtype):
    limits = np.iinfo(dtype)
    for m, n, depth in ((3, 17, 40), (65, 66, 17), (2, 3, 700)):
        a = rng.integers(limits.min, limits.max, (m, depth), dtype, endpoint=True)
        b = rng.integers(limits.min, limits.max, (depth, n), dtype, endpoint=True)
        np.testing.assert_array_equal(kernels.matmul(a, b), reference("matmul", a, b))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_inf_reach_their_row_and_column_only(gpu, rng, dtype):
    for m, n, depth in ((5, 7, 9), (32, 48, 40), (40, 1, 24), (136, 136, 24)):
        a, b = random(rng, dtype, m, depth), random(rng, dtype, depth, n)
        a[m // 2, depth // 2] = np.nan
        b[depth // 3, n // 2] = np.inf
        a[-1, depth // 3] = 0  # 0 * inf is NaN
        with np.errstate(invalid="ignore"):
            expected = (a.astype(np.float64)[:, :, None] * b.astype(np.float64)[None]).sum(axis=1)
        assert_close(kernels.matmul(a, b), expected, reduction=depth)


def test_more_matrices_than_a_grid_has(gpu, rng, monkeypatch):
    from tilewise.kernels import gemm_plan

    monkeypatch.setattr(gemm_plan, "MOST_MATRICES", 4)
    a, b = random(rng, np.float32, 3, 2, 5, 4), random(rng, np.float32, 3, 1, 4, 6)
    assert_close(kernels.matmul(a, b), np.matmul(*wide(a, b)), reduction=4)
    one_axis = random(rng, np.float32, 9, 5, 4), random(rng, np.float32, 9, 4, 6)  # launches of 4, 4 and 1
    assert_close(kernels.matmul(*one_axis), np.matmul(*wide(*one_axis)), reduction=4)
    axes = random(rng, np.float32, 2, 1, 2, 1, 2, 3), random(rng, np.float32, 1, 2, 1, 2, 3, 2)
    assert_close(kernels.matmul(*axes), np.matmul(*wide(*axes)), reduction=3)


def test_sums_in_more_matrices_than_a_grid_has(gpu, rng, monkeypatch):
    from tilewise.kernels.device_arrays import HostPlace

    place, sum_rows = HostPlace(gpu), import_module(f"tilewise.kernels.{gpu.backend}.gemm").sum_rows
    y = random(rng, np.float32, 3, 5, 40)  # two tiles of columns
    assert_close(place.copy_out(sum_rows(place.copy_in(y))), y.sum(axis=1, dtype=np.float64), reduction=5)
    if hasattr(gpu, "last_blocks"):
        monkeypatch.setattr(gpu, "last_blocks", (2, 1, 1))
    x = random(rng, np.float32, (1 << 16) + 1, 2, 33)[:, :, :1].copy()
    sums = place.copy_out(sum_rows(place.copy_in(x)))
    assert_close(sums[-2:], x[-2:].sum(axis=1, dtype=np.float64), reduction=2)


def test_strided_operands_and_out(gpu, rng):
    a, b = random(rng, np.float32, 12, 20), random(rng, np.float32, 20, 8)
    expected = np.matmul(*wide(a, b))
    assert_close(kernels.matmul(np.asfortranarray(a), b), expected, reduction=20)
    assert_close(kernels.matmul(a[:, ::-1], b[::-1]), expected, reduction=20)
    out = np.full((12, 16), np.nan, np.float32)[:, ::2]
    assert kernels.matmul(a, b, out=out) is out
    assert_close(out, expected, reduction=20)
