"""Wrong calls of the GEMM and convolution families: the kind of error, and a message that says what would be right."""

import numpy as np
import pytest

import tilewise
from tilewise.kernels import (
    conv2d,
    conv2d_backward,
    conv_transpose2d,
    conv_transpose2d_backward,
    linear,
    linear_backward,
    matmul,
    matmul_backward,
)

f32, f64, eye = np.ones((2, 3), np.float32), np.ones((2, 3)), np.eye(2)
GEMM = [
    (lambda: matmul(f32, f64.T), TypeError, r"matmul: b is float64 but a is float32; the dtypes must match"),
    (lambda: matmul(f64 > 0, f64.T > 0), TypeError, r"matmul: a is bool, which is not supported"),
    (lambda: matmul(f64 + 1j, f64.T + 1j), TypeError, r"matmul: a is complex128, which is not supported"),
    (lambda: matmul(f64.astype(">f8"), f64.T.astype(">f8")), TypeError, r"matmul: a is >f8"),
    (lambda: matmul(f64.astype("f2"), f64.T), TypeError, r"matmul: b is float64 but a is float16"),
    (lambda: matmul(f64, None), TypeError, r"matmul: b must be an array, got None"),
    (lambda: matmul(None, f64), TypeError, r"matmul: a must be an array, got None"),
    (lambda: matmul([[1.0]], f64), TypeError, r"matmul: a must be a NumPy array or a CPU torch tensor, got list"),
    (lambda: matmul(f64, f64), ValueError, r"matmul: a's last axis is 3 but b's second to last is 2 \(a \(2, 3\), b"),
    (lambda: matmul(f64, f64[:, 0]), ValueError, r"matmul: a's last axis is 3 but b's last is 2"),
    (lambda: matmul(np.ones(()), f64), ValueError, r"matmul: a and b must have at least 1 dimension"),
    (lambda: matmul(np.ones((2, 4, 3)), np.ones((3, 3, 4))), ValueError, r"leading axes \(2,\) and \(3,\) do not"),
    (lambda: matmul(f64, f64.T, out=np.zeros((2, 3))), ValueError, r"out must have shape \(2, 2\) and dtype float64"),
    (lambda: matmul(f64, f64.T, out=np.zeros((2, 2), "f4")), ValueError, r"dtype float64, got .* float32"),
    (lambda: matmul_backward(f64, f64, f64.T), ValueError, r"grad must have shape \(2, 2\) \(a \(2, 3\) @ b"),
    (lambda: matmul_backward(None, f64, f64.T), TypeError, r"matmul_backward: grad must be an array, got None"),
    (lambda: matmul_backward(eye, f64, f64.T, needs="a"), TypeError, r"needs must be a tuple of names"),
    (lambda: matmul_backward(eye, f64, f64.T, needs=("x",)), ValueError, r"needs may hold 'a', 'b', got 'x'"),
    (lambda: matmul_backward(np.eye(2, dtype=int), np.eye(2, dtype=int), np.eye(2, dtype=int)), TypeError, r"int64"),
    (lambda: linear(f64, f64.T), ValueError, r"linear: weight expects 2 features but x has 3 \(x \(2, 3\), weight"),
    (lambda: linear(f64, np.ones(3)), ValueError, r"weight must have shape \(out_features, in_features\), got \(3,\)"),
    (lambda: linear(np.ones(()), f64), ValueError, r"linear: x must have at least 1 dimension"),
    (lambda: linear(f64, None), TypeError, r"linear: weight must be an array, got None"),
    (lambda: linear(f64, f64, np.ones(3)), ValueError, r"linear: bias must have shape \(2,\), .* got \(3,\)"),
    (lambda: linear(f64, f64, np.ones(2, "f4")), TypeError, r"linear: bias is float32 but x is float64"),
    (lambda: linear(f64, f64, activation="gelu"), ValueError, r'activation must be None or one of "relu"'),
    (lambda: linear(f64.astype(int), f64.astype(int)), TypeError, r"linear: x is int64, which is not supported"),
    (lambda: linear_backward(f64, f64, f64), ValueError, r"grad must have shape \(2, 2\) \(x \(2, 3\), weight"),
    (
        lambda: linear_backward(eye, f64, f64, needs=("a",)),
        ValueError,
        r"needs may hold 'x', 'weight', 'bias', got 'a'",
    ),
]

