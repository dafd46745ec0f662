"""Compiling the kernels into the cache before they are needed: every public function, in serial and in parallel form.

A kernel is compiled for the types of its arguments and, where an op has several algorithms, for the one that the shape
asks for. So this calls the functions: on the benchmark's layers at batch 1, which reach the algorithms that real
networks reach, and on tiny inputs for what no layer there uses.

The work is split into jobs, one for each op family and form, which no two processes share: two that compiled the same
kernel would each do the whole of it, and the cache would keep one.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np

import tilewise
from tilewise.benchmarks import cases, timing
from tilewise.kernels import operation
from tilewise.kernels.cpu import jit, threads

DTYPES = ("float32", "float64")
EPILOGUES = ("relu", "relu6", "leaky_relu", "sigmoid", "tanh")
ACTIVATIONS = ("relu", "leaky_relu", "sigmoid", "tanh", "softmax", "log_softmax")
# The estimated work below which a call stays serial, to force one form; None: as the work is.
FORMS: dict[str, float | None] = {"serial": float("inf"), "parallel": 0, "as needed": None}
Calls = Iterator[tuple[str, Callable[[], object]]]


@dataclass(frozen=True)
class Job:
    """What one process compiles."""

    family: str
    form: str
    dtypes: tuple[str, ...]

    def __str__(self):
        return f"{self.family} {'+'.join(self.dtypes)} {self.form}"


@dataclass(frozen=True)
class Outcome:
    """The kernel forms that a job compiled or loaded, as "name form", and the calls that have no implementation."""

    compiled: frozenset[str]
    missing: dict[str, str]


def jobs(dtypes: tuple[str, ...], for_bench: bool = False) -> list[Job]:
    """All jobs, or those for what `python -m tilewise bench` runs; the longest first."""
    if for_bench:
        timed = {case.family for case in cases.QUICK.values()}
        return [Job(family, "as needed", dtypes) for family in FAMILIES if family in timed]
    return [Job(family, form, dtypes) for family in FAMILIES for form in ("parallel", "serial")]


def run(todo: list[Job], processes: int) -> Iterator[tuple[Job, Outcome]]:
    """Run the jobs, each outcome as it comes."""
    if processes == 1:
        yield from ((job, run_job(job)) for job in todo)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(run_job, job): job for job in todo}
        for done in as_completed(running):
            yield running[done], done.result()


def run_job(job: Job) -> Outcome:
    missing = {}
    with _serial_below(FORMS[job.form]):
        for name, call in calls(job):
            try:
                call()
            except NotImplementedError as error:
                missing[name] = str(error)
    forms = [(kernel, form) for kernel in jit.KERNELS for form in ("serial", "parallel") if form in vars(kernel)]
    return Outcome(frozenset(f"{k.__name__} {form}" for k, form in forms if getattr(k, form).signatures), missing)


def calls(job: Job) -> Calls:
    for dtype in job.dtypes:
        for key, case in cases.QUICK.items():
            if case.family == job.family:
                case = case if job.form == "as needed" else case.with_batch(1)
                yield key, partial(_call_case, case, dtype)
        if job.form != "as needed":
            yield from FAMILIES[job.family](dtype)


def _call_case(case: cases.Case, dtype: str):
    return timing.prepared(case, dtype)()


@contextmanager
def _serial_below(nanoseconds: float | None):
    before = threads.SERIAL_BELOW
    threads.SERIAL_BELOW = before if nanoseconds is None else nanoseconds
    operation.forget_plans()
    try:
        yield
    finally:
        threads.SERIAL_BELOW = before
        operation.forget_plans()


def _operands(dtype: str) -> Callable[..., np.ndarray]:
    rng = np.random.default_rng(0)
    return lambda *shape: rng.standard_normal(shape, dtype=np.dtype(dtype))


def _gemm(dtype: str) -> Calls:
    a, t = _operands(dtype), tilewise
    for m, k, n in ((1, 9, 1), (1, 9, 40), (40, 9, 1), (3, 3, 3), (40, 40, 40)):
        yield f"matmul {m}x{k}x{n}", lambda m=m, k=k, n=n: t.matmul(a(m, k), a(k, n))
        yield f"matmul_backward {m}x{k}x{n}", lambda m=m, k=k, n=n: t.matmul_backward(a(m, n), a(m, k), a(k, n))
    yield "matmul, a long sum in parts", lambda: t.matmul(a(64, 2048), a(2048, 64))
    yield "matmul of stacks", lambda: t.matmul(a(2, 40, 40), a(2, 40, 40))
    yield "matmul_backward of stacks", lambda: t.matmul_backward(a(2, 9, 9), a(2, 9, 9), a(2, 9, 9))
    for activation in (None, *EPILOGUES):
        yield f"linear, {activation}", lambda f=activation: t.linear(a(4, 9), a(5, 9), a(5), activation=f)
    turned = np.asfortranarray(a(5, 9))
    yield "linear, weight in columns", lambda: t.linear(a(40, 9), turned, a(5), activation="relu")
    yield "linear of a few rows", lambda: t.linear(a(2, 99), a(99, 99))
    yield "linear_backward", lambda: t.linear_backward(a(4, 5), a(4, 9), a(5, 9))


def _in_both_layouts(part: Callable[..., Calls], dtype: str) -> Calls:
    """On 2 images of 8 channels and 9x9 pixels."""
    a = _operands(dtype)
    for layout in ("NCHW", "NHWC"):
        yield from ((f"{name}, {layout}", call) for name, call in part(a, layout))


def _pads(dtype: str) -> Calls:
    a, t = _operands(dtype), tilewise
    for mode in ("constant", "reflect", "replicate", "circular"):
        yield f"pad {mode}", lambda mode=mode: t.pad(a(2, 3, 5, 5), 2, mode)
        yield f"pad {mode}, long rows", lambda mode=mode: t.pad(a(2, 3, 5, 40), 2, mode)
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
    depthwise, same = a(8, 1, 3, 3), at | {"padding": 1, "groups": 8}
    yield "conv2d of each channel, same size", lambda: t.conv2d(x(), depthwise, **same)
    yield "conv2d_backward of each channel, same size", lambda: t.conv2d_backward(x(), x(), depthwise, **same)
    if layout == "NCHW":
        half = same | {"stride": 2}
        yield "conv2d of each channel, half the size", lambda: t.conv2d(x(), depthwise, **half)
        yield "conv2d_backward of each channel, half the size", lambda: t.conv2d_backward(x(5), x(), depthwise, **half)
        long = a(1, 8, 9, 40)  # a row of results is more than one vector
        yield "conv2d of each channel, half the size, long rows", lambda: t.conv2d(long, depthwise, **half)
        yield "conv2d_backward 1x1 with a stride", lambda: t.conv2d_backward(x(5), x(), pointwise, stride=2, **at)
    for algorithm in ("gemm", "direct"):
        yield f"conv2d {algorithm}", lambda f=algorithm: t.conv2d(x(), a(8, 8, 3, 3), algorithm=f, **at)
    for size in (9, 33) if a(1).dtype == np.float32 else ():  # few tiles and many
        yield f"conv2d winograd {size}", lambda s=size: t.conv2d(x(s), a(8, 8, 3, 3), algorithm="winograd", **at)
    for algorithm in ("gemm", "winograd") if a(1).dtype == np.float32 else ("gemm",):
        prepared = partial(t.prepare_conv2d, a(8, 8, 3, 3), algorithm=algorithm, **at)
        yield f"prepare_conv2d {algorithm}", lambda make=prepared: make()(x())
    if layout == "NCHW":  # joined to one long image
        yield "conv2d 1x1 of small images", lambda: t.conv2d(a(8, 512, 1, 3), a(512, 512, 1, 1))
        small = a(8, 32, 2, 2), a(8, 32, 4, 4), a(32, 32, 3, 3)
        yield "conv2d_backward of small images", lambda: t.conv2d_backward(*small, stride=2, padding=1)
    yield "conv2d_backward 1x1", lambda: t.conv2d_backward(x(), x(), pointwise, **at)
    many = a(16, 8, 12, 12) if layout == "NCHW" else a(16, 12, 12, 8)
    yield "conv2d_backward 1x1 of many images", lambda: t.conv2d_backward(many, many, pointwise, **at)
    image = a(2, 3, 9, 9) if layout == "NCHW" else a(2, 9, 9, 3)
    yield "conv2d_backward of few channels", lambda: t.conv2d_backward(x(7), image, a(8, 3, 3, 3), **at)
    large = a(2, 32, 32, 32)
    yield "conv2d_backward winograd", lambda: t.conv2d_backward(large, large, a(32, 32, 3, 3), padding=1, **at)
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
    yield "max_pool2d_backward s1", lambda: t.max_pool2d_backward(x(7), indices(7), shape, 3, 1, **at)
    yield "avg_pool2d_backward", lambda: t.avg_pool2d_backward(x(3), shape, 3, **at)
    yield "adaptive_avg_pool2d", lambda: t.adaptive_avg_pool2d(x(), 2, **at)
    yield "adaptive_avg_pool2d_backward", lambda: t.adaptive_avg_pool2d_backward(x(2), shape, **at)
    yield "adaptive_max_pool2d", lambda: t.adaptive_max_pool2d(x(), 2, **at)
    yield "adaptive_max_pool2d indices", lambda: t.adaptive_max_pool2d(x(), 2, True, **at)
    yield "adaptive_max_pool2d_backward", lambda: t.adaptive_max_pool2d_backward(x(2), indices(2), shape, **at)
    yield "max_unpool2d", lambda: t.max_unpool2d(x(3), indices(3), 3, **at)
    yield "max_unpool2d_backward", lambda: t.max_unpool2d_backward(x(), indices(3), **at)


def _batch_norms(a, layout: str) -> Calls:
    yield from _batch_norms_of(a, layout, "")
    yield from _batch_norms_of(lambda *shape: a(*shape).astype(np.float16), layout, " of float16")
    t, x, at = tilewise, partial(_image, a, layout), {"layout": layout}
    for activation in EPILOGUES:
        o = at | {"activation": activation}
        yield f"batch_norm {activation}", lambda o=o: t.batch_norm(x(), a(8), abs(a(8)), **o)


def _batch_norms_of(a, layout: str, dtype: str) -> Calls:
    t, x, at = tilewise, partial(_image, a, layout), {"layout": layout}
    for training in (True, False):
        o = at | {"training": training}
        of = f"training{dtype}" if training else f"inference{dtype}"
        yield f"batch_norm {of}", lambda o=o: t.batch_norm(x(), a(8), abs(a(8)), a(8), a(8), **o)
        yield f"batch_norm_backward {of}", lambda o=o: t.batch_norm_backward(x(), x(), a(8), abs(a(8)), a(8), **o)
        # Few channels in large planes are cut into blocks.
        yield f"batch_norm {of} in blocks", lambda o=o: t.batch_norm(x(72), a(8), abs(a(8)), a(8), a(8), **o)
        yield (
            f"batch_norm_backward {of} in blocks",
            lambda o=o: t.batch_norm_backward(x(72), x(72), a(8), abs(a(8)), a(8), **o),
        )


def _elementwise(dtype: str) -> Calls:
    a, t = _operands(dtype), tilewise
    for name in (*ACTIVATIONS, "step", "sign"):
        yield name, partial(getattr(t, name), a(4, 9))
    for name in ACTIVATIONS:
        yield f"{name}_backward", partial(getattr(t, f"{name}_backward"), a(4, 9), a(4, 9))
    yield "relu of float16", lambda: t.relu(a(40, 40).astype(np.float16))
    for name in ("softmax", "log_softmax"):
        yield f"{name} of columns", partial(getattr(t, name), a(2, 9, 4), axis=1)
        yield f"{name}_backward of columns", partial(getattr(t, f"{name}_backward"), a(2, 9, 4), a(2, 9, 4), axis=1)


def _dropouts(dtype: str) -> Calls:
    a, t = _operands(dtype), tilewise
    yield "dropout", lambda: t.dropout(a(4, 9), seed=1)
    yield "dropout_backward", lambda: t.dropout_backward(a(4, 9), seed=1)


def _optimizers(dtype: str) -> Calls:
    t = tilewise
    param, grad, square, velocity = (np.ones(40, dtype) for _ in range(4))
    yield "sgd_step", partial(t.sgd_step, param, grad, lr=0.1)
    yield "adagrad_step", partial(t.adagrad_step, param, grad, square)
    yield "rmsprop_step", partial(t.rmsprop_step, param, grad, square, velocity, momentum=0.5)
    yield "adam_step", partial(t.adam_step, param, grad, velocity, square, step=1)


def _recurrent(dtype: str) -> Calls:
    """A row, and enough of them that a step multiplies its own input."""
    a, t, size = _operands(dtype), tilewise, 5
    for n in (1, 8):
        x, grad, weights = a(3, n, 4), a(3, n, size), (a(4 * size, 4), a(4 * size, size))
        for nonlinearity in ("tanh", "relu"):
            options, few = {"nonlinearity": nonlinearity}, tuple(weight[:size] for weight in weights)
            hidden = a(4, n, size)
            yield f"rnn {nonlinearity}", partial(t.rnn, x, *few, **options)
            yield f"rnn_backward {nonlinearity}", partial(t.rnn_backward, grad, None, x, *few, hidden, **options)
        kept = a(4, n, size), a(4, n, size), a(3, n, 4 * size)
        yield "lstm", partial(t.lstm, x, *weights)
        yield "lstm_backward", partial(t.lstm_backward, grad, None, None, x, *weights, *kept)


FAMILIES: dict[str, Callable[[str], Calls]] = {
    "conv": partial(_in_both_layouts, _convolutions),
    "gemm": _gemm,
    "pool": partial(_in_both_layouts, _pools),
    "batchnorm": partial(_in_both_layouts, _batch_norms),
    "activation": _elementwise,
    "padding": _pads,
    "dropout_mask": _dropouts,
    "optim": _optimizers,
    "recurrent": _recurrent,
}
