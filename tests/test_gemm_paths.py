"""Every way the CPU takes through a matrix product: in place, by dot products, in blocks; at the edges of their tiles,
steps and chunks, in all orders of storage, with any number of threads."""

import numpy as np
import pytest
from tolerances import assert_close

import tilewise
from tilewise import kernels
from tilewise.kernels.cpu import conv_pointwise, gemm_plan, threads
from tilewise.kernels.cpu.simd import NV, lane_count

FLOATS = (np.float32, np.float64)

# (M, N, K); the tile has 14 x 32 float32 in AVX-512, 6 x 16 in AVX2
IN_PLACE = [
    (1, 33, 5), (2, 31, 9), (3, 32, 7), (4, 65, 16), (5, 17, 3), (8, 40, 8), (13, 16, 4), (14, 33, 2), (15, 48, 6),
    (16, 15, 11), (17, 64, 10), (28, 97, 30), (30, 20, 31), (113, 21, 20), (63, 70, 95), (64, 40, 47),
]  # fmt: skip
# B too large for the cache: read once, in steps of 16 rows, in chunks of 1024 columns
FEW_ROWS = [(1, 1500, 210), (2, 1024, 129), (3, 1023, 130), (7, 1025, 127), (13, 1056, 145), (16, 2050, 64)]
# a vector by a large matrix: 8 of its rows at a time, 8192 columns a chunk, up to 4 parts of 128 steps or more
VECTOR = [(1, 300, 256), (1, 257, 257), (1, 259, 385), (1, 129, 519), (1, 8192, 263), (1, 8201, 300), (1, 64, 2049)]
# 8 x 3 rows to a tile (AVX2: 4 x 3), 63 to a block, at most a quarter of the columns a chunk, steps of 3072 bytes
DOTS = [
    (1, 3, 16), (2, 2, 17), (3, 4, 15), (4, 5, 33), (7, 62, 31), (8, 63, 84), (9, 64, 100), (11, 253, 40),
    (12, 10, 769), (15, 127, 384), (16, 6, 385), (33, 65, 800), (95, 20, 1537), (96, 30, 50), (97, 8, 70),
    (200, 1, 300), (131, 7, 900), (48, 140, 33), (49, 129, 60), (70, 128, 41), (128, 127, 33),
    (1, 71, 40), (5, 73, 50), (9, 80, 24),
]  # fmt: skip
# 448 rows and 1024 columns a block, 256 steps; from 1024 steps on the sums are collected beside C;
# beyond 512 columns (float32) panels of B are packed together: 8 where a task has so many, as in the last two, or 4
# (AVX2: 4)
BLOCKS = [
    (97, 96, 96), (98, 127, 255), (112, 128, 256), (113, 129, 257), (449, 65, 100), (100, 1030, 97), (99, 70, 1024),
    (98, 33, 1025), (105, 95, 1300), (97, 2100, 100), (64, 1100, 130), (65, 639, 200), (97, 640, 257), (70, 641, 100),
    (100, 2048, 97), (97, 4097, 100),
]  # fmt: skip
# AVX2: both operands packed where A is stored by columns, or the task is of more rows and columns, as in the last two;
# 192 rows of A at a time, 768 a task, panels of B by fours, steps by fours
PACKED = [
    (64, 97, 96), (191, 63, 98), (193, 65, 99), (192, 64, 253), (199, 127, 254), (386, 129, 255), (200, 257, 261),
    (769, 66, 97), (1537, 16, 130), (1000, 1000, 97), (769, 1030, 130),
]  # fmt: skip
# rows a multiple of 2048 bytes apart, give or take less than a line: A is copied, C's sums collected from 513 steps on
ALIASED = [(97, 512, 512), (99, 1039, 513), (113, 1024, 1009), (98, 527, 1025)]
# results of at most 256 x 256 whose sums of at least 2048 steps are split into at most 8 parts of whole 256 steps
PARTS = [
    (17, 40, 2047), (97, 33, 2048), (64, 65, 2049), (98, 256, 2304), (113, 9, 9000), (256, 31, 8193), (105, 47, 10241),
    (257, 33, 2048),
]  # fmt: skip

