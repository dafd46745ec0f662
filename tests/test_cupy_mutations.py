"""Every barrier of the CUDA C++ sources is needed, and the emulator sees it when one is missing; so it does an access
outside of an array, and one that is not aligned."""

import re
import shutil
from unittest.mock import patch

import numpy as np
import pytest
from simt import cuda_source
from simt.emulator import SCHEDULES, EmulatedFault
from simt.installed import emulated_gpu

if cuda_source.why_not():
    pytest.skip(cuda_source.why_not(), allow_module_level=True)

import tilewise
from tilewise import kernels
from tilewise.kernels import conv_winograd_plan
from tilewise.kernels.cupy import conv_thin, gemm_plan, module


def bias_gradient(x):
    return kernels.linear_backward(x, x, x, needs=("bias",))[2]


def product_by_tiles(x):
    return kernels.matmul(x[:, :48], x[:48])


def product_of_half(x):
    """By mma where there are few rows, else by wgmma."""
    half = x.astype(np.float16)
    return kernels.matmul(half, half.T)


def product_by_three(x):
    """Of float32, by wgmma."""
    return kernels.matmul(x, x.T)


def product_laid_out(x):
    """By three products, of a right operand that is laid out before."""
    with patch.dict(gemm_plan.LAID_ROWS, split=64):
        return kernels.matmul(x, np.ascontiguousarray(x.T))


def products_by_wgmma(x):
    return np.stack([product_of_half(x), product_by_three(x), product_laid_out(x)])


def vector_by_matrix(x):
    """Several vectors, one after the other in shared memory."""
    return kernels.matmul(x[:3, :16], x[3:])


def convolution_of_half(x):
    """By wgmma; the weights are what x has."""
    half = x.astype(np.float16)
    return kernels.conv2d(half, half.reshape(72, -1, 1, 1), layout="NHWC")


def weight_gradient_of_half(x):
    """By wgmma; in steps of different pixels."""
    half = x.astype(np.float16)
    weight = half.reshape(-1)[: 80 * 80].reshape(80, 80, 1, 1)
    return kernels.conv2d_backward(half, half, weight, layout="NHWC", needs=("weight",))[1]


def weight_gradient(x):
    """Of a depthwise convolution: a block has several taps, one after the other."""
    return kernels.conv2d_backward(x, x, x[0, :, None, :3, :3], padding=1, groups=len(x[0]), needs=("weight",))[1]


def weight_gradient_by_winograd(x):
    """One that an infinite pixel in a corner meets."""
    weight, infinite = np.zeros((x.shape[1], x.shape[1], 3, 3), np.float32), x.copy()
    infinite[0, 0, 0, 0] = np.inf
    with (
        patch.object(conv_winograd_plan, "_LEAST_CHANNELS", 0), patch.object(conv_winograd_plan, "_LEAST_TILES", 1)
    ):  # fmt: skip
        return kernels.conv2d_backward(x, infinite, weight, padding=1, needs=("weight",))[1]


def packed_operands(x):
    x = x.astype(np.float16)
    return kernels.conv2d(x, x[:, :, :3, :3], algorithm="gemm")


def many_taps(x):
    """More taps of few channels than a block keeps weights of at a time; its epilogue goes by way of their place."""
    x = x.transpose(0, 2, 3, 1)
    return kernels.conv2d(
        x, np.ones((64, 4, 9, 9), np.float32), padding=4, algorithm="direct", layout="NHWC", activation="tanh"
    )


def few_outputs(x):
    """More channels than the weights that a block keeps at a time."""
    with patch.object(conv_thin, "_LEAST_PIXELS", 1):
        return kernels.conv2d(x, np.ones((3, x.shape[1], 7, 7), np.float32), padding=3)


# A source that has barriers -> a call that meets all of them: (function, shape, options)
CALLS = {
    "pool_average.cu": (kernels.adaptive_avg_pool2d, (2, 9, 9, 24), {"output_size": 1, "layout": "NHWC"}),
    "reduction.cuh": (kernels.batch_norm, (3, 4, 20, 20), {"training": True}),
    "activation_softmax.cu": (kernels.softmax, (4, 50, 40), {"axis": 1}),
    "activation_softmax_gradient.cu": (kernels.softmax_backward, (4, 50, 40), {"axis": 1}),
    "channel_sums.cuh": (kernels.batch_norm, (3, 9, 9, 24), {"training": True, "layout": "NHWC"}),
    "conv_depthwise_weight.cu": (weight_gradient, (1, 2, 9, 20), {}),
    "conv_direct.cu": (many_taps, (1, 4, 9, 20), {}),
    "conv_packing.cu": (packed_operands, (20, 16, 8, 8), {}),
    "conv_winograd_weight.cu": (weight_gradient_by_winograd, (1, 14, 9, 10), {}),
    "conv_thin.cu": (few_outputs, (1, 50, 4, 20), {}),
    "gemm_few.cu": (vector_by_matrix, (19, 16 * 17), {}),
    "gemm_laid.cu": (product_laid_out, (72, 200), {}),
    "gemm_sums.cu": (bias_gradient, (20, 20), {}),
    "product.cuh": (product_by_tiles, (128, 128), {}),
    "tensor.cuh": (product_of_half, (64, 200), {}),
    "gemm_wgmma.cu": (products_by_wgmma, (72, 400), {}),
    "conv_wgmma.cu": (convolution_of_half, (1, 8, 9, 80), {}),
    "conv_wgmma_weight.cu": (weight_gradient_of_half, (1, 14, 14, 80), {}),
    "wgmma_product.cuh": (products_by_wgmma, (72, 400), {}),
    "wgmma_single.cuh": (product_by_three, (72, 200), {}),
}
OPERANDS = {kernels.batch_norm: lambda x: (x, None, None), kernels.softmax_backward: lambda x: (x, x)}
# What orders threads, or a thread and its copies: without any one of these a kernel is wrong.
BARRIER = re.compile(
    r"(?:__syncthreads|(?:wait|commit|begin)_(?:copies|products)(?:<[^>]*>)?|show_to_products)\(\);"
    r"|(?:arrive(?:_with_copies)?|wait_phase)\(stages[^;]*\);|meet<\w+>\(\d\);"
)
BARRIERS = [(name, i) for name, text in module.sources().items() for i in range(len(BARRIER.findall(text)))]


