"""Batch normalisation on the CPU: threads, ways to memory, estimates."""

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from batchnorm_cases import ACTIVATIONS, LAYOUTS, laid, plain, statistics

import tilewise
from tilewise import kernels


def test_bits_do_not_depend_on_the_thread_count(rng):
    shapes = [(4, 64, 40, 40), (8, 3, 120, 120), (40, 100, 7, 7)]
    for shape, layout, dtype in product(shapes, LAYOUTS, (np.float16, np.float32, np.float64)):
        x, grad = rng.standard_normal((2, *shape)).astype(dtype)
        vectors = statistics(rng, shape[1], dtype)
        results = []
        for threads in (1, 2, 3):
            running = [v.copy() for v in vectors[:2]]
            with tilewise.using(backend="cpu", threads=threads):
                forward = kernels.batch_norm(
                    laid(x, layout), *running, *vectors[2:], True, layout=layout, activation="relu", return_stats=True
                )
                evaluated = kernels.batch_norm(laid(x, layout), *vectors, layout=layout)
                backward = kernels.batch_norm_backward(
                    laid(grad, layout), laid(x, layout), *forward[1:], vectors[2], layout=layout
                )
            results.append([*forward, *running, evaluated, *backward])
        names = [
            "y",
            "mean",
            "invstd",
            "running_mean",
            "running_var",
            "evaluated",
            "grad_x",
            "grad_weight",
            "grad_bias",
        ]
        for name, one, two, three in zip(names, *results, strict=True):
            np.testing.assert_array_equal(two, one, err_msg=f"{name} {shape} {layout}, 2 threads")
            np.testing.assert_array_equal(three, one, err_msg=f"{name} {shape} {layout}, 3 threads")


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_written_past_the_caches_are_the_same(rng, monkeypatch, layout, dtype):
    from tilewise.kernels import operation
    from tilewise.kernels.cpu import batchnorm as cpu
    from tilewise.kernels.cpu import recycling

    def results(training):
        running = [v.copy() for v in vectors[:2]]
        forward = kernels.batch_norm(x, *running, *vectors[2:], training, return_stats=True, layout=layout)
        stats = forward[1:]
        gradients = kernels.batch_norm_backward(grad, x, *stats, vectors[2], training=training, layout=layout)
        return [a.copy() for a in (*forward, *running, *gradients)]  # the originals' memory is free again

    # planes, or pixels, of whole cache lines, and not; few channels; a tail after the last whole row of pixels
    for shape in ((3, 32, 16, 16), (70, 17, 4, 8), (3, 40, 15, 17), (2, 4, 64, 64), (2, 48, 15, 17)):
        x, grad = (laid(a, layout).astype(dtype) for a in rng.standard_normal((2, *shape)))
        vectors = statistics(rng, shape[1], dtype)
        for training, threads in product((True, False), (1, 2)):
            with tilewise.using(backend="cpu", threads=threads):
                kept = results(training)
                with monkeypatch.context() as patch:
                    for module, name in ((cpu, "LARGE"), (recycling, "FROM")):
                        patch.setattr(module, name, 1 << 14)
                    whole = layout == "NCHW" or shape[1] * x.itemsize % 64 == 0
                    way = cpu._way_to_memory(cpu.forward_by_row, x.shape, layout, x.itemsize)
                    assert way == (cpu.PAST_IN_USED if whole else cpu.KEPT_ALWAYS)
                    operation.forget_plans()
                    fresh, used = results(training), results(training)
                operation.forget_plans()
            for a, b, c in zip(fresh, used, kept, strict=True):
                np.testing.assert_array_equal(a, c)
                np.testing.assert_array_equal(b, c)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_anywhere_in_memory_are_the_same(rng, monkeypatch, layout, dtype):
    from tilewise.kernels import operation
    from tilewise.kernels.cpu import batchnorm as cpu
    from tilewise.kernels.cpu import recycling

    memories = []

    def shifted(shape, dtype):
        memory = np.full(math.prod(shape) + 256 // dtype.itemsize, 7, dtype)
        memories.append(memory)
        start = -memory.ctypes.data % 64 // dtype.itemsize + shift
        return memory[start : start + math.prod(shape)].reshape(shape)

    # NHWC: rows of whole vectors, and not; too short to be aligned; a tail after the last whole row of pixels
    shapes = [(3, 9, 7, 32), (2, 5, 7, 256), (2, 5, 7, 257), (2, 5, 7, 160), (2, 3, 5, 96), (3, 5, 7, 24)]
    if layout == "NCHW":  # whole vectors, and not; less than a vector; one channel; few, in blocks of their planes
        shapes = [(3, 9, 4, 32), (2, 18, 7, 7), (2, 33, 3, 5), (2, 17, 2, 1), (3, 1, 5, 9), (2, 3, 90, 130)]
    for shape in shapes:
        x, grad = rng.standard_normal((2, *shape)).astype(dtype)
        vectors = statistics(rng, shape[1 if layout == "NCHW" else 3], dtype)
        results = {}
        monkeypatch.setattr(recycling, "FROM", 0)
        monkeypatch.setattr(cpu, "empty", shifted)
        operation.forget_plans()
        with tilewise.using(backend="cpu"):
            for shift in (0, 1, 4, 64 // x.itemsize - 1):
                memories.clear()
                y = kernels.batch_norm(x, *vectors, layout=layout)
                gradient, *_ = kernels.batch_norm_backward(grad, x, *vectors[:3], layout=layout)
                results[shift] = y, gradient
                for memory, result in zip(memories, results[shift], strict=True):
                    assert (memory == 7).sum() == memory.size - result.size
        operation.forget_plans()
        for pair in results.values():
            for result, aligned in zip(pair, results[0], strict=True):
                np.testing.assert_array_equal(result, aligned)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_several_rows_at_a_time_give_the_same_bits(rng, monkeypatch, planned_anew, dtype):
    """Else the bits would depend on the size of the processor's caches."""
    from tilewise.kernels.cpu import batchnorm as cpu
    from tilewise.kernels.cpu import batchnorm_vector as modes

    chosen, choose = [], cpu._kept
    monkeypatch.setattr(cpu, "_kept", lambda *sizes: chosen.append(choose(*sizes)) or chosen[-1])
    # rows of whole vectors, and not; a rest of one to three rows
    for shape in ((2, 7, 9, 64), (3, 5, 7, 257), (1, 23, 1, 300)):
        x, grad = rng.standard_normal((2, *shape)).astype(dtype)
        vectors = statistics(rng, shape[3], dtype)
        results = []
        for near in (0, 1 << 30):
            planned_anew(cpu, "NEAR_BELOW", (near, near))
            chosen.clear()
            with tilewise.using(backend="cpu"):
                forward = kernels.batch_norm(x, None, None, *vectors[2:], True, layout="NHWC", return_stats=True)
                results.append([*forward, kernels.batch_norm(x, *vectors, layout="NHWC")])
                for training in (True, False):
                    results[-1] += kernels.batch_norm_backward(
                        grad, x, *forward[1:], vectors[2], training=training, layout="NHWC"
                    )
            pair = (modes.NEAR, modes.FROZEN_NEAR) if near else (modes.KEPT, modes.FROZEN)
            assert chosen == [pair[0], pair[0], *pair]
        for one, other in zip(*results, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=f"{shape}")


@pytest.mark.parametrize(("images", "channels"), [(1, 1), (1, 3), (2, 2)])
def test_evaluation_that_is_split_has_a_share_for_two_threads(images, channels):
    """Also with sigmoid, and so few elements that they are only just split."""
    from tilewise.kernels.cpu import batchnorm_planes, threads

    function: Any = batchnorm_planes._division
    division = function.emitted.function
    for plane in (4096, 15_700, 16_384, 16_385):
        blocks, step, chunks = division(images, channels, plane, False)
        assert (chunks - 1) * step < images * channels * blocks <= chunks * step
        assert chunks >= 2 or images * channels * plane * 1.6 < threads.SERIAL_BELOW
    assert division(images, channels, 16_384, False)[0] == (1 if images * channels > 3 else 4)


# ------------------------------------------------------------------------------------------------------------ float16

# tails of vectors and rows; few channels in blocks; planes of several blocks; one channel, one pixel
HALF_SHAPES = [
    (2, 5, 9, 9),
    (3, 40, 15, 17),
    (4, 7, 50, 60),
    (1, 17, 66, 66),
    (2, 33, 8, 16),
    (9, 1, 5, 1),
    (70, 600, 1, 1),
]


@pytest.fixture
def without_conversions(planned_anew, monkeypatch):
    """No plan may convert whole operands."""
    from tilewise.kernels.cpu import half

    def refuse(*_):
        raise AssertionError("converted in a pass of its own")

    planned_anew(half, "prepare", refuse)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", HALF_SHAPES)
def test_float16_is_float32_rounded_once(rng, without_conversions, layout, shape):
    x, grad = (laid(a, layout).astype(np.float16) for a in 4 * rng.standard_normal((2, *shape)))
    vectors = statistics(rng, shape[1], np.float16)
    for activation, training, threads in product((None, "relu", "relu6"), (True, False), (1, 2)):
        results = []
        for dtype in (np.float16, np.float32):
            running = [v.astype(dtype) for v in vectors]
            with tilewise.using(backend="cpu", threads=threads):
                y = kernels.batch_norm(x.astype(dtype), *running, training, layout=layout, activation=activation)
                forward = kernels.batch_norm(
                    x.astype(dtype), None, None, None, None, True, layout=layout, return_stats=True
                )
                backward = kernels.batch_norm_backward(
                    *(a.astype(dtype) for a in (grad, x, *vectors[:3])), training=training, layout=layout
                )
            results.append([y, *forward, *running, *backward])
        for one, other in zip(*results, strict=True):
            assert one.dtype == np.float16
            np.testing.assert_array_equal(one, other.astype(np.float16))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_float16_cannot_hold(without_conversions, layout):
    x = np.zeros((1, 3, 3, 40), np.float16)
    x[0, 0, 0, :6] = np.nan, np.inf, -np.inf, 65504, -65504, 2**-24
    x[0, 2, 2, -6:] = x[0, 0, 0, :6]
    ones = np.ones(3, np.float16)
    for activation, wanted in (
        (None, [np.nan, np.inf, -np.inf, np.inf, -np.inf, 2**-23]),
        ("relu", [np.nan, np.inf, 0, np.inf, 0, 2**-23]),
        ("relu6", [np.nan, 6, 0, 6, 0, 2**-23]),
    ):
        y = kernels.batch_norm(laid(x, layout), 0 * ones, ones, 2 * ones, eps=0, layout=layout, activation=activation)
        y = plain(y, layout)
        np.testing.assert_array_equal(y[0, 0, 0, :6], wanted)
        np.testing.assert_array_equal(y[0, 2, 2, -6:], wanted)
        assert (y[0, 1] == 0).all()


def test_activations_that_rounding_changes_go_by_float32(without_conversions):
    x, ones = np.ones((2, 3, 4, 5), np.float16), np.ones(3, np.float16)
    for activation in ("leaky_relu", "sigmoid", "tanh"):
        with pytest.raises(AssertionError, match="a pass of its own"):
            kernels.batch_norm(x, ones, ones, activation=activation)


# ---------------------------------------------------------------------------------------------------------- estimates


def test_activations_that_cost_an_exponential_count_as_more_work(monkeypatch):
    from tilewise.kernels.cpu import batchnorm as cpu
    from tilewise.kernels.cpu.jit import Kernel

    works = []
    monkeypatch.setattr(Kernel, "sized", lambda kernel, work: works.append(work))
    options = {"training": False, "momentum": 0.1, "eps": 1e-5, "layout": "NCHW", "return_stats": False}
    for activation in ACTIVATIONS:
        cpu.prepare_batch_norm(((2, 3, 4, 5),), np.dtype(np.float32), activation=activation, **options)
    cheap = dict(zip(ACTIVATIONS, (work == works[0] for work in works), strict=True))
    assert [name for name in ACTIVATIONS if not cheap[name]] == ["sigmoid", "tanh"]