# few rows, many columns, whole vectors of them: as a convolution by 1x1 kernels, in tiles of 8 x 48 (AVX2: 4 x 24),
# 16 panels of columns a chunk; the sum in one go, beyond 256 steps, too
WIDE = [(65, 2064, 97), (64, 2048, 130), (100, 4112, 30), (64, 2048, 256), (67, 2080, 257), (71, 2048, 640)]
WIDE = [(m, n, min(depth, gemm_plan.WIDE_DEPTH)) for m, n, depth in WIDE]


def stored(array, by_columns):
    return np.asfortranarray(array) if by_columns else array


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("orders", ["rows rows", "columns rows", "rows columns", "columns columns"])
@pytest.mark.parametrize(
    "sizes",
    [IN_PLACE, FEW_ROWS, VECTOR, DOTS, BLOCKS, PACKED, PARTS, ALIASED, WIDE],
    ids=["in place", "few rows", "vector", "dots", "blocks", "packed", "parts", "aliased", "wide"],
)
def test_products_at_the_edges(rng, sizes, orders, dtype):
    a_order, b_order = orders.split()
    for m, n, depth in sizes:
        a, b = rng.standard_normal((m, depth)).astype(dtype), rng.standard_normal((depth, n)).astype(dtype)
        a, b = stored(a, a_order == "columns"), stored(b, b_order == "columns")
        with tilewise.using(backend="cpu", threads=1):
            y = kernels.matmul(a, b)
        try:
            assert_close(y, a.astype(np.float64) @ b.astype(np.float64), reduction=depth)
        except AssertionError as error:
            raise AssertionError(f"M={m}, N={n}, K={depth}: {error}") from None


# with just enough work for two threads; of each way
SHARED = {
    "in place": [(60, 130, 170), (24, 250, 260), (112, 128, 94)],
    "few rows": [(16, 300, 300), (9, 1024, 200)],
    "dots": [(16, 120, 800), (64, 120, 400), (8, 252, 700), (30, 63, 700), (90, 8, 4000)],
    "blocks": [(128, 128, 128), (112, 40, 400), (70, 64, 300), (112, 250, 100), (256, 256, 256)],
    "wide": [(64, 2048, 33), (65, 2064, 40), (64, 4096, 20)],
}


