"""conv2d: the reference against PyTorch and the definition, the CPU kernels against the reference, algorithms,
memory layouts, NaN, threads."""

import numpy as np
import pytest
from conv_cases import BUSY, EDGES, FLOATS, LAYOUTS, OPTIONS, SMALL, Case, check, laid, nchw, reference, wide
from tolerances import assert_close

import tilewise
from tilewise import kernels

ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", "sigmoid", "tanh")
# Winograd's transforms add up numbers larger than its results; its error is about ten times direct's.
WINOGRAD_GROWTH = 16.0

# ------------------------------------------------------------------------------------------- the reference is right


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_naive_conv2d_is_the_reference(rng, case):
    from tilewise.kernels.reference import conv

    x, weight, bias = case.arrays(rng, np.float64)
    stride, dilation = (v if isinstance(v, tuple) else (v, v) for v in (case.stride, case.dilation))
    y = conv.conv2d_naive(x, weight, bias, stride=stride, padding=case.pads(), dilation=dilation, groups=case.groups)
    assert_close(reference(kernels.conv2d, x, weight, bias, **case.options), y, reduction=case.taps)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", OPTIONS + SMALL, ids=str)
def test_reference_conv2d_is_pytorchs(torch, rng, case, dtype, layout):
    x, weight, bias = case.arrays(rng, dtype)
    (top, bottom), (left, right) = case.pads()
    padded = torch.nn.functional.pad(torch.from_numpy(x), (left, right, top, bottom))
    theirs = torch.nn.functional.conv2d(
        padded, torch.from_numpy(weight), torch.from_numpy(bias), case.stride, 0, case.dilation, case.groups
    ).numpy()
    with tilewise.using(backend="reference"):
        y = kernels.conv2d(laid(x, layout), weight, bias, **case.options, layout=layout)
        assert y.dtype == dtype
        assert_close(nchw(y, layout), theirs, reduction=case.taps)
        bare = kernels.conv2d(laid(x, layout), weight, **case.options, layout=layout)
        assert_close(nchw(bare, layout), theirs - bias[:, None, None], reduction=case.taps)
        for image, alone in zip(x, theirs, strict=True):
            one = kernels.conv2d(laid(image, layout), weight, bias, **case.options, layout=layout)
            assert_close(nchw(one, layout), alone, reduction=case.taps)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (4, 4), (5, 2)], ids=str)
def test_named_padding_is_pytorchs(torch, rng, kernel, padding):
    x, weight = torch.randn(2, 3, 9, 8, dtype=torch.float64), torch.randn(4, 3, *kernel, dtype=torch.float64)
    for dilation in (1, 2):
        theirs = torch.nn.functional.conv2d(x, weight, padding=padding, dilation=dilation)
        with tilewise.using(backend="reference"):
            ours = kernels.conv2d(x, weight, padding=padding, dilation=dilation)
        assert_close(ours.numpy(), theirs.numpy(), reduction=60)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_reference_activations_are_pytorchs(torch, rng, activation):
    x, weight, bias = Case(2, 3, 6, 6, 4).arrays(rng, np.float64)
    x *= 3  # beyond relu6's bounds
    raw = torch.nn.functional.conv2d(*map(torch.from_numpy, (x, weight, bias)))
    apply = getattr(torch.nn.functional, activation)
    with tilewise.using(backend="reference"):
        y = kernels.conv2d(x, weight, bias, activation=activation)
    assert_close(y, apply(raw).numpy(), reduction=27, scale=float(raw.abs().max()))


# ---------------------------------------------------------------------------------------- the lectures' worked numbers

FIRST = np.array([[1, 0, 2, 3], [2, 1, 0, 1], [1, 0, 1, 3], [2, 0, 3, 2]], np.float64)
FILTER = [[1, 2, 0], [3, 2, 1], [0, 1, 3]]
SECOND = np.array([[1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 1, 0]], np.float64)
LECTURE = [
    (FIRST, FILTER, {}, [[12, 18], [17, 15]]),
    (FIRST, FILTER, {"padding": 1}, [[7, 6, 10, 13], [8, 12, 18, 13], [8, 17, 15, 13], [6, 10, 10, 20]]),
    (FIRST, [[1, 2], [3, 2]], {"stride": 2}, [[9, 10], [7, 20]]),
    (SECOND, [[1, 0], [0, 1]], {}, [[2, 1, 1], [0, 2, 2], [0, 1, 1]]),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("x", "filter_", "options", "expected"), LECTURE)