x, w = np.ones((2, 3, 8, 8)), np.ones((4, 3, 3, 3))
narrow, deep = np.ones((4, 5, 3, 3)), np.ones((4, 1, 3, 3))
y = np.ones((2, 4, 6, 6))
CONV = [
    (
        lambda: conv2d(x, narrow),
        ValueError,
        r"^conv2d: weight expects 5 channels per group but x has 3 "
        r"\(x \(2, 3, 8, 8\), weight \(4, 5, 3, 3\), groups=1\)$",
    ),
    (lambda: conv2d(x, w, layout="NHWC"), ValueError, r"weight expects 3 channels per group but x has 8"),
    (lambda: conv2d(x, w[0]), ValueError, r"conv2d: weight must have 4 dimensions, got shape \(3, 3, 3\)"),
    (
        lambda: conv2d(x[0, 0], w),
        ValueError,
        r"conv2d: x must have 4 dimensions \(N, C, H, W\), or 3 without",
    ),
    (lambda: conv2d(x, None), TypeError, r"conv2d: weight must be an array, got None"),
    (lambda: conv2d(x.tolist(), w), TypeError, r"conv2d: x must be a NumPy array or a CPU torch tensor, got list"),
    (lambda: conv2d(x, w.astype("f4")), TypeError, r"conv2d: weight is float32 but x is float64"),
    (lambda: conv2d(x.astype(int), w.astype(int)), TypeError, r"conv2d: x is int64, which is not supported"),
    (lambda: conv2d(x.astype("f2"), w), TypeError, r"conv2d: weight is float64 but x is float16"),
    (lambda: conv2d(x, w, np.ones(3)), ValueError, r"conv2d: bias must have shape \(4,\), .* got \(3,\)"),
    (lambda: conv2d(x, w, np.ones((4, 1))), ValueError, r"conv2d: bias must have shape \(4,\), .* got \(4, 1\)"),
    (lambda: conv2d(x, w, stride=0), ValueError, r"conv2d: stride must be at least 1, got 0"),
    (lambda: conv2d(x, w, stride=1.0), TypeError, r"conv2d: stride must be an int, got 1.0"),
    (lambda: conv2d(x, w, stride=True), TypeError, r"conv2d: stride must be an int, got True"),
    (lambda: conv2d(x, w, stride=(1, 2, 3)), ValueError, r"conv2d: stride must be an int or a pair \(height, width\)"),
    (lambda: conv2d(x, w, dilation=0), ValueError, r"conv2d: dilation must be at least 1, got 0"),
    (lambda: conv2d(x, w, padding=-1), ValueError, r"conv2d: padding must be at least 0, got -1"),
    (lambda: conv2d(x, w, padding=0.5), TypeError, r"conv2d: padding must be an int, got 0.5"),
    (lambda: conv2d(x, w, padding="full"), ValueError, r'padding must be an int, a pair, two pairs, "valid", "same"'),
    (lambda: conv2d(x, w, groups=0), ValueError, r"conv2d: groups must be at least 1, got 0"),
    (lambda: conv2d(x, w, groups=2), ValueError, r"conv2d: groups=2 does not divide the 3 channels of x"),
    (lambda: conv2d(x, deep, groups=3), ValueError, r"groups=3 does not divide the 4 output channels of weight"),
    (lambda: conv2d(x, w, groups="3"), TypeError, r"conv2d: groups must be an int, got '3'"),
    (lambda: conv2d(x, w, layout="NWHC"), ValueError, r'conv2d: layout must be "NCHW" or "NHWC", got \'NWHC\''),
    (lambda: conv2d(x, w, activation="swish"), ValueError, r"activation must be None or one of .* got 'swish'"),
    (lambda: conv2d(x, w, algorithm="fft"), ValueError, r"algorithm must be one of auto, direct, .* got 'fft'"),
    (lambda: conv2d(x, np.ones((4, 3, 9, 3))), ValueError, r"the kernel spans 9 rows but x with its padding has 8"),
    (lambda: conv2d(x, w, padding=(2, 0), dilation=4), ValueError, r"spans 9 columns but x with its padding has 8"),
    (lambda: conv2d(x, np.ones((4, 3, 0, 3))), ValueError, r"weight must have at least one of everything, got shape"),
    (lambda: conv2d(x, w[:0]), ValueError, r"weight must have at least one of everything, got shape \(0, 3, 3, 3\)"),
    (lambda: conv2d(x[:, :0], w[:, :0]), ValueError, r"at least one of everything, got shape \(4, 0, 3, 3\)"),
    (lambda: conv2d(x[:, :0], w), ValueError, r"x has no channels \(shape \(2, 0, 8, 8\), layout NCHW\)"),
    (lambda: conv2d(x[:, :, :0], w, padding=2), ValueError, r"conv2d: x has no pixels \(shape \(2, 3, 0, 8\)"),
    (lambda: conv2d(x, w, out=np.zeros((2, 4, 6, 7))), ValueError, r"out must have shape \(2, 4, 6, 6\) and dtype"),
    (lambda: conv2d(x[0], w, out=np.zeros((1, 4, 6, 6))), ValueError, r"out must have shape \(4, 6, 6\)"),
    (lambda: conv2d_backward(x, x, w), ValueError, r"^conv2d_backward: grad must have shape \(2, 4, 6, 6\), got"),
    (lambda: conv2d_backward(y, x[0], w), ValueError, r"grad must have shape \(4, 6, 6\), got \(2, 4, 6, 6\)"),
    (lambda: conv2d_backward(y[0], x, w), ValueError, r"grad must have shape \(2, 4, 6, 6\), got \(4, 6, 6\)"),
    (lambda: conv2d_backward(y, x, None), TypeError, r"conv2d_backward: weight must be an array, got None"),
    (lambda: conv2d_backward(y, x, narrow), ValueError, r"conv2d_backward: weight expects 5 channels per group"),
    (lambda: conv2d_backward(y, x, w, needs=("x", "b")), ValueError, r"needs may hold 'x', 'weight', 'bias', got 'b'"),
    (lambda: conv2d_backward(y, x, w, needs="x"), TypeError, r"needs must be a tuple of names out of"),
    (lambda: conv2d_backward(y.astype("f4"), x, w), TypeError, r"x is float64 but grad is float32"),
    (lambda: conv_transpose2d(x, w), ValueError, r"^conv_transpose2d: weight expects 4 channels but x has 3 \(x"),
    (lambda: conv_transpose2d(y, w, groups=3), ValueError, r"groups=3 does not divide the 4 channels of x"),
    (lambda: conv_transpose2d(y, w, padding="same"), ValueError, r"padding 'same' is not known here; use an int"),
    (lambda: conv_transpose2d(y, w, padding=4), ValueError, r"the result would have 0 x 0 pixels"),
    (lambda: conv_transpose2d(y, w, None, 2, 0, 2), ValueError, r"output_padding must be less than the larger of"),
    (lambda: conv_transpose2d(y, w, output_padding=-1), ValueError, r"output_padding must be at least 0, got -1"),
    (lambda: conv_transpose2d(y, w, np.ones(4)), ValueError, r"bias must have shape \(3,\), .* got \(4,\)"),
    (
        lambda: conv_transpose2d_backward(y, y, w),
        ValueError,
        r"grad must have shape \(2, 3, 8, 8\), got \(2, 4, 6, 6\)",
    ),
    (lambda: conv_transpose2d_backward(x, y, w, needs=("a",)), ValueError, r"needs may hold 'x', 'weight', 'bias'"),
]


@pytest.mark.parametrize(("call", "error", "message"), GEMM + CONV, ids=[case[2] for case in GEMM + CONV])
def test_wrong_calls_say_what_is_wrong(call, error, message):
    with tilewise.using(backend="reference"), pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("algorithm", ["winograd", "depthwise"])
def test_an_algorithm_that_does_not_apply_is_refused(algorithm):
    with tilewise.using(backend="cpu"), pytest.raises(ValueError, match=rf"conv2d: .*{algorithm}"):
        conv2d(x, np.ones((4, 3, 5, 5)), algorithm=algorithm)
