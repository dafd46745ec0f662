"""The gradients of conv2d, and conv_transpose2d with its own: the references against PyTorch, the CPU kernels against
the references, numerical gradients, threads. Cotangents are random: a plain sum hides swapped indices."""

import numpy as np
import pytest
from conv_cases import BUSY, EDGES, FLOATS, LAYOUTS, OPTIONS, SMALL, Case, check, laid, nchw, reference
from gradcheck import assert_gradient, numerical_gradient
from tolerances import assert_close

import tilewise
from tilewise import kernels

# x (n, c, h, w) is spread over the larger image: the kernel, stride, ... of the transposed convolution
TRANSPOSED = [
    (Case(2, 3, 4, 5, 4), 0),
    (Case(2, 3, 4, 5, 4, (3, 3), 2, 1), 1),
    (Case(1, 4, 5, 3, 6, (4, 4), 2, 1, 1, 2), 0),
    (Case(2, 4, 3, 6, 4, (3, 3), 2, 1, 1, 4), 1),
    (Case(1, 2, 4, 4, 3, (2, 3), (3, 1), ((0, 1), (1, 0)), (1, 2)), (2, 1)),
    (Case(1, 2, 4, 5, 3, (3, 2), 1, 0, 3), 2),  # more than the stride, less than the dilation
    (Case(1, 3, 7, 1, 2, (1, 1), 2), 1),
    (Case(1, 17, 6, 7, 15, (3, 3), 1, 1), 0),
    (Case(1, 33, 5, 9, 16, (2, 2), 2), 0),
    (Case(2, 6, 7, 8, 9, (5, 5), 2, 2, 1, 3), 1),
    (Case(0, 3, 4, 5, 4), 0),
    (Case(1, 1, 1, 1, 1, (5, 5), 1, 2), 0),
]


def backward_arrays(rng, case, dtype, layout="NCHW"):
    """(grad, x, weight) with a random cotangent of the result's shape."""
    x, weight, _ = case.arrays(rng, dtype, layout)
    y = reference(kernels.conv2d, x, weight, **case.options, layout=layout)
    return rng.standard_normal(y.shape).astype(dtype), x, weight