def test_worked_numbers(backend, x, filter_, options, expected, layout, dtype):
    image, weight = laid(x.astype(dtype)[None, None], layout), np.array(filter_, dtype)[None, None]
    y = nchw(kernels.conv2d(image, weight, **options, layout=layout), layout)
    np.testing.assert_array_equal(y[0, 0], expected)
    with_bias = kernels.conv2d(image, weight, np.array([3], dtype), **options, layout=layout)
    np.testing.assert_array_equal(nchw(with_bias, layout)[0, 0], np.array(expected) + 3)


# ------------------------------------------------------------------------------ the CPU kernels against the references


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("edge", EDGES)
def test_cpu_conv2d_around_tile_edges(rng, edge, layout, dtype):
    for case in EDGES[edge]:
        x, weight, bias = case.arrays(rng, dtype, layout)
        options = case.options | {"layout": layout}
        expected = reference(kernels.conv2d, x, weight, bias, **options)
        with tilewise.using(backend="cpu"):
            y = kernels.conv2d(x, weight, bias, **options)
            bare = kernels.conv2d(x, weight, **options)
        growth = WINOGRAD_GROWTH if used(case, x, weight, layout) == "winograd" else 1.0
        check(y, expected, case.taps + 1, (case, layout), dtype, growth)
        check(bare, expected - channels(bias, layout), case.taps, (case, layout, "no bias"), dtype, growth)


def channels(bias, layout):
    return wide(bias)[:, None, None] if layout == "NCHW" else wide(bias)


def used(case, x, weight, layout, algorithm="auto"):
    """The algorithm that the CPU backend takes for this problem."""
    with tilewise.using(backend="cpu"):
        options = case.options | {"layout": layout, "algorithm": algorithm}
        return tilewise.explain(kernels.conv2d, x, weight, **options).algorithm


ALGORITHMS = [(name, layout) for name in ("direct", "gemm", "depthwise") for layout in LAYOUTS] + [("winograd", "NCHW")]


@pytest.mark.parametrize(("algorithm", "layout"), ALGORITHMS)
def test_every_algorithm_gives_the_same(rng, algorithm, layout):
    taken = 0
    for case in [case for cases in EDGES.values() for case in cases[::3]]:
        for dtype in FLOATS:
            x, weight, bias = case.arrays(rng, dtype, layout)
            options = case.options | {"layout": layout, "activation": "relu"}
            try:
                named = used(case, x, weight, layout, algorithm)
            except ValueError:  # it does not apply here
                continue
            assert named == algorithm
            taken += 1
            with tilewise.using(backend="cpu"):
                y = kernels.conv2d(x, weight, bias, **options, algorithm=algorithm)
            growth = WINOGRAD_GROWTH if algorithm == "winograd" else 1.0
            check(
                y, reference(kernels.conv2d, x, weight, bias, **options), case.taps + 1, (case, layout), dtype, growth
            )
    assert taken >= 5, f"{algorithm} was hardly ever allowed"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cpu_activations(rng, layout, activation):
    cases = (Case(2, 3, 9, 11, 7, (3, 3), 1, 1), Case(1, 40, 5, 5, 9, (1, 1)), Case(2, 8, 9, 9, 8, (3, 3), 2, 1, 1, 8))
    for case in (*cases, Case(2, 64, 12, 12, 64, (3, 3), 1, 1), Case(1, 1, 8, 8, 1, (3, 3))):
        for dtype in FLOATS:
            x, weight, bias = case.arrays(rng, dtype, layout)
            options = case.options | {"layout": layout, "activation": activation}
            with tilewise.using(backend="cpu"):
                y, bare = kernels.conv2d(x, weight, bias, **options), kernels.conv2d(x, weight, None, **options)
            # the error before the activation counts, however flat that is
            for actual, b in ((y, bias), (bare, None)):
                expected = reference(kernels.conv2d, x, weight, b, **options)
                check(actual, expected, case.taps + 1, (case, layout), dtype, WINOGRAD_GROWTH)


