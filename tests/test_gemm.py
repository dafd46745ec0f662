"""matmul and linear: the reference against PyTorch and the definition, the CPU kernels against float64, gradients,
strides, integers, NaN, thread counts."""

import numpy as np
import pytest
from gradcheck import assert_gradient, numerical_gradient
from tolerances import assert_close

import tilewise
from tilewise import kernels

FLOATS = (np.float32, np.float64)
INTEGERS = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64)
ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", "sigmoid", "tanh")

# (M, N, K) around the micro-kernel's rows (6, 14), its vectors (16, 32, 48) and the blocks (256, 384)
SIZES = [
    (1, 1, 1), (1, 1, 257), (1, 15, 1), (1, 33, 7), (2, 16, 3), (5, 17, 2), (6, 16, 31), (7, 15, 33), (13, 31, 5),
    (14, 32, 16), (15, 33, 17), (27, 47, 13), (28, 48, 11), (29, 49, 9), (37, 1, 19), (41, 2, 8), (3, 53, 255),
    (16, 48, 256), (17, 47, 257), (14, 32, 383), (12, 33, 384), (13, 16, 385), (255, 16, 6), (256, 17, 5),
    (257, 33, 14), (383, 5, 15), (384, 7, 16), (385, 3, 3), (6, 255, 4), (8, 256, 9), (9, 257, 10), (11, 383, 2),
    (10, 384, 12), (19, 385, 1), (100, 97, 101), (150, 130, 300), (1, 300, 300), (300, 1, 300), (4, 260, 390),
]  # fmt: skip

# shapes of a and b as np.matmul takes them
SHAPES = [
    ((3,), (3,)), ((3,), (3, 4)), ((5, 3), (3,)), ((5, 3), (3, 4)), ((2, 5, 3), (3, 4)), ((5, 3), (2, 3, 4)),
    ((2, 5, 3), (2, 3, 4)), ((2, 1, 5, 3), (4, 3, 6)), ((1, 5, 3), (7, 3, 4)), ((7, 5, 3), (1, 3, 4)),
    ((3,), (2, 3, 4)), ((2, 5, 3), (3,)), ((2, 3, 1, 6), (1, 3, 6, 1)), ((2, 1, 3, 4, 5), (6, 1, 5, 2)),
    ((0, 3), (3, 4)), ((5, 0), (0, 4)), ((5, 3), (3, 0)), ((0, 5, 3), (3, 4)), ((2, 5, 0), (2, 0, 4)), ((0,), (0,)),
]  # fmt: skip


def wide(array):
    return None if array is None else array.astype(np.float64)


def expected_linear(x, weight, bias=None, **options):
    """The reference's result in float64."""
    with tilewise.using(backend="reference"):
        return kernels.linear(wide(x), wide(weight), wide(bias), **options)


# ------------------------------------------------------------------------------------------- the reference is right