def run(folder, call, x, schedule, eager=False):
    function, _, options = call
    operands = OPERANDS.get(function, lambda x: (x,))(x)
    emulator = cuda_source.CudaSourceEmulator(folder)
    emulator.schedule, emulator.multiprocessors = schedule, 1  # which any tile occupies
    emulator.eager_copies = eager
    with emulated_gpu(emulator), tilewise.using(backend="cupy"):
        return function(*operands, **options)


@pytest.fixture
def changed(tmp_path):
    """changed(file, old, new, which): a folder of the sources with the occurrence `which` of old replaced.

    old: a text or a pattern.
    """

    def change(name, old, new, which=0):
        folder = tmp_path / "src"
        shutil.copytree(module.FOLDER, folder)
        text = (folder / name).read_text(encoding="utf-8")
        found = list(re.finditer(re.escape(old) if isinstance(old, str) else old, text))
        assert len(found) > which, f"{name} has no {old!r}"
        first, last = found[which].span()
        (folder / name).write_text(text[:first] + new + text[last:], encoding="utf-8")
        return folder

    return change


def test_there_is_a_call_for_every_source_with_barriers():
    assert {name for name, _ in BARRIERS} == set(CALLS)
    assert not any("__syncwarp" in text for text in module.sources().values())


@pytest.mark.parametrize(("name", "which"), BARRIERS)
def test_a_missing_barrier_is_noticed(changed, rng, name, which):
    x = rng.standard_normal(CALLS[name][1]).astype(np.float32)
    expected = run(module.FOLDER, CALLS[name], x, "forward")
    folder = changed(name, BARRIER, "{}", which)
    for schedule in SCHEDULES:
        try:
            noticed = (run(folder, CALLS[name], x, schedule) != expected).any()
        except EmulatedFault:
            noticed = True
        if noticed:
            return
    pytest.fail("no schedule noticed it")


@pytest.mark.parametrize(
    ("name", "old", "new", "fault"),
    [
        ("wgmma_product.cuh", "begin_products();", "{ if (s > 0) begin_products(); }",
         "a product before the first wgmma.fence"),
        ("wgmma_product.cuh", "begin_products();", "{ begin_products(); if (s > 0) sums[0] += 1; }",
         "sums that were written since wgmma.fence"),
        ("wgmma_product.cuh", "begin_products();", "{ if (s == 0) begin_products(); sums[7] += 1; }",
         "sums that were written since wgmma.fence"),
        ("wgmma_single.cuh", "commit_products();", "{ commit_products(); a[i].big[0] ^= 1; }",
         "registers of a product's left operand were written before it was waited for"),
    ],
)  # fmt: skip
def test_registers_that_a_product_has_are_watched(changed, rng, name, old, new, fault):
    x, folder = rng.standard_normal(CALLS[name][1]).astype(np.float32), changed(name, old, new)
    for eager in (False, True):
        with pytest.raises(EmulatedFault, match=fault):
            run(folder, CALLS[name], x, "forward", eager)


AVERAGE = (kernels.avg_pool2d, (1, 5, 5, 8), {"kernel_size": 2, "stride": 1, "layout": "NHWC"})


@pytest.mark.parametrize(
    ("name", "old", "new", "fault"),
    [
        ("pool_average.cu", "if (i >= count) return;", "if (i > count) return;", "outside of an array"),
        ("pool_average.cu", "store(y + i * N, result)", "store(y + i * N + 1, result)", "16 bytes from an address"),
        ("pool_average.cu", "const T *const origin = x +", "const T *const origin = x - 16 +", "bytes before an array"),
    ],
)
def test_wrong_accesses_are_noticed(changed, rng, name, old, new, fault):
    x = rng.standard_normal(AVERAGE[1]).astype(np.float32)
    run(module.FOLDER, AVERAGE, x, "forward")
    with pytest.raises(EmulatedFault, match=fault):
        run(changed(name, old, new), AVERAGE, x, "forward")


def test_parameters_that_disagree_with_the_source_are_noticed(changed):
    folder = changed("pool_windows.cuh", "dilation_w, include_pad;", "dilation_w, include_pad, spare, more;")
    with pytest.raises(AssertionError, match=r"packs parameters of .* bytes, the source has"):
        run(folder, AVERAGE, np.ones(AVERAGE[1], np.float32), "forward")
