"""The same call on a tiny input in tilewise and in PyTorch: what a call costs besides its work."""

from collections.abc import Callable, Iterator

import numpy as np

import tilewise

Pair = tuple[str, Callable[[], object], Callable[[], object]]  # what, ours on NumPy arrays, theirs on tensors


def tensors(torch, *arrays: np.ndarray) -> tuple:
    return tuple(torch.from_numpy(array) for array in arrays)


def tiny_calls(torch) -> Iterator[Pair]:
    """Every public function on a 1x1x8x8 image (8x8 matrices), where the call costs more than the work."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 1, 8, 8), dtype=np.float32)
    w = rng.standard_normal((1, 1, 3, 3), dtype=np.float32)
    yield from _tiny_products(torch, x[0, 0].copy())
    yield from _tiny_convolutions(torch, x, w)
    yield from _tiny_pools(torch, x)
    yield from _tiny_elementwise(torch, x)


def _tiny_products(torch, a: np.ndarray) -> Iterator[Pair]:
    bias = a[0].copy()
    A, B = tensors(torch, a, bias)
    ours, theirs = tilewise, torch.nn.functional
    yield "matmul", lambda: ours.matmul(a, a), lambda: torch.mm(A, A)
    yield "matmul_backward", lambda: ours.matmul_backward(a, a, a), lambda: (torch.mm(A, A.T), torch.mm(A.T, A))
    yield "linear", lambda: ours.linear(a, a, bias), lambda: theirs.linear(A, A, B)
    yield (
        "linear_backward",
        lambda: ours.linear_backward(a, a, a),
        lambda: (torch.mm(A, A), torch.mm(A.T, A), A.sum(0)),
    )


def _tiny_convolutions(torch, x: np.ndarray, w: np.ndarray) -> Iterator[Pair]:
    bias = np.ones(1, np.float32)
    X, W, B = tensors(torch, x, w, bias)
    ours, theirs = tilewise, torch.nn.functional
    backward = torch.ops.aten.convolution_backward
    same = [1], [1, 1], [1, 1], [1, 1]  # sizes of the bias; stride, padding, dilation

    def gradients(transposed: bool):
        return lambda: backward(X, X, W, *same, transposed, [0, 0], 1, [True, True, True])

    yield "conv2d", lambda: ours.conv2d(x, w, bias, 1, 1), lambda: theirs.conv2d(X, W, B, 1, 1)
    yield "conv2d_backward", lambda: ours.conv2d_backward(x, x, w, 1, 1), gradients(False)
    yield (
        "conv_transpose2d",
        lambda: ours.conv_transpose2d(x, w, bias, 1, 1),
        lambda: theirs.conv_transpose2d(X, W, B, 1, 1),
    )
    yield "conv_transpose2d_backward", lambda: ours.conv_transpose2d_backward(x, x, w, 1, 1), gradients(True)
    yield "pad", lambda: ours.pad(x, 1), lambda: theirs.pad(X, (1, 1, 1, 1))
    padded = ours.pad(x, 1)
    (P,) = tensors(torch, padded)
    yield "pad_backward", lambda: ours.pad_backward(padded, x.shape, 1), lambda: theirs.pad(P, (-1, -1, -1, -1))


def _tiny_pools(torch, x: np.ndarray) -> Iterator[Pair]:
    ours, theirs, aten = tilewise, torch.nn.functional, torch.ops.aten
    y, at = ours.max_pool2d(x, 2, return_indices=True)
    X, Y, AT = tensors(torch, x, y, at)
    shape, window = x.shape, ([2, 2], [2, 2], [0, 0])
    yield "max_pool2d", lambda: ours.max_pool2d(x, 2), lambda: theirs.max_pool2d(X, 2)
    yield (
        "max_pool2d_backward",
        lambda: ours.max_pool2d_backward(y, at, shape, 2),
        lambda: aten.max_pool2d_with_indices_backward(Y, X, *window, [1, 1], False, AT),
    )
    yield "avg_pool2d", lambda: ours.avg_pool2d(x, 2), lambda: theirs.avg_pool2d(X, 2)
    yield (
        "avg_pool2d_backward",
        lambda: ours.avg_pool2d_backward(y, shape, 2),
        lambda: aten.avg_pool2d_backward(Y, X, *window, False, True, None),
    )
    yield "adaptive_avg_pool2d", lambda: ours.adaptive_avg_pool2d(x, 4), lambda: theirs.adaptive_avg_pool2d(X, 4)
    yield (
        "adaptive_avg_pool2d_backward",
        lambda: ours.adaptive_avg_pool2d_backward(y, shape),
        lambda: aten._adaptive_avg_pool2d_backward(Y, X),
    )
    yield "adaptive_max_pool2d", lambda: ours.adaptive_max_pool2d(x, 4), lambda: theirs.adaptive_max_pool2d(X, 4)
    yield (
        "adaptive_max_pool2d_backward",
        lambda: ours.adaptive_max_pool2d_backward(y, at, shape),
        lambda: aten.adaptive_max_pool2d_backward(Y, X, AT),
    )
    yield "max_unpool2d", lambda: ours.max_unpool2d(y, at, 2), lambda: theirs.max_unpool2d(Y, AT, 2)
    flat = AT.flatten(2)
    yield (
        "max_unpool2d_backward",
        lambda: ours.max_unpool2d_backward(x, at),
        lambda: X.flatten(2).gather(2, flat).view(AT.shape),
    )


def _tiny_elementwise(torch, x: np.ndarray) -> Iterator[Pair]:
    ours, theirs, aten = tilewise, torch.nn.functional, torch.ops.aten
    c = np.ones(1, np.float32)
    X, C, ZERO = tensors(torch, x, c, np.zeros((), np.float32))
    mean, var = np.zeros(1, np.float32), np.ones(1, np.float32)
    MEAN, VAR = tensors(torch, mean.copy(), var.copy())
    for training in (False, True):
        yield (
            f"batch_norm {'training' if training else 'inference'}",
            lambda t=training: ours.batch_norm(x, mean, var, c, c, t),
            lambda t=training: theirs.batch_norm(X, MEAN, VAR, C, C, t),
        )
    yield (
        "batch_norm_backward",
        lambda: ours.batch_norm_backward(x, x, c, c, c),
        lambda: aten.native_batch_norm_backward(X, X, C, C, C, C, C, True, 1e-5, [True, True, True]),
    )
    for name in ("relu", "leaky_relu", "sigmoid", "tanh", "softmax", "log_softmax"):
        options = (-1,) if "softmax" in name else ()
        mine, other = getattr(ours, name), getattr(torch if name in ("relu", "sigmoid", "tanh") else theirs, name)
        yield name, lambda f=mine, o=options: f(x, *o), lambda f=other, o=options: f(X, *o)
    yield "relu_backward", lambda: ours.relu_backward(x, x), lambda: aten.threshold_backward(X, X, 0)
    yield (
        "leaky_relu_backward",
        lambda: ours.leaky_relu_backward(x, x),
        lambda: aten.leaky_relu_backward(X, X, 0.01, True),
    )
    yield "sigmoid_backward", lambda: ours.sigmoid_backward(x, x), lambda: aten.sigmoid_backward(X, X)
    yield "tanh_backward", lambda: ours.tanh_backward(x, x), lambda: aten.tanh_backward(X, X)
    for name in ("softmax", "log_softmax"):
        mine, other = getattr(ours, f"{name}_backward"), getattr(aten, f"_{name}_backward_data")
        yield f"{name}_backward", lambda f=mine: f(x, x, -1), lambda f=other: f(X, X, -1, torch.float32)
    yield "step", lambda: ours.step(x), lambda: torch.heaviside(X, ZERO)
    yield "sign", lambda: ours.sign(x), lambda: torch.sign(X)