def test_naive_matmul_is_the_reference(rng):
    a, b = rng.standard_normal((4, 3)), rng.standard_normal((3, 5))
    from tilewise.kernels.reference import gemm

    assert_close(gemm.matmul_naive(a, b), gemm.matmul(a, b), reduction=3)
    a, b = rng.integers(-128, 128, (3, 4), np.int8), rng.integers(-128, 128, (4, 2), np.int8)
    np.testing.assert_array_equal(gemm.matmul_naive(a, b), gemm.matmul(a, b))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_reference_matmul_is_pytorchs(torch, rng, shapes, dtype):
    a, b = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    theirs = [torch.from_numpy(array).requires_grad_() for array in (a, b)]
    expected = torch.matmul(*theirs)
    grad = rng.standard_normal(tuple(expected.shape)).astype(dtype)
    grad = np.asarray(grad)
    expected.backward(torch.from_numpy(grad))
    with tilewise.using(backend="reference"):
        assert_close(kernels.matmul(a, b), expected.detach().numpy(), reduction=a.shape[-1])
        grads = kernels.matmul_backward(grad, a, b)
    for ours, tensor in zip(grads, theirs, strict=True):
        assert_close(ours, tensor.grad.numpy(), reduction=grad.size // max(ours.size, 1) * 8)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3), (0,), (2, 0, 3)], ids=str)
def test_reference_linear_is_pytorchs(torch, rng, lead, activation, dtype):
    x, weight, bias = (rng.standard_normal(s).astype(dtype) for s in ((*lead, 5), (4, 5), (4,)))
    theirs = [torch.from_numpy(array).requires_grad_() for array in (x, weight, bias)]
    raw = torch.nn.functional.linear(*theirs)
    apply = (lambda y: y) if activation is None else getattr(torch.nn.functional, activation)
    grad = rng.standard_normal(tuple(raw.shape)).astype(dtype)
    raw.backward(torch.from_numpy(grad))
    with tilewise.using(backend="reference"):
        y = kernels.linear(x, weight, bias, activation=activation)
        bare = kernels.linear(x, weight)
        grads = kernels.linear_backward(grad, x, weight)
    assert_close(y, apply(raw).detach().numpy(), reduction=5, scale=4.0)
    assert_close(bare, (raw - theirs[2]).detach().numpy(), reduction=5, scale=4.0)
    for ours, tensor in zip(grads, theirs, strict=True):
        assert_close(ours, tensor.grad.numpy(), reduction=16)


# ------------------------------------------------------------------------------- the CPU kernels against the reference


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("transposed", ["", "a", "b", "ab"])
def test_cpu_matmul_around_tile_edges(rng, transposed, dtype):
    for m, n, depth in SIZES:
        a = rng.standard_normal((depth, m) if "a" in transposed else (m, depth)).astype(dtype)
        b = rng.standard_normal((n, depth) if "b" in transposed else (depth, n)).astype(dtype)
        a, b = a.T if "a" in transposed else a, b.T if "b" in transposed else b
        with tilewise.using(backend="cpu"):
            y = kernels.matmul(a, b)
        assert y.dtype == dtype
        assert y.flags.c_contiguous
        try:
            assert_close(y, wide(a) @ wide(b), reduction=depth)
        except AssertionError as error:
            raise AssertionError(f"M={m}, N={n}, K={depth}: {error}") from None


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_cpu_matmul_broadcasts(rng, shapes, dtype):
    a, b = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    product = np.asarray(np.matmul(wide(a), wide(b)))
    grad = np.asarray(rng.standard_normal(product.shape).astype(dtype))
    with tilewise.using(backend="reference"):
        expected = kernels.matmul_backward(wide(grad), wide(a), wide(b))
    with tilewise.using(backend="cpu"):
        y, out = kernels.matmul(a, b), np.full(product.shape, np.nan, dtype)
        assert kernels.matmul(a, b, out=out) is out
        grads = kernels.matmul_backward(grad, a, b)
    assert isinstance(y, np.ndarray)
    assert_close(y, product, reduction=a.shape[-1])
    np.testing.assert_array_equal(out, y)
    for ours, theirs in zip(grads, expected, strict=True):
        assert ours.dtype == dtype
        assert_close(ours, theirs, reduction=grad.size // max(ours.size, 1) * 8)


def views(array):
    """The same values as other memory: reversed, every other one, with a gap between rows, read-only, misaligned."""
    spread = np.zeros([2 * n for n in array.shape], array.dtype)
    spread[tuple(slice(None, None, 2) for _ in array.shape)] = array
    gap = np.zeros((*array.shape[:-1], array.shape[-1] + 3), array.dtype)
    gap[..., : array.shape[-1]] = array
    raw = np.zeros(array.nbytes + 1, np.uint8)
    misaligned = raw[1:].view(array.dtype).reshape(array.shape)
    misaligned[...] = array
    frozen = array.copy()
    frozen.flags.writeable = False
    return {
        "reversed": np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1],
        "every other": spread[tuple(slice(None, None, 2) for _ in array.shape)],
        "gap": gap[..., : array.shape[-1]],
        "columns first": np.asfortranarray(array),
        "read-only": frozen,
        "read-only columns first": np.asfortranarray(frozen),
        "one row repeated": np.broadcast_to(array[:1], array.shape),
        "misaligned": misaligned,
    }


@pytest.mark.parametrize("dtype", [*FLOATS, np.int32, np.int8])
def test_any_strides_give_the_bits_of_contiguous_operands(backend, rng, dtype):
    for m, n, depth in ((3, 5, 7), (33, 50, 20), (1, 9, 30), (40, 1, 12)):
        a = rng.integers(-9, 9, (m, depth)).astype(dtype) if np.dtype(dtype).kind == "i" else None
        b = rng.integers(-9, 9, (depth, n)).astype(dtype) if a is not None else None
        if a is None:
            a, b = rng.standard_normal((m, depth)).astype(dtype), rng.standard_normal((depth, n)).astype(dtype)
        for name, view in views(a).items():
            before = view.copy()
            exact = kernels.matmul(np.ascontiguousarray(view), b)
            assert_close(kernels.matmul(view, b), exact, reduction=depth)
            np.testing.assert_array_equal(view, before, err_msg=f"{name} a was changed")
        for view in views(b).values():
            assert_close(kernels.matmul(a, view), kernels.matmul(a, np.ascontiguousarray(view)), reduction=depth)


def test_sliced_and_swapped_stacks(backend, rng):
    a, b = rng.standard_normal((4, 9, 6)), rng.standard_normal((4, 6, 10))
    expected = a @ b
    assert_close(kernels.matmul(a, b), expected, reduction=6)
    swapped = np.ascontiguousarray(a.swapaxes(1, 2)).swapaxes(1, 2)
    assert_close(kernels.matmul(swapped, b), expected, reduction=6)
    assert_close(kernels.matmul(a, np.ascontiguousarray(b.swapaxes(1, 2)).swapaxes(1, 2)), expected, reduction=6)
    assert_close(kernels.matmul(a[::2], b[1::2]), a[::2] @ b[1::2], reduction=6)
    assert_close(kernels.matmul(a[:, ::3], b[:, :, 1::2]), a[:, ::3] @ b[:, :, 1::2], reduction=6)
    assert_close(kernels.matmul(np.broadcast_to(a[:1], a.shape), b), a[:1] @ b, reduction=6)
    moved = np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 0, 2)), 2, 0)
    assert_close(kernels.matmul(moved, b), expected, reduction=6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_cpu_linear(rng, dtype, activation):
    for rows, features, outputs in ((1, 1, 1), (1, 17, 33), (2, 400, 120), (15, 31, 10), (33, 257, 16), (64, 84, 10)):
        x, weight, bias = (
            rng.standard_normal(s).astype(dtype) for s in ((rows, features), (outputs, features), (outputs,))
        )
        for b in (bias, None):
            expected = expected_linear(x, weight, b, activation=activation)
            with tilewise.using(backend="cpu"):
                y = kernels.linear(x, weight, b, activation=activation)
                out = np.full((rows, outputs), np.nan, dtype)
                assert kernels.linear(x, weight, b, activation=activation, out=out) is out
                strided = kernels.linear(
                    np.asfortranarray(x), weight.T.copy().T, None if b is None else np.repeat(b, 2)[::2],
                    activation=activation,
                )  # fmt: skip
            assert y.dtype == dtype
            size = float(np.abs(expected_linear(x, weight, b)).max())
            assert_close(y, expected, reduction=features, scale=size)
            np.testing.assert_array_equal(out, y)
            assert_close(strided, expected, reduction=features, scale=size)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,), (2, 0, 3)], ids=str)