@pytest.mark.parametrize("way", SHARED)
def test_two_threads_find_two_chunks(way):
    """What is launched on threads must not be a single chunk, or the launch is lost."""
    float32 = np.dtype(np.float32)
    for m, n, depth in SHARED[way]:
        work = gemm_plan._work(m, n, depth, 4)
        assert work >= threads.SERIAL_BELOW
        if way == "blocks":
            rows, columns = gemm_plan._shared_blocks(m, n, NV * lane_count(4), 1, work)
        elif way == "dots":
            _, (rows, columns, _) = gemm_plan.dots(m, n, depth, float32)
        elif way == "wide":
            assert gemm_plan.is_wide(m, n, depth, 4)
            geometry, _ = conv_pointwise.plan(1, 1, depth, (1, n), m, (1, 1), 4, 0)
            rows, columns = m, n // geometry[5]
        else:
            assert gemm_plan.fits_in_place(m, n, depth, True, 4)
            _, geometry = gemm_plan.in_place(m, n, depth, True, float32)
            rows, columns = geometry[5], geometry[6]
        chunks = -(-m // rows) * -(-n // columns)
        assert chunks >= 2, (m, n, depth)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_integers_take_the_same_ways(rng, dtype):
    for m, n, depth in (IN_PLACE[8], FEW_ROWS[4], VECTOR[2], DOTS[12], BLOCKS[7], PACKED[4], PARTS[2]):
        a, b = rng.integers(-99, 99, (m, depth), dtype), rng.integers(-99, 99, (depth, n), dtype)
        with tilewise.using(backend="cpu"):
            for left in (a, np.asfortranarray(a)):
                for right in (b, np.asfortranarray(b)):
                    np.testing.assert_array_equal(kernels.matmul(left, right), a @ b)


@pytest.mark.parametrize("sizes", [(100, 70, 99), (65, 33, 2049)], ids=["blocks", "parts"])
def test_what_pads_a_tile_meets_no_infinity(rng, sizes):
    """Panels are padded to whole tiles; 0 * inf would be NaN. In the last row, column and step, as they stand there."""
    m, n, depth = sizes
    a, b = rng.random((m, depth)).astype(np.float32), rng.random((depth, n)).astype(np.float32)
    a[-1, -1] = b[-1, -1] = np.inf
    for left in (a, np.asfortranarray(a)):
        for right in (b, np.asfortranarray(b)):
            with tilewise.using(backend="cpu"):
                y = kernels.matmul(left, right)
            assert np.isposinf(y[-1]).all()
            assert np.isposinf(y[:, -1]).all()
            assert np.isfinite(y[:-1, :-1]).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("swapped", ["", "a", "b", "ab"])
def test_stacks_take_the_same_ways(rng, swapped, dtype):
    for count, m, n, depth in ((70, 16, 16, 16), (3, 17, 33, 9), (2, 130, 20, 200), (5, 1, 40, 30), (3, 150, 170, 20)):
        a, b = (
            rng.standard_normal((count, m, depth)).astype(dtype),
            rng.standard_normal((count, depth, n)).astype(dtype),
        )
        expected = a.astype(np.float64) @ b.astype(np.float64)
        left = np.ascontiguousarray(a.swapaxes(1, 2)).swapaxes(1, 2) if "a" in swapped else a
        right = np.ascontiguousarray(b.swapaxes(1, 2)).swapaxes(1, 2) if "b" in swapped else b
        with tilewise.using(backend="cpu"):
            out = np.full(expected.shape, np.nan, dtype)
            assert kernels.matmul(left, right, out=out) is out
        assert_close(out, expected, reduction=depth)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dense_layers_take_the_same_ways(rng, dtype):
    """Forward with bias and activation, and the three gradients, in one call where they are small."""
    for rows, features, outputs in ((8, 84, 10), (64, 40, 130), (9, 900, 64), (100, 300, 120), (16, 33, 3000)):
        x, weight = (rng.standard_normal((n, features)).astype(dtype) for n in (rows, outputs))
        bias, grad = rng.standard_normal(outputs).astype(dtype), rng.standard_normal((rows, outputs)).astype(dtype)
        exact = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
        with tilewise.using(backend="cpu"):
            y, plain = kernels.linear(x, weight, bias, activation="relu"), kernels.linear(x, weight)
            columns_first = kernels.linear(np.asfortranarray(x), np.asfortranarray(weight), bias, activation="relu")
            grads = kernels.linear_backward(grad, x, weight)
            only_weight = kernels.linear_backward(grad, x, weight, needs=("weight",))
        scale = float(np.abs(exact).max())
        assert_close(y, np.maximum(exact, 0), reduction=features, scale=scale)
        assert_close(columns_first, np.maximum(exact, 0), reduction=features, scale=scale)
        assert_close(plain, exact - bias, reduction=features, scale=scale)
        wide = grad.astype(np.float64)
        assert_close(grads[0], wide @ weight.astype(np.float64), reduction=outputs)
        assert_close(grads[1], wide.T @ x.astype(np.float64), reduction=rows)
        assert_close(grads[2], wide.sum(0), reduction=rows)
        assert only_weight[0] is None
        np.testing.assert_array_equal(only_weight[1], grads[1])


def test_long_sums_of_small_results_take_bias_and_activation(rng):
    x, weight = (rng.standard_normal((n, 2500)).astype(np.float32) for n in (113, 97))
    bias = rng.standard_normal(97).astype(np.float32)
    with tilewise.using(backend="cpu"):
        y = kernels.linear(x, weight, bias, activation="relu")
    exact = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
    assert_close(y, np.maximum(exact, 0), reduction=2500, scale=float(np.abs(exact).max()))


@pytest.mark.parametrize("dtype", FLOATS)
def test_no_way_depends_on_the_thread_count(rng, split_everything, dtype):
    sizes = [IN_PLACE[13], FEW_ROWS[0], FEW_ROWS[5], VECTOR[3], VECTOR[5], DOTS[7], DOTS[12], DOTS[16]]
    sizes += [BLOCKS[4], BLOCKS[5], BLOCKS[8]]
    sizes += [*PARTS[1:], ALIASED[1], *PACKED[6:8], PACKED[-1]]
    operands = [
        (rng.standard_normal((m, depth)).astype(dtype), rng.standard_normal((depth, n)).astype(dtype))
        for m, n, depth in sizes
    ]
    stacks = rng.standard_normal((70, 16, 20)).astype(dtype), rng.standard_normal((70, 20, 17)).astype(dtype)
    wide = [(rng.random((m, depth), dtype), rng.random((depth, n), dtype)) for m, n, depth in (WIDE[2], WIDE[4])]
    results = []
    for count in (1, 2, 3):
        with tilewise.using(backend="cpu", threads=count):
            some = [kernels.matmul(a, np.asfortranarray(b) if i % 2 else b) for i, (a, b) in enumerate(operands)]
            swapped = kernels.matmul(stacks[0], np.ascontiguousarray(stacks[1].swapaxes(1, 2)).swapaxes(1, 2))
            results.append([*some, kernels.matmul(*stacks), swapped, *(kernels.matmul(a, b) for a, b in wide)])
    for other in results[1:]:
        for one, more in zip(results[0], other, strict=True):
            assert one.tobytes() == more.tobytes()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sizes", WIDE, ids=str)
def test_wide_products_are_convolutions_with_the_bits_of_blocks_up_to_their_steps(rng, sizes, dtype):
    m, n, k = sizes
    dtype = np.dtype(dtype)
    assert gemm_plan.is_wide(m, n, k, dtype.itemsize)
    a, b = (rng.standard_normal(shape).astype(dtype) for shape in ((m, k), (k, n)))
    bias, by_blocks = rng.standard_normal(n).astype(dtype), np.empty((m, n), dtype)
    gemm_plan.product_by_blocks(m, n, k, True, True, dtype.itemsize)(a, b, by_blocks, np.empty(0, dtype), 0)
    with tilewise.using(backend="cpu"):
        y, convolved = kernels.matmul(a, b), kernels.conv2d(b.reshape(1, k, 1, n), a.reshape(m, k, 1, 1))
        shifted, bounded = kernels.linear(a, b.T, bias), kernels.linear(a, b.T, activation="relu")
    assert_close(y, a.astype(np.float64) @ b, reduction=k)
    np.testing.assert_array_equal(y, convolved.reshape(m, n))
    if k <= gemm_plan.KC:
        np.testing.assert_array_equal(y, by_blocks)
    # a dense layer's bias and activation are done block by block
    np.testing.assert_array_equal(shifted, by_blocks + bias)
    np.testing.assert_array_equal(bounded, np.maximum(by_blocks, 0))


def test_products_are_wide_within_measured_limits():
    def wide(m, n=8192, depth=gemm_plan.WIDE_DEPTH):
        return gemm_plan.is_wide(m, n, depth, 4)

    rows, depth, columns = gemm_plan.WIDE_ROWS_MOST, gemm_plan.WIDE_DEPTH, gemm_plan.WIDE_COLUMNS
    assert wide(gemm_plan.WIDE_ROWS)
    assert wide(rows, 4 * rows, depth)
    assert wide(64, columns)
    assert not wide(gemm_plan.WIDE_ROWS - 1)
    assert not wide(rows + 1, 8 * rows)
    assert not wide(rows, 3 * rows)
    assert not wide(64, depth=depth + 1)
    assert not wide(64, columns - lane_count(4))
    assert not wide(64, columns + 1)


@pytest.mark.parametrize("itemsize", [4, 8])
def test_chunks_of_a_dense_layers_weight(itemsize):
    """Whole tiles, at least a quarter of them each, and no more pages than are known where they are passed by again."""
    for n in (253, 1000, 1001, 4096, 5000, 11008, 32000):
        for depth in (100, 769, 1024, 4096, 5001, 8192):
            for step in (depth, gemm_plan.STEP_BYTES // itemsize):
                columns = gemm_plan.dot_columns(n, depth, step, itemsize)
                chunks = -(-n // columns)
                assert columns % gemm_plan.COLUMNS == 0
                assert chunks >= 4 or columns <= 4 * gemm_plan.BLOCK
                if step < depth and columns > 4 * gemm_plan.BLOCK:
                    assert columns * depth * itemsize <= gemm_plan.PAGED_BYTES
                # equal shares: the last is short of the others by less than a tile for each chunk
                assert chunks * columns - n < chunks * gemm_plan.COLUMNS


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("depth", [97, 300])
def test_blocks_that_pack_and_blocks_that_do_not_give_the_same_bits(rng, depth, dtype):
    a, b = rng.standard_normal((300, depth)).astype(dtype), rng.standard_normal((depth, 301)).astype(dtype)
    with tilewise.using(backend="cpu", threads=1):
        stayed, packed = kernels.matmul(a, b), kernels.matmul(np.asfortranarray(a), b)
    np.testing.assert_array_equal(stayed, packed)