# --------------------------------------------------------------------------------------------------------- memory


def strided_views(array):
    """The same values as other memory."""
    spread = np.zeros([2 * n for n in array.shape], array.dtype)
    every_other = tuple(slice(None, None, 2) for _ in array.shape)
    spread[every_other] = array
    frozen = array.copy()
    frozen.flags.writeable = False
    order = (0, 2, 3, 1) if array.ndim == 4 else tuple(range(array.ndim))
    moved = np.ascontiguousarray(array.transpose(order)).transpose(np.argsort(order))
    raw = np.zeros(array.nbytes + 1, np.uint8)
    misaligned = raw[1:].view(array.dtype).reshape(array.shape)
    misaligned[...] = array
    return [spread[every_other], np.flip(np.flip(array).copy()), moved, frozen, misaligned]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_give_the_same_and_inputs_stay(backend, rng, layout, dtype):
    for case in (
        Case(2, 4, 7, 9, 6, (3, 3), 1, 1),
        Case(2, 5, 6, 6, 7, (1, 1)),
        Case(2, 4, 7, 9, 4, (3, 3), 2, 1, 1, 4),
    ):
        x, weight, bias = case.arrays(rng, dtype, layout)
        options = case.options | {"layout": layout}
        y = kernels.conv2d(x, weight, bias, **options)
        for views in zip(*map(strided_views, (x, weight, bias)), strict=True):
            before = [view.copy() for view in views]
            assert_close(kernels.conv2d(*views, **options), y, reduction=case.taps)
            for view, copy in zip(views, before, strict=True):
                np.testing.assert_array_equal(view, copy)
        one = kernels.conv2d(strided_views(x)[0][0], weight, bias, **options)
        assert_close(one, y[0], reduction=case.taps)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_is_filled_and_returned(backend, rng, layout):
    for case in (*SMALL, Case(1, 16, 9, 9, 16, (3, 3), 1, 1), Case(0, 3, 6, 6, 7, (3, 3), 1, 1)):
        x, weight, bias = case.arrays(rng, np.float32, layout)
        options = case.options | {"layout": layout, "activation": "relu"}
        y = kernels.conv2d(x, weight, bias, **options)
        out = np.full_like(y, np.nan)
        assert kernels.conv2d(x, weight, bias, **options, out=out) is out
        np.testing.assert_array_equal(out, y)
        wider = np.full((*y.shape[:-1], y.shape[-1] + 2), np.nan, y.dtype)
        inside = wider[..., 1:-1]
        assert kernels.conv2d(x, weight, bias, **options, out=inside) is inside
        np.testing.assert_array_equal(inside, y)
        assert np.isnan(wider[..., 0]).all()
        assert np.isnan(wider[..., -1]).all()
        for image, expected in zip(x, y, strict=True):
            out = np.full_like(expected, np.nan)
            assert kernels.conv2d(image, weight, bias, **options, out=out) is out
            assert_close(out, expected, reduction=case.taps)


def test_torch_tensors_in_and_out(torch, backend):
    x, weight, bias = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4)
    expected = torch.nn.functional.conv2d(x, weight, bias, 2, 1)
    y = kernels.conv2d(x, weight, bias, 2, 1)
    assert isinstance(y, torch.Tensor)
    torch.testing.assert_close(y, expected)
    out = torch.empty_like(expected)
    assert kernels.conv2d(x, weight, bias, 2, 1, out=out) is out
    torch.testing.assert_close(out, expected)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(kernels.conv2d(channels_last, weight, bias, 2, 1), expected)
    grads = kernels.conv2d_backward(y, x, weight, 2, 1, needs=("weight",))
    assert grads[0] is None
    assert isinstance(grads[1], torch.Tensor)