def test_linear_takes_any_leading_axes(backend, rng, lead):
    x, weight, bias = rng.standard_normal((*lead, 5)), rng.standard_normal((4, 5)), rng.standard_normal(4)
    y = kernels.linear(x, weight, bias)
    assert_close(y, x @ weight.T + bias, reduction=5)
    grad = rng.standard_normal(y.shape)
    grads = kernels.linear_backward(grad, x, weight)
    assert [g.shape for g in grads] == [x.shape, weight.shape, bias.shape]
    assert_close(grads[2], grad.reshape(-1, 4).sum(0), reduction=6)


@pytest.mark.parametrize("dtype", FLOATS)
def test_cpu_linear_backward(rng, dtype):
    for rows, features, outputs in ((1, 1, 1), (1, 17, 33), (2, 257, 12), (15, 31, 10), (33, 6, 300), (300, 33, 14)):
        x, weight, grad = (
            rng.standard_normal(s).astype(dtype) for s in ((rows, features), (outputs, features), (rows, outputs))
        )
        with tilewise.using(backend="reference"):
            expected = kernels.linear_backward(wide(grad), wide(x), wide(weight))
        with tilewise.using(backend="cpu"):
            actual = kernels.linear_backward(grad, x, weight)
        for ours, theirs, length in zip(actual, expected, (outputs, rows, rows), strict=True):
            assert ours.dtype == dtype
            assert_close(ours, theirs, reduction=length)


# --------------------------------------------------------------------------------------------------------- integers


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_are_exact_or_wrap(backend, rng, dtype):
    limits = np.iinfo(dtype)
    for m, n, depth in ((1, 1, 1), (3, 17, 40), (15, 33, 129), (1, 40, 20), (40, 1, 20)):
        a = rng.integers(limits.min, limits.max, (m, depth), dtype, endpoint=True)
        b = rng.integers(limits.min, limits.max, (depth, n), dtype, endpoint=True)
        y = kernels.matmul(a, b)
        assert y.dtype == (np.int32 if np.dtype(dtype).itemsize == 1 else dtype)
        expected = a.astype(object) @ b.astype(object)  # Python's integers
        span = np.iinfo(y.dtype)
        expected = (expected - int(span.min)) % (1 << span.bits) + int(span.min)
        np.testing.assert_array_equal(y, expected.astype(y.dtype))