def transposed_arrays(rng, case, extra, dtype, layout="NCHW"):
    """(x, weight, bias, options) of a transposed convolution."""
    x = laid(rng.standard_normal((case.n, case.c, case.h, case.w)).astype(dtype), layout)
    weight = rng.standard_normal((case.c, case.o // case.groups, *case.kernel)).astype(dtype)
    options = case.options | {"output_padding": extra, "layout": layout}
    return x, weight, rng.standard_normal(case.o).astype(dtype), options


def lengths(case, grad, layout):
    """How many products are summed in an element of each gradient."""
    pixels = grad.size // case.o
    return (case.o // case.groups * case.kernel[0] * case.kernel[1], pixels, pixels)


# ------------------------------------------------------------------------------------------- the reference is right


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", OPTIONS + SMALL, ids=str)
def test_reference_conv2d_backward_is_pytorchs(torch, rng, case, dtype, layout):
    grad, x, weight = backward_arrays(rng, case, dtype)
    (top, bottom), (left, right) = case.pads()
    theirs = [torch.from_numpy(array).requires_grad_() for array in (x, weight, np.zeros(case.o, dtype))]
    padded = torch.nn.functional.pad(theirs[0], (left, right, top, bottom))
    y = torch.nn.functional.conv2d(padded, *theirs[1:], case.stride, 0, case.dilation, case.groups)
    y.backward(torch.from_numpy(grad))
    with tilewise.using(backend="reference"):
        grads = kernels.conv2d_backward(laid(grad, layout), laid(x, layout), weight, **case.options, layout=layout)
        ours = (nchw(grads[0], layout), *grads[1:])
        for actual, tensor, length in zip(ours, theirs, lengths(case, grad, layout), strict=True):
            assert actual.dtype == dtype
            check(np.ascontiguousarray(actual), tensor.grad.numpy(), length, (case, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("case", "extra"), TRANSPOSED, ids=str)
def test_reference_conv_transpose2d_is_pytorchs(torch, rng, case, extra, dtype, layout):
    x, weight, bias, options = transposed_arrays(rng, case, extra, dtype)
    (top, bottom), (left, right) = case.pads()
    theirs = [torch.from_numpy(array).requires_grad_() for array in (x, weight, bias)]
    whole = torch.nn.functional.conv_transpose2d(*theirs, case.stride, 0, extra, case.groups, case.dilation)
    # PyTorch cuts off the same on both sides only: here the whole result is cut
    y = whole[:, :, top : whole.shape[2] - bottom, left : whole.shape[3] - right]
    grad = rng.standard_normal(tuple(y.shape)).astype(dtype)
    y.backward(torch.from_numpy(grad))
    options["layout"] = layout
    with tilewise.using(backend="reference"):
        ours = kernels.conv_transpose2d(laid(x, layout), weight, bias, **options)
        grads = kernels.conv_transpose2d_backward(laid(grad, layout), laid(x, layout), weight, **options)
        for image, expected in zip(x, y.detach().numpy(), strict=True):
            one = kernels.conv_transpose2d(laid(image, layout), weight, bias, **options)
            assert_close(nchw(one, layout), expected, reduction=case.taps)
    assert_close(nchw(ours, layout), y.detach().numpy(), reduction=case.taps)
    actual = (nchw(grads[0], layout), *grads[1:])
    for own, tensor in zip(actual, theirs, strict=True):
        check(
            np.ascontiguousarray(own), tensor.grad.numpy(), grad.size // case.o + weight[0].size, (case, layout), dtype
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("at_once", [1, 2])
def test_reference_takes_a_batch_in_parts(monkeypatch, rng, at_once, layout):
    """So many images at a time that their columns stay small: the result is that of all at once."""
    from tilewise.kernels.reference import conv

    case = Case(3, 4, 6, 5, 6, (3, 2), 1, 1, 1, 2)
    grad, x, weight = backward_arrays(rng, case, np.float64, layout)
    options = case.options | {"layout": layout}

    def results():
        back = reference(kernels.conv_transpose2d, grad, weight, **options)
        forward = reference(kernels.conv2d, x, weight, **options)
        return forward, back, *reference(kernels.conv2d_backward, grad, x, weight, **options)

    whole = results()
    monkeypatch.setattr(conv, "_COLUMN_BYTES", at_once * grad[0].size // case.o * case.c * 6 * 8)
    for part, expected in zip(results(), whole, strict=True):
        assert_close(part, expected, reduction=100)


# ------------------------------------------------------------------------------ the CPU kernels against the references


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("edge", EDGES)
def test_cpu_conv2d_backward_around_tile_edges(rng, edge, layout, dtype):
    for case in EDGES[edge]:
        grad, x, weight = backward_arrays(rng, case, dtype, layout)
        options = case.options | {"layout": layout}
        expected = reference(kernels.conv2d_backward, grad, x, weight, **options)
        with tilewise.using(backend="cpu"):
            grads = kernels.conv2d_backward(grad, x, weight, **options)
        names = ("grad_x", "grad_weight", "grad_bias")
        for name, ours, theirs, length in zip(names, grads, expected, lengths(case, grad, layout), strict=True):
            check(ours, theirs, length, (case, layout, name), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cpu_conv_transpose2d(rng, layout, dtype):
    for case, extra in TRANSPOSED:
        x, weight, bias, options = transposed_arrays(rng, case, extra, dtype, layout)
        expected = reference(kernels.conv_transpose2d, x, weight, bias, **options)
        grad = rng.standard_normal(expected.shape).astype(dtype)
        wanted = reference(kernels.conv_transpose2d_backward, grad, x, weight, **options)
        with tilewise.using(backend="cpu"):
            y = kernels.conv_transpose2d(x, weight, bias, **options)
            bare = kernels.conv_transpose2d(x, weight, **options)
            grads = kernels.conv_transpose2d_backward(grad, x, weight, **options)
        check(y, expected, case.taps + 1, (case, layout), dtype)
        without = expected - (bias if layout == "NHWC" else bias[:, None, None]).astype(np.float64)
        check(bare, without, case.taps + 1, (case, layout, "no bias"), dtype)
        for name, ours, theirs in zip(("grad_x", "grad_weight", "grad_bias"), grads, wanted, strict=True):
            check(ours, theirs, grad.size // case.o + weight[0].size, (case, layout, name), dtype)


# -------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_conv2d_gradients(backend, rng, case, layout):
    x, weight, bias = case.arrays(rng, np.float64, layout)
    options = case.options | {"layout": layout}
    grad = rng.standard_normal(kernels.conv2d(x, weight, bias, **options).shape)
    grads = kernels.conv2d_backward(grad, x, weight, **options)
    assert_gradient(grads[0], numerical_gradient(lambda v: kernels.conv2d(v, weight, bias, **options), x, grad))
    assert_gradient(grads[1], numerical_gradient(lambda v: kernels.conv2d(x, v, bias, **options), weight, grad))
    assert_gradient(grads[2], numerical_gradient(lambda v: kernels.conv2d(x, weight, v, **options), bias, grad))
    for index, name in enumerate(("x", "weight", "bias")):
        alone = kernels.conv2d_backward(grad, x, weight, **options, needs=(name,))
        assert [g is not None for g in alone] == [i == index for i in range(3)]
        np.testing.assert_array_equal(alone[index], grads[index])
    assert kernels.conv2d_backward(grad, x, weight, **options, needs=()) == (None, None, None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("case", "extra"), TRANSPOSED[:6], ids=str)
def test_conv_transpose2d_gradients(backend, rng, case, extra, layout):
    x, weight, bias, options = transposed_arrays(rng, case, extra, np.float64, layout)
    forward = kernels.conv_transpose2d
    grad = rng.standard_normal(forward(x, weight, bias, **options).shape)
    grads = kernels.conv_transpose2d_backward(grad, x, weight, **options)
    assert_gradient(grads[0], numerical_gradient(lambda v: forward(v, weight, bias, **options), x, grad))
    assert_gradient(grads[1], numerical_gradient(lambda v: forward(x, v, bias, **options), weight, grad))
    assert_gradient(grads[2], numerical_gradient(lambda v: forward(x, weight, v, **options), bias, grad))
    nothing, only, none = kernels.conv_transpose2d_backward(grad, x, weight, **options, needs=("weight",))
    assert nothing is None
    assert none is None
    np.testing.assert_array_equal(only, grads[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_transposed_convolution_is_the_adjoint(backend, rng, layout):
    """<conv2d(x), g> = <x, conv_transpose2d(g)>, with the same weight."""
    case = Case(2, 4, 8, 11, 6, (3, 2), (2, 3), ((1, 0), (0, 2)), 1, 2)
    x, weight, _ = case.arrays(rng, np.float64, layout)
    y = kernels.conv2d(x, weight, **case.options, layout=layout)
    grad = rng.standard_normal(y.shape)
    options = case.options | {"output_padding": (0, 2), "layout": layout}
    back = kernels.conv_transpose2d(grad, weight, **options)
    assert back.shape == x.shape
    np.testing.assert_allclose((y * grad).sum(), (x * back).sum(), rtol=1e-12)
    assert_close(kernels.conv2d_backward(grad, x, weight, **case.options, layout=layout)[0], back, reduction=18)


def test_unbatched_gradients_have_no_batch_axis(backend, rng):
    for layout in LAYOUTS:
        grad, x, weight = backward_arrays(rng, Case(1, 3, 6, 7, 4, (3, 3), 1, 1), np.float64, layout)
        expected = kernels.conv2d_backward(grad, x, weight, padding=1, layout=layout)
        actual = kernels.conv2d_backward(grad[0], x[0], weight, padding=1, layout=layout)
        for ours, theirs in zip(actual, (expected[0][0], *expected[1:]), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        spread = np.repeat(x[0], 2, axis=0)[::2]  # strided
        strided = kernels.conv2d_backward(grad[0], spread, weight, padding=1, layout=layout)
        assert_close(strided[1], expected[1], reduction=42)
        nothing, gradient, _ = kernels.conv2d_backward(
            grad[0], x[0], weight, padding=1, layout=layout, needs=("weight",)
        )
        assert nothing is None
        np.testing.assert_array_equal(gradient, expected[1])


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_inf_in_the_cotangent(backend, rng, layout):
    # Without padding: whether a NaN meets the zeros of the padding, or nothing there, is left open.
    for case in (Case(2, 6, 9, 10, 8), Case(1, 5, 8, 8, 6, (1, 1)), Case(2, 4, 9, 9, 4, (3, 3), 2, 0, 1, 4)):
        grad, x, weight = backward_arrays(rng, case, np.float32, layout)
        spots = [tuple(rng.integers(n) for n in grad.shape) for _ in range(2)]
        grad[spots[0]], grad[spots[1]] = np.nan, np.inf
        expected = reference(kernels.conv2d_backward, grad, x, weight, **case.options, layout=layout)
        grads = kernels.conv2d_backward(grad, x, weight, **case.options, layout=layout)
        for ours, theirs, length in zip(grads, expected, lengths(case, grad, layout), strict=True):
            assert_close(ours, theirs, reduction=length, scale=length**0.5)


# ---------------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", BUSY, ids=str)
def test_any_number_of_threads_gives_the_same_bits(rng, split_everything, case, layout, dtype):
    grad, x, weight = backward_arrays(rng, case, dtype, layout)
    options = case.options | {"layout": layout}
    results = []
    for threads in (1, 2, 3):
        with tilewise.using(backend="cpu", threads=threads):
            results.append(kernels.conv2d_backward(grad, x, weight, **options))
    for other in results[1:]:
        for name, one, more in zip(("grad_x", "grad_weight", "grad_bias"), results[0], other, strict=True):
            assert one.tobytes() == more.tobytes(), name
