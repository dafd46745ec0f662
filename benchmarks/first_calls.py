"""One call of every op family member, small enough for the serial form of its kernels or large enough for the parallel.

Small is not tiny: below some thousand FLOPs another, simpler kernel would answer.
"""

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module

import numpy as np

SERIAL, PARALLEL = "serial", "parallel"
# (batch, channels, height and width) of the images, and (rows, depth, columns) of the matrices, for each form.
_IMAGE = {SERIAL: (1, 16, 12), PARALLEL: (8, 64, 56)}
_MATRIX = {SERIAL: (48, 48, 48), PARALLEL: (512, 512, 512)}


def names() -> list[str]:
    return [name for name, _, _ in _calls(SERIAL)]


def prepared(name: str, form: str) -> partial:
    """The call; its function, NumPy, Numba and the modules of its family are loaded, none of its kernels is."""
    ((op, arguments),) = [(op, arguments) for known, op, arguments in _calls(form) if known == name]
    import tilewise

    function = getattr(tilewise, op)
    family = function.__module__.rpartition(".")[2]
    import_module(f"tilewise.kernels.cpu.{family}")
    args, options = arguments()
    return partial(function, *args, **options)


def _calls(form: str) -> Iterator[tuple[str, str, Callable[[], tuple[tuple, dict]]]]:
    """(name, function, its operands and options when called)."""
    yield from _products(form)
    for layout in ("NCHW", "NHWC"):
        yield from _convolutions(form, layout)
    yield from _pools(form)
    yield from _elementwise(form)
    yield from _recurrent(form)


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def _products(form: str):
    m, k, n = _MATRIX[form]
    yield "matmul", "matmul", lambda: ((_normal(m, k), _normal(k, n)), {})
    yield "linear", "linear", lambda: ((_normal(m, k), _normal(n, k), _normal(n)), {"activation": "relu"})
    yield "linear_backward", "linear_backward", lambda: ((_normal(m, n), _normal(m, k), _normal(n, k)), {})


def _convolutions(form: str, layout: str):
    batch, channels, size = _IMAGE[form]

    def image(size: int) -> np.ndarray:
        return _normal(batch, channels, size, size) if layout == "NCHW" else _normal(batch, size, size, channels)

    def forward(kernel: int, groups: int = 1, algorithm: str = "auto"):
        options = {"padding": kernel // 2, "groups": groups, "layout": layout, "algorithm": algorithm}
        return (image(size), _normal(channels, channels // groups, kernel, kernel), _normal(channels)), options

    def backward(kernel: int, stride: int = 1, groups: int = 1):
        padding = kernel // 2
        grad = image((size + 2 * padding - kernel) // stride + 1)
        options = {"stride": stride, "padding": padding, "groups": groups, "layout": layout}
        return (grad, image(size), _normal(channels, channels // groups, kernel, kernel)), options

    for algorithm in ("gemm", "winograd"):
        yield f"conv2d 3x3 {algorithm} {layout}", "conv2d", partial(forward, 3, algorithm=algorithm)
    yield f"conv2d 1x1 {layout}", "conv2d", partial(forward, 1)
    yield f"conv2d depthwise {layout}", "conv2d", partial(forward, 3, groups=channels)
    yield f"conv2d_backward 3x3 {layout}", "conv2d_backward", partial(backward, 3)
    yield f"conv2d_backward 3x3 s2 {layout}", "conv2d_backward", partial(backward, 3, 2)
    yield f"conv2d_backward depthwise {layout}", "conv2d_backward", partial(backward, 3, groups=channels)


def _pools(form: str):
    batch, channels, size = _IMAGE[form]
    shape, half = (batch, channels, size, size), (batch, channels, size // 2, size // 2)
    first = {"indices": np.zeros(half, np.int64), "input_shape": shape}  # every maximum at the first pixel: valid
    yield "max_pool2d", "max_pool2d", lambda: ((_normal(*shape), 3, 2, 1), {})
    yield "max_pool2d indices", "max_pool2d", lambda: ((_normal(*shape), 2), {"return_indices": True})
    yield "max_pool2d_backward", "max_pool2d_backward", lambda: ((_normal(*half),), first | {"kernel_size": 2})
    yield "avg_pool2d", "avg_pool2d", lambda: ((_normal(*shape), 2), {})
    yield "avg_pool2d_backward", "avg_pool2d_backward", lambda: ((_normal(*half), shape, 2), {})
    for name in ("adaptive_avg_pool2d", "adaptive_max_pool2d"):
        yield name, name, lambda: ((_normal(*shape), 2), {})
    at = np.zeros((batch, channels, 2, 2), np.int64)
    quarter = at.shape
    yield "adaptive_avg_pool2d_backward", "adaptive_avg_pool2d_backward", lambda: ((_normal(*quarter), shape), {})
    yield "adaptive_max_pool2d_backward", "adaptive_max_pool2d_backward", lambda: ((_normal(*quarter), at, shape), {})


def _elementwise(form: str):
    batch, channels, size = _IMAGE[form]
    shape, ones = (batch, channels, size, size), np.ones(channels, np.float32)
    for training in (True, False):
        yield (
            f"batch_norm {'training' if training else 'evaluation'}",
            "batch_norm",
            lambda training=training: ((_normal(*shape), ones.copy(), ones.copy(), ones, ones, training), {}),
        )
    last = batch, size, size, channels
    for name, laid, layout in (("batch_norm_backward", shape, "NCHW"), ("batch_norm_backward NHWC", last, "NHWC")):
        yield (
            name,
            "batch_norm_backward",
            lambda laid=laid, layout=layout: ((_normal(*laid), _normal(*laid), ones, ones), {"layout": layout}),
        )
    yield "relu", "relu", lambda: ((_normal(*shape),), {})
    yield "relu_backward", "relu_backward", lambda: ((_normal(*shape), _normal(*shape)), {})
    yield "dropout", "dropout", lambda: ((_normal(*shape),), {"seed": 0})
    yield "softmax", "softmax", lambda: ((_normal(batch * size, channels),), {"axis": -1})
    yield "pad", "pad", lambda: ((_normal(*shape), 1), {})
    yield "adam_step", "adam_step", lambda: (tuple(np.ones(shape, np.float32) for _ in range(4)), {"step": 1})


def _recurrent(form: str):
    steps, n, features, size = (8, 8, 32, 32) if form == SERIAL else (16, 32, 64, 128)
    weights = (4 * size, features), (4 * size, size)
    yield "lstm", "lstm", lambda: ((_normal(steps, n, features), *(_normal(*shape) for shape in weights)), {})