def test_bytes_do_not_wrap(backend):
    y = kernels.matmul(np.full((2, 300), -128, np.int8), np.full((300, 2), -128, np.int8))
    assert (y == 300 * 128 * 128).all()
    y = kernels.matmul(
        np.full((2, 300), 255, np.uint8), np.full((300, 2), 255, np.uint8), out=np.zeros((2, 2), np.int32)
    )
    assert (y == 300 * 255 * 255).all()


def test_integer_stacks_and_vectors(backend, rng):
    a, b = rng.integers(-9, 9, (2, 1, 4, 5), np.int32), rng.integers(-9, 9, (3, 5, 6), np.int32)
    np.testing.assert_array_equal(kernels.matmul(a, b), a @ b)
    np.testing.assert_array_equal(kernels.matmul(a[0, 0], b[0, :, 0]), a[0, 0] @ b[0, :, 0])
    assert int(kernels.matmul(a[0, 0, 0], b[0, :, 0])) == int(a[0, 0, 0] @ b[0, :, 0])


# -------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("shapes", [s for s in SHAPES if 0 not in s[0] + s[1]], ids=str)
def test_matmul_gradients(backend, rng, shapes):
    a, b = (rng.standard_normal(shape) for shape in shapes)
    grad = np.asarray(rng.standard_normal(np.matmul(a, b).shape))
    grad_a, grad_b = kernels.matmul_backward(grad, a, b)
    assert_gradient(grad_a, numerical_gradient(lambda v: kernels.matmul(v, b), a, grad))
    assert_gradient(grad_b, numerical_gradient(lambda v: kernels.matmul(a, v), b, grad))
    only_a, nothing = kernels.matmul_backward(grad, a, b, needs=("a",))
    assert nothing is None
    np.testing.assert_array_equal(only_a, grad_a)
    nothing, only_b = kernels.matmul_backward(grad, a, b, needs=["b"])
    assert nothing is None
    np.testing.assert_array_equal(only_b, grad_b)


def test_linear_gradients(backend, rng):
    x, weight, bias = rng.standard_normal((2, 3, 4)), rng.standard_normal((5, 4)), rng.standard_normal(5)
    grad = rng.standard_normal((2, 3, 5))
    grads = kernels.linear_backward(grad, x, weight)
    assert_gradient(grads[0], numerical_gradient(lambda v: kernels.linear(v, weight, bias), x, grad))
    assert_gradient(grads[1], numerical_gradient(lambda v: kernels.linear(x, v, bias), weight, grad))
    assert_gradient(grads[2], numerical_gradient(lambda v: kernels.linear(x, weight, v), bias, grad))
    for name, index in (("x", 0), ("weight", 1), ("bias", 2)):
        alone = kernels.linear_backward(grad, x, weight, needs=(name,))
        assert [g is not None for g in alone] == [i == index for i in range(3)]
        np.testing.assert_array_equal(alone[index], grads[index])


def test_least_squares_of_the_lecture(backend):
    """Hours (2, 4, 6, 8), marks (81, 93, 91, 97): y = 2.3 x + 79 predicts 83.6, 88.2, 92.8, 97.4."""
    hours = np.array([[2.0], [4.0], [6.0], [8.0]])
    y = kernels.linear(hours, np.array([[2.3]]), np.array([79.0]))
    assert_close(y[:, 0], np.array([83.6, 88.2, 92.8, 97.4]))
    grad = y - np.array([[81.0], [93.0], [91.0], [97.0]])
    _, grad_weight, grad_bias = kernels.linear_backward(grad, hours, np.array([[2.3]]))
    assert abs(grad_weight.item()) < 1e-10  # the least squares are a minimum
    assert abs(grad_bias.item()) < 1e-10