# --------------------------------------------------------------------------------------------- what is not a number


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_inf_stay_in_the_windows_that_hold_them(backend, rng, layout, dtype):
    cases = [
        Case(2, 3, 10, 11, 4, (3, 3), 1, 1), Case(2, 40, 12, 13, 36, (3, 3), 1, 1), Case(2, 20, 6, 7, 9, (1, 1)),
        Case(1, 3, 15, 17, 8, (7, 7), 2, 3), Case(2, 8, 9, 20, 8, (3, 3), 1, 1, 1, 8), Case(1, 4, 9, 9, 6, (2, 2), 2),
        Case(1, 6, 9, 10, 4, (3, 3), 1, 2, 2, 2), Case(2, 1, 12, 12, 6, (5, 5)), Case(1, 16, 9, 18, 9, (3, 3), 1, 1),
        Case(2, 8, 11, 9, 8, (3, 3), 2, 1, 1, 8),
    ]  # fmt: skip
    for case in cases:
        x, weight, bias = case.arrays(rng, dtype)
        weight[0] = 0  # 0 * Inf is NaN
        for value in (np.nan, np.inf, -np.inf):
            x[rng.integers(case.n), rng.integers(case.c), rng.integers(case.h), rng.integers(case.w)] = value
        y = kernels.conv2d(laid(x, layout), weight, bias, **case.options, layout=layout)
        expected = reference(kernels.conv2d, x, weight, bias, **case.options)
        assert np.isfinite(expected).any()
        assert not np.isfinite(expected).all()
        growth = WINOGRAD_GROWTH * case.taps**0.5
        assert_close(nchw(y, layout), expected, reduction=case.taps, scale=growth)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_window_without_the_nan_is_finite(rng):
    """The places, from the definition and not from a product of matrices."""
    x, weight, _ = Case(1, 3, 9, 9, 2, (3, 3), 1, 1).arrays(rng, np.float64)
    x[0, 1, 4, 6] = np.nan
    bad = np.zeros((9, 9), bool)
    bad[3:6, 5:8] = True
    np.testing.assert_array_equal(np.isnan(reference(kernels.conv2d, x, weight, padding=1)), np.stack([bad, bad])[None])


# ---------------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", BUSY, ids=str)
def test_any_number_of_threads_gives_the_same_bits(rng, split_everything, case, layout, dtype):
    x, weight, bias = case.arrays(rng, dtype, layout)
    options = case.options | {"layout": layout}
    results = []
    for threads in (1, 2, 3):
        with tilewise.using(backend="cpu", threads=threads):
            results.append([
                kernels.conv2d(x, weight, bias, **options, activation="relu", algorithm=algorithm)
                for algorithm in ("auto", "direct", "gemm")
            ])  # fmt: skip
    for other in results[1:]:
        for one, more in zip(results[0], other, strict=True):
            assert one.tobytes() == more.tobytes()


def test_one_array_type_per_dtype_reaches_a_kernel(rng):
    from tilewise.kernels.cpu.jit import KERNELS

    cases = (Case(2, 4, 7, 9, 6, (3, 3), 1, 1), Case(2, 5, 6, 6, 7, (1, 1)), Case(2, 4, 7, 9, 4, (3, 3), 2, 1, 1, 4))

    def signatures():
        return {k.__qualname__: len(k.serial.signatures) + len(k.parallel.signatures) for k in KERNELS}

    def use(view):
        for case in cases:
            for dtype in FLOATS:
                arrays = [strided_views(a)[view] if view is not None else a for a in case.arrays(rng, dtype)]
                for batch in (arrays[0], arrays[0][0]):
                    y = kernels.conv2d(batch, *arrays[1:], **case.options)
                    kernels.conv2d(batch, *arrays[1:], **case.options, out=np.empty_like(y))
                    kernels.conv2d_backward(y, batch, arrays[1], **case.options)

    with tilewise.using(backend="cpu", threads=1):
        use(None)
        before = signatures()
        for view in range(5):
            use(view)
    assert signatures() == before
