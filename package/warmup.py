"""Compiling the kernels into the cache before they are needed: every public function, in serial and in parallel form.

A kernel is compiled for the types of its arguments and, where an op has several algorithms, for the one that the shape
asks for. So this calls the functions: on the benchmark's layers at batch 1, which reach the algorithms that real
networks reach, and on tiny inputs for what no layer there uses.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np

import tilewise
from tilewise.kernels.cpu import jit, threads

DTYPES = ("float32", "float64")
EPILOGUES = ("relu", "leaky_relu", "sigmoid", "tanh")
ACTIVATIONS = (*EPILOGUES, "softmax", "log_softmax")
Calls = Iterator[tuple[str, Callable[[], object]]]


def calls(dtype: str) -> Calls:
    """(what, a call that compiles it), for every public function."""
    for form, serial_below in (("serial", float("inf")), ("parallel", 0)):
        for name, call in (*_layers(dtype), *_gemm(dtype), *_images(dtype), *_elementwise(dtype)):
            yield f"{name}, {form}", _forced(call, serial_below)


def forms() -> tuple[int, int]:
    """(compiled, all) forms of the kernels of the modules loaded so far."""
    existing = [form for kernel in jit.KERNELS for form in ("serial", "parallel")[: 1 + kernel.has_parallel]]
    compiled = [
        kernel
        for kernel in jit.KERNELS
        for form in ("serial", "parallel")
        if form in kernel.__dict__ and getattr(kernel, form).signatures
    ]
    return len(compiled), len(existing)


def _forced(call: Callable[[], object], serial_below: float) -> Callable[[], object]:
    def forced():
        with _serial_below(serial_below):
            return call()

    return forced


@contextmanager
def _serial_below(nanoseconds: float):
    before = threads.SERIAL_BELOW
    threads.SERIAL_BELOW = nanoseconds
    try:
        yield
    finally:
        threads.SERIAL_BELOW = before


def _operands(dtype: str) -> Callable[..., np.ndarray]:
    rng = np.random.default_rng(0)
    return lambda *shape: rng.standard_normal(shape, dtype=np.dtype(dtype))


def _layers(dtype: str) -> Calls:
    from tilewise.benchmarks import cases, timing

    for key, case in cases.QUICK.items():
        yield key, lambda case=case: timing.prepared(case.with_batch(1), dtype)()


def _gemm(dtype: str) -> Calls:
    a, t = _operands(dtype), tilewise
    for m, k, n in ((1, 9, 1), (1, 9, 40), (40, 9, 1), (3, 3, 3), (40, 40, 40)):
        yield f"matmul {m}x{k}x{n}", lambda m=m, k=k, n=n: t.matmul(a(m, k), a(k, n))
        yield f"matmul_backward {m}x{k}x{n}", lambda m=m, k=k, n=n: t.matmul_backward(a(m, n), a(m, k), a(k, n))
    yield "matmul, batched", lambda: t.matmul(a(2, 8, 8), a(8, 8))
    for activation in (None, *EPILOGUES):
        yield f"linear, {activation}", lambda f=activation: t.linear(a(4, 9), a(5, 9), a(5), activation=f)
    yield "linear_backward", lambda: t.linear_backward(a(4, 5), a(4, 9), a(5, 9))


def _images(dtype: str) -> Calls:
    """Convolution, pooling and batch norm on 2 images of 8 channels and 9x9 pixels, in both layouts; padding."""
    a, t = _operands(dtype), tilewise
    for layout in ("NCHW", "NHWC"):
        for part in (_convolutions, _pools, _batch_norms):
            yield from ((f"{name}, {layout}", call) for name, call in part(a, layout))
    for mode in ("constant", "reflect", "replicate", "circular"):
        yield f"pad {mode}", lambda mode=mode: t.pad(a(2, 3, 5, 5), 2, mode)
        yield f"pad_backward {mode}", lambda mode=mode: t.pad_backward(a(2, 3, 9, 9), (2, 3, 5, 5), 2, mode)


def _image(a, layout: str, size: int = 9) -> np.ndarray:
    return a(2, 8, size, size) if layout == "NCHW" else a(2, size, size, 8)


def _convolutions(a, layout: str) -> Calls:
    t, x = tilewise, partial(_image, a, layout)
    at, pointwise = {"layout": layout}, a(8, 8, 1, 1)
    for groups in (1, 2, 8):
        w, o = a(8, 8 // groups, 3, 3), at | {"groups": groups}
        of = f"groups {groups}"
        yield f"conv2d {of}", lambda w=w, o=o: t.conv2d(x(), w, a(8), **o)
        yield f"conv2d dilated {of}", lambda w=w, o=o: t.conv2d(x(), w, dilation=2, **o)
        yield f"conv2d_backward {of}", lambda w=w, o=o: t.conv2d_backward(x(7), x(), w, **o)
        yield f"conv_transpose2d {of}", lambda w=w, o=o: t.conv_transpose2d(x(), w, a(8), **o)
        yield f"conv_transpose2d_backward {of}", lambda w=w, o=o: t.conv_transpose2d_backward(x(11), x(), w, **o)
    yield "conv2d_backward 1x1", lambda: t.conv2d_backward(x(), x(), pointwise, **at)
    for activation in (None, *EPILOGUES):
        yield f"conv2d 1x1 {activation}", lambda f=activation: t.conv2d(x(), pointwise, a(8), activation=f, **at)


def _pools(a, layout: str) -> Calls:
    t, x = tilewise, partial(_image, a, layout)
    at, shape = {"layout": layout}, _image(a, layout).shape

    def indices(size: int) -> np.ndarray:
        return np.zeros(x(size).shape, np.int64)

    for k, s in ((2, 2), (3, 2), (3, 1), (5, 3)):
        yield f"max_pool2d {k}x{k} s{s}", lambda k=k, s=s: t.max_pool2d(x(), k, s, **at)
        yield f"avg_pool2d {k}x{k} s{s}", lambda k=k, s=s: t.avg_pool2d(x(), k, s, **at)
    yield "max_pool2d indices", lambda: t.max_pool2d(x(), 3, return_indices=True, **at)
    yield "max_pool2d dilated", lambda: t.max_pool2d(x(), 3, dilation=2, **at)
    yield "max_pool2d_backward", lambda: t.max_pool2d_backward(x(3), indices(3), shape, 3, **at)
    yield "avg_pool2d_backward", lambda: t.avg_pool2d_backward(x(3), shape, 3, **at)
    yield "adaptive_avg_pool2d", lambda: t.adaptive_avg_pool2d(x(), 2, **at)
    yield "adaptive_avg_pool2d_backward", lambda: t.adaptive_avg_pool2d_backward(x(2), shape, **at)
    yield "adaptive_max_pool2d", lambda: t.adaptive_max_pool2d(x(), 2, **at)
    yield "adaptive_max_pool2d indices", lambda: t.adaptive_max_pool2d(x(), 2, True, **at)
    yield "adaptive_max_pool2d_backward", lambda: t.adaptive_max_pool2d_backward(x(2), indices(2), shape, **at)
    yield "max_unpool2d", lambda: t.max_unpool2d(x(3), indices(3), 3, **at)
    yield "max_unpool2d_backward", lambda: t.max_unpool2d_backward(x(), indices(3), **at)


def _batch_norms(a, layout: str) -> Calls:
    t, x, at = tilewise, partial(_image, a, layout), {"layout": layout}
    for training in (True, False):
        o = at | {"training": training}
        of = "training" if training else "inference"
        yield f"batch_norm {of}", lambda o=o: t.batch_norm(x(), a(8), abs(a(8)), a(8), a(8), **o)
        yield f"batch_norm_backward {of}", lambda o=o: t.batch_norm_backward(x(), x(), a(8), abs(a(8)), a(8), **o)
    for activation in EPILOGUES:
        o = at | {"activation": activation}
        yield f"batch_norm {activation}", lambda o=o: t.batch_norm(x(), a(8), abs(a(8)), **o)


def _elementwise(dtype: str) -> Calls:
    a, t = _operands(dtype), tilewise
    for name in (*ACTIVATIONS, "step", "sign"):
        yield name, lambda name=name: getattr(t, name)(a(4, 9))
    for name in ACTIVATIONS:
        yield f"{name}_backward", lambda name=name: getattr(t, f"{name}_backward")(a(4, 9), a(4, 9))