# -------------------------------------------------------------------------------------------- what is not a number


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_inf_reach_their_row_and_column_only(backend, rng, dtype):
    for m, n, depth in ((5, 7, 9), (33, 50, 40), (1, 33, 12), (40, 1, 30)):
        a, b = rng.standard_normal((m, depth)).astype(dtype), rng.standard_normal((depth, n)).astype(dtype)
        a[m // 2, depth // 2] = np.nan
        b[depth // 3, n // 2] = np.inf
        a[-1, depth // 3] = 0  # 0 * inf is NaN
        assert_close(kernels.matmul(a, b), _plain_product(a, b), reduction=depth)


def _plain_product(a, b):
    with np.errstate(invalid="ignore"):
        return (a.astype(np.float64)[:, :, None] * b.astype(np.float64)[None]).sum(axis=1)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_keep_nan_and_inf(backend, activation):
    x = np.array([[np.nan], [np.inf], [-np.inf], [-1e4], [1e4], [0.0]], np.float32)
    y = kernels.linear(x, np.ones((1, 1), np.float32), activation=activation)[:, 0]
    expected = {
        None: [np.nan, np.inf, -np.inf, -1e4, 1e4, 0],
        "relu": [np.nan, np.inf, 0, 0, 1e4, 0],
        "relu6": [np.nan, 6, 0, 0, 6, 0],
        "leaky_relu": [np.nan, np.inf, -np.inf, -1e2, 1e4, 0],
        "sigmoid": [np.nan, 1, 0, 0, 1, 0.5],
        "tanh": [np.nan, 1, -1, -1, 1, 0],
    }[activation]
    assert_close(y, np.array(expected, np.float32))


# ------------------------------------------------------------------------------------------------ threads and kinds


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_number_of_threads_gives_the_same_bits(rng, split_everything, dtype):
    a, b = rng.standard_normal((400, 300)).astype(dtype), rng.standard_normal((300, 350)).astype(dtype)
    stacked = rng.standard_normal((6, 60, 70)).astype(dtype), rng.standard_normal((6, 70, 80)).astype(dtype)
    row, matrix = rng.standard_normal((1, 1500)).astype(dtype), rng.standard_normal((1500, 1400)).astype(dtype)
    grad, bias = rng.standard_normal((400, 350)).astype(dtype), rng.standard_normal(350).astype(dtype)
    odd = [
        (rng.standard_normal((m, depth)).astype(dtype), rng.standard_normal((depth, n)).astype(dtype))
        for m, n, depth in ((37, 41, 53), (1, 333, 777), (3, 501, 99), (333, 1, 777), (777, 3, 131), (61, 59, 701))
    ]
    results = []
    for threads in (1, 2, 3):
        with tilewise.using(backend="cpu", threads=threads):
            results.append([
                kernels.matmul(a, b), kernels.matmul(*stacked), kernels.matmul(row, matrix),
                kernels.matmul(matrix.T, row[0]), kernels.linear(a, b.T, bias, activation="relu"),
                *kernels.linear_backward(grad, a, b.T), *kernels.matmul_backward(grad, a, b),
                *(kernels.matmul(p, q) for p, q in odd), *(kernels.matmul(q.T, p.T) for p, q in odd),
            ])  # fmt: skip
    for other in results[1:]:
        for index, (one, more) in enumerate(zip(results[0], other, strict=True)):
            assert one.tobytes() == more.tobytes(), f"result {index}"


def test_one_array_type_per_dtype_reaches_a_kernel(rng):
    from tilewise.kernels.cpu.jit import KERNELS

    def signatures():
        return {k.__qualname__: len(k.serial.signatures) + len(k.parallel.signatures) for k in KERNELS}

    def use(variant):
        for dtype in FLOATS:
            for m, n in ((40, 50), (1, 50), (40, 1)):
                a, b = rng.standard_normal((m, 60)).astype(dtype), rng.standard_normal((60, n)).astype(dtype)
                kernels.matmul(variant(a), variant(b))
                kernels.linear(variant(a), variant(b).T, activation="relu")
                kernels.linear_backward(variant(kernels.matmul(a, b)), variant(a), variant(b).T)
            stack = rng.standard_normal((3, 4, 5)).astype(dtype)
            kernels.matmul(variant(stack), variant(stack).swapaxes(1, 2))

    def frozen(array):
        array = array.copy()
        array.flags.writeable = False
        return array

    with tilewise.using(backend="cpu", threads=1):
        use(lambda array: array)
        before = signatures()
        use(np.asfortranarray)
        use(frozen)
        use(lambda array: np.repeat(array, 2, axis=-1)[..., ::2])
        use(lambda array: array[..., ::-1])
    assert signatures() == before


def test_torch_tensors_in_and_out(torch, backend, rng):
    a, b = torch.randn(4, 5), torch.randn(5, 3)
    y = kernels.matmul(a, b)
    assert isinstance(y, torch.Tensor)
    torch.testing.assert_close(y, a @ b)
    out = torch.empty(4, 3)
    assert kernels.matmul(a, b, out=out) is out
    torch.testing.assert_close(out, a @ b)
    torch.testing.assert_close(kernels.matmul(a.T.contiguous().T, b), a @ b)
    grads = kernels.linear_backward(y, a, b.T, needs=("x", "bias"))
    assert isinstance(grads[0], torch.Tensor)
    assert grads[1] is None
