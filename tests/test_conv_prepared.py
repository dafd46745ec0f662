"""prepare_conv2d: the numbers of conv2d with weights packed once, and a batch norm folded into them."""

import copy
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest
from conv_cases import EDGES, FLOATS, LAYOUTS, Case, check, laid, reference

import tilewise
from tilewise import kernels
from tilewise.kernels import operation, prepare_conv2d

CASES = [case for cases in EDGES.values() for case in cases[::3]] + [
    Case(3, 140, 7, 7, 70, (3, 3), 1, 1),  # by way of NHWC
    Case(1, 140, 7, 7, 64, (3, 3), 1, 1),  # not so, for the weights' sake
    Case(2, 130, 14, 15, 40, (3, 3), 1, 1, 1, 2),  # channels in blocks, groups
    Case(3, 20, 21, 22, 34, (3, 3), 1, 1),  # many tiles
    Case(1, 200, 9, 10, 66, (3, 3), 1, 1),  # few tiles, whose weights are transformed in pieces where not prepared
]


@pytest.mark.parametrize("dtype", [*FLOATS, np.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("algorithm", ["gemm", "direct", "depthwise", "winograd"])
def test_the_same_bits_as_conv2d(rng, algorithm, layout, dtype):
    taken = 0
    for i, case in enumerate(CASES):
        x, weight, bias = case.arrays(rng, dtype, layout)
        bias = bias if i % 2 else None
        options = case.options | {"layout": layout, "algorithm": algorithm, "activation": ("relu", None, "tanh")[i % 3]}
        with tilewise.using(backend="cpu"):
            try:
                y = kernels.conv2d(x, weight, bias, **options)
            except ValueError:  # it does not apply here
                continue
            taken += 1
            prepared = prepare_conv2d(weight, bias, **options)
            for _ in range(2):
                np.testing.assert_array_equal(prepared(x), y, err_msg=f"{case} {layout}")
            summed = kernels.conv2d(x, weight, bias, **options, add=y)
            np.testing.assert_array_equal(prepared(x, add=y), summed, err_msg=f"{case} {layout}")
            assert prepared(x, add=y, out=y) is y
            np.testing.assert_array_equal(y, summed, err_msg=f"{case} {layout}")
            if case.n:
                np.testing.assert_array_equal(prepared(x[0]), kernels.conv2d(x[0], weight, bias, **options))
    assert taken >= 5 or (algorithm == "winograd" and dtype == np.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_auto_is_right_for_any_shape(rng, layout):
    """One preparation, shapes for which other algorithms are best; packed weights are counted in the choice."""
    _, weight, bias = Case(1, 36, 8, 8, 40).arrays(rng, np.float32)
    prepared, algorithms = prepare_conv2d(weight, bias, padding=1, layout=layout, activation="relu"), set()
    with tilewise.using(backend="cpu"):
        for n, h, w in ((1, 1, 1), (1, 7, 7), (2, 30, 31), (9, 12, 12), (1, 1, 2), (0, 5, 5)):
            x = laid(rng.standard_normal((n, 36, h, w)).astype(np.float32), layout)
            expected = reference(kernels.conv2d, x, weight, bias, padding=1, layout=layout, activation="relu")
            check(prepared(x), expected, 36 * 9, (n, h, w), np.float32, 16.0)
            algorithms.add(tilewise.explain(prepared, x).algorithm)
    assert {"gemm", "winograd"} <= algorithms


def test_shapes_share_what_is_packed(rng):
    weight = rng.standard_normal((40, 36, 3, 3)).astype(np.float32)
    prepared = prepare_conv2d(weight, padding=1, algorithm="winograd", layout="NHWC")
    assert prepared.nbytes == weight.nbytes
    prepared(np.ones((1, 8, 8, 36), np.float32))  # few tiles
    packed = prepared.nbytes
    assert 5 * weight.nbytes <= packed < 9 * weight.nbytes
    prepared(np.ones((3, 33, 33, 36), np.float32))  # many
    prepared(np.ones((9, 8, 36), np.float32))
    assert prepared.nbytes == packed
    by_way_of_nhwc = prepare_conv2d(weight, padding=1, algorithm="winograd")
    by_way_of_nhwc(np.ones((1, 36, 8, 8), np.float32))
    assert by_way_of_nhwc.nbytes == packed
    by_way_of_nhwc(np.ones((3, 36, 33, 33), np.float32))
    assert by_way_of_nhwc.nbytes > packed
    depthwise = prepare_conv2d(weight[:, :1], groups=40)
    depthwise(np.ones((1, 40, 8, 8), np.float32))
    assert depthwise.nbytes == weight[:, :1].nbytes


@pytest.mark.parametrize("dtype", [*FLOATS, np.float16])
def test_later_changes_of_the_weights_do_not_reach_it(backend, rng, dtype):
    x, weight, bias = Case(2, 6, 9, 9, 8, (3, 3), 1, 1).arrays(rng, dtype)
    expected = kernels.conv2d(x, weight, bias, algorithm="gemm")
    prepared = prepare_conv2d(weight, bias, algorithm="gemm")
    weight[...], bias[...] = 0, 7
    np.testing.assert_array_equal(prepared(x), expected)


# -------------------------------------------------------------------------------------------------------- batch norm


def statistics(rng, channels, dtype, affine=(True, True)):
    mean, scale, shift = (rng.standard_normal(channels).astype(dtype) for _ in range(3))
    variance = (rng.random(channels) + 0.5).astype(dtype)
    return mean, variance, scale if affine[0] else None, shift if affine[1] else None, 1e-3


@pytest.mark.parametrize("dtype", [*FLOATS, np.float16])
@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_norm_is_folded_in(backend, rng, layout, affine, dtype):
    for case in (
        Case(2, 6, 9, 9, 8, (3, 3), 1, 1), Case(2, 6, 9, 9, 12, (3, 3), 2, 1, 1, 2), Case(1, 7, 8, 8, 7, groups=7),
    ):  # fmt: skip
        for bias_given in (True, False):
            x, weight, bias = case.arrays(rng, dtype, layout)
            bias = bias if bias_given else None
            norm = statistics(rng, case.o, dtype, affine)
            options = case.options | {"layout": layout}
            prepared = prepare_conv2d(weight, bias, **options, activation="relu", batch_norm=norm)
            inner = reference(kernels.conv2d, x, weight, bias, **options)
            exact = [None if a is None else a.astype(np.float64) for a in norm[:4]]
            with tilewise.using(backend="reference"):
                add = kernels.batch_norm(inner, *exact, eps=norm[4], layout=layout)
                expected = np.maximum(2 * add, 0)
            y = prepared(x, add=add.astype(dtype))
            if dtype == np.float16:  # computed in float32; add and y are rounded, half a unit each
                assert y.dtype == dtype
                assert np.abs(y - expected).max() <= np.finfo(dtype).eps * np.abs(expected).max()
            else:
                check(y, expected, 4 * case.taps, (case, layout, affine), dtype)


def test_a_batch_norm_is_folded_in_float64(rng):
    """Where mean and bias cancel, float32 would keep no digit."""
    mean, variance = (1e4 * rng.random(9) + 1).astype(np.float32), (rng.random(9) + 0.5).astype(np.float32)
    scaled = mean / np.sqrt(variance.astype(np.float64) + 0.1)
    shift = scaled.astype(np.float32)
    prepared = prepare_conv2d(np.ones((9, 2, 1, 1), np.float32), batch_norm=(mean, variance, None, shift, 0.1))
    y = prepared(np.zeros((1, 2, 1, 1), np.float32)).ravel()
    np.testing.assert_allclose(y, shift - scaled, rtol=1e-6)


def test_a_negative_variance_is_nan_as_in_batch_norm(backend, rng):
    norm = np.zeros(2), np.array([1.0, -1.0]), None, None, 0.0
    y = prepare_conv2d(np.ones((2, 1, 1, 1)), batch_norm=norm)(np.ones((1, 1, 2, 2)))
    assert np.isfinite(y[0, 0]).all()
    assert np.isnan(y[0, 1]).all()


# --------------------------------------------------------------------------------------------------- as an object


def test_tensors_whatever_the_weights_were(torch, backend):
    x, weight, bias = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4)
    expected = torch.nn.functional.conv2d(x, weight, bias, 2, 1)
    for prepared in (prepare_conv2d(weight, bias, 2, 1), prepare_conv2d(weight.numpy(), bias.numpy(), 2, 1)):
        y = prepared(x)
        assert isinstance(y, torch.Tensor)
        torch.testing.assert_close(y, expected)
        out = torch.empty_like(expected)
        assert prepared(x, out=out) is out
        torch.testing.assert_close(out, expected)
        assert type(prepared(x.numpy())) is np.ndarray


def test_explain_using_and_repr(rng):
    x, weight, _ = Case(2, 6, 9, 9, 8, (3, 3), 1, 1).arrays(rng, np.float32)
    prepared = prepare_conv2d(weight, padding="same", algorithm="gemm")
    decision = tilewise.explain(prepared, x)
    assert (decision.operation, decision.backend, decision.algorithm) == ("conv2d", "cpu", "gemm")
    assert decision.flops == tilewise.explain(kernels.conv2d, x, weight, padding="same").flops
    assert prepared.nbytes == weight.nbytes  # explained, not done
    with tilewise.using(backend="reference"):
        assert tilewise.explain(prepared, x).backend == "reference"
        np.testing.assert_array_equal(prepared(x), kernels.conv2d(x, weight, padding="same"))
    assert repr(prepared).startswith(
        "PreparedConv2d(weight (8, 6, 3, 3) float32, no bias, stride=(1, 1), padding='same'"
    )


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_go_without_what_was_packed(rng, clone):
    x, weight, bias = Case(2, 6, 9, 9, 8, (3, 3), 1, 1).arrays(rng, np.float16)
    prepared = prepare_conv2d(weight, bias, activation="relu", algorithm="winograd")
    y = prepared(x)
    other = clone(prepared)
    assert other.nbytes == 2 * (weight.nbytes + bias.nbytes) < prepared.nbytes
    np.testing.assert_array_equal(other(x), y)
    assert other.dtype == np.float16


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_it_is_freed_at_once_when_dropped(backend, dtype):
    gc.disable()
    try:
        prepared = prepare_conv2d(np.ones((4, 3, 3, 3), dtype))
        y = prepared(np.ones((1, 3, 8, 8), dtype))
        prepared(np.ones((1, 3, 8, 8), dtype), add=y)
        bound = weakref.ref(prepared._alone)
        assert bound() in operation._operations
        del prepared
        assert bound() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("algorithm", ["gemm", "winograd"])
def test_threads_that_call_first_pack_once(rng, algorithm, monkeypatch):
    from tilewise.kernels.cpu import conv_pass

    packed = []
    for kind in (conv_pass._ProductNHWC, conv_pass._WinogradNHWC):
        monkeypatch.setattr(kind, "pack", lambda self, w, pack=kind.pack: (packed.append(self), pack(self, w))[1])
    x, weight, bias = Case(2, 40, 13, 12, 36, (3, 3), 1, 1).arrays(rng, np.float32, "NHWC")
    options = {"algorithm": algorithm, "layout": "NHWC"}
    expected = kernels.conv2d(x, weight, bias, **options)
    prepared, start, results = prepare_conv2d(weight, bias, **options), threading.Barrier(4, timeout=60), []

    def work():
        start.wait()
        results.extend(prepared(x) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(packed) == 1
    assert len(results) == 80
    for y in results:
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_number_of_threads_gives_the_same_bits(rng, split_everything, layout):
    x, weight, bias = Case(1, 64, 28, 28, 66, (3, 3), 1, 1).arrays(rng, np.float32, layout)
    for algorithm in ("gemm", "winograd"):
        prepared, results = prepare_conv2d(weight, bias, padding=1, layout=layout, algorithm=algorithm), []
        for threads in (1, 2, 3):
            with tilewise.using(backend="cpu", threads=threads):
                results.append(prepared(x).tobytes())
        assert results[0] == results[1] == results[2]


# ------------------------------------------------------------------------------------------------------ wrong calls

w, b, image = np.ones((4, 3, 3, 3)), np.ones(4), np.ones((2, 3, 8, 8))
good = (b, b, b, b, 1e-5)
WRONG = [
    (lambda: prepare_conv2d(None), TypeError, "prepare_conv2d: weight must be an array, got None"),
    (
        lambda: prepare_conv2d(w.tolist()),
        TypeError,
        "prepare_conv2d: weight must be a NumPy array or a CPU torch tensor",
    ),
    (lambda: prepare_conv2d(w[0]), ValueError, r"prepare_conv2d: weight must have 4 dimensions, got shape \(3, 3, 3\)"),
    (lambda: prepare_conv2d(w[:0]), ValueError, "prepare_conv2d: weight must have at least one of everything"),
    (lambda: prepare_conv2d(w.astype(int)), TypeError, "prepare_conv2d: weight is int64, which is not supported"),
    (lambda: prepare_conv2d(w, b.astype("f4")), TypeError, "prepare_conv2d: bias is float32 but weight is float64"),
    (lambda: prepare_conv2d(w, b[:3]), ValueError, r"prepare_conv2d: bias must have shape \(4,\)"),
    (lambda: prepare_conv2d(w, stride=0), ValueError, "prepare_conv2d: stride must be at least 1, got 0"),
    (lambda: prepare_conv2d(w, dilation=1.5), TypeError, "prepare_conv2d: dilation must be an int, got 1.5"),
    (lambda: prepare_conv2d(w, padding="full"), ValueError, "prepare_conv2d: padding must be an int, a pair"),
    (lambda: prepare_conv2d(w, padding=-1), ValueError, "prepare_conv2d: padding must be at least 0, got -1"),
    (lambda: prepare_conv2d(w, groups=3), ValueError, "prepare_conv2d: groups=3 does not divide the 4 output channels"),
    (lambda: prepare_conv2d(w, layout="CHWN"), ValueError, 'prepare_conv2d: layout must be "NCHW" or "NHWC"'),
    (lambda: prepare_conv2d(w, activation="gelu"), ValueError, "prepare_conv2d: activation must be None or one of"),
    (lambda: prepare_conv2d(w, algorithm="fft"), ValueError, "prepare_conv2d: algorithm must be one of auto"),
    (
        lambda: prepare_conv2d(w, batch_norm=b),
        TypeError,
        r"batch_norm must be \(running_mean, running_var, weight, bias, e",
    ),
    (lambda: prepare_conv2d(w, batch_norm=good[:4]), TypeError, r"batch_norm must be \(running_mean, running_var"),
    (lambda: prepare_conv2d(w, batch_norm=(None, *good[1:])), TypeError, "batch_norm's running_mean must be an array"),
    (
        lambda: prepare_conv2d(w, batch_norm=(b, 1.0, *good[2:])),
        TypeError,
        "batch_norm's running_var must be a NumPy a",
    ),
    (
        lambda: prepare_conv2d(w, batch_norm=(b, b[:2], *good[2:])),
        ValueError,
        r"running_var must have shape \(4,\), got",
    ),
    (
        lambda: prepare_conv2d(w, batch_norm=(*good[:3], b.astype("f4"), 0)),
        TypeError,
        "batch_norm's bias is float32 but",
    ),
    (
        lambda: prepare_conv2d(w, batch_norm=(*good[:4], -1)),
        ValueError,
        "batch_norm's eps must be at least 0 and finite",
    ),
    (lambda: prepare_conv2d(w, batch_norm=(*good[:4], None)), TypeError, "batch_norm's eps must be a number, got None"),
    (lambda: prepare_conv2d(w)(None), TypeError, "conv2d: x must be an array, got None"),
    (lambda: prepare_conv2d(w)(None, add=image), TypeError, "conv2d: x must be an array, got None"),
    (lambda: prepare_conv2d(w)(image.tolist()), TypeError, "conv2d: x must be a NumPy array or a CPU torch tensor"),
    (lambda: prepare_conv2d(w)(image[:, :2]), ValueError, "conv2d: weight expects 3 channels per group but x has 2"),
    (lambda: prepare_conv2d(w)(image.astype("f4")), TypeError, "conv2d: weight is float64 but x is float32"),
    (lambda: prepare_conv2d(w.astype("f2"))(image.astype("f4")), TypeError, "weight is float16 but x is float32"),
    (
        lambda: prepare_conv2d(w)(image[:, :, :2]),
        ValueError,
        "conv2d: the kernel spans 3 rows but x with its padding has 2",
    ),
    (
        lambda: prepare_conv2d(w)(image, add=image),
        ValueError,
        r"conv2d: add must have the result's shape \(2, 4, 6, 6\)",
    ),
    (lambda: prepare_conv2d(w)(image, add=image.astype("f4")), TypeError, "conv2d: add is float32 but x is float64"),
    (lambda: prepare_conv2d(w)(image, out=image), ValueError, r"conv2d: out must have shape \(2, 4, 6, 6\)"),
    (lambda: prepare_conv2d(w, stride=2, algorithm="winograd")(image), ValueError, "'winograd' does not apply"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_wrong_calls(call, error, message):
    with tilewise.using(backend="cpu"), pytest.raises(error, match=message):
        call()


def test_a_tensor_that_requires_grad_is_refused(torch):
    with pytest.raises(TypeError, match=r"prepare_conv2d: weight requires grad"):
        prepare_conv2d(torch.nn.Conv2d(3, 4, 3).weight)
