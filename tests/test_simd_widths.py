"""The vector code on a machine with narrower vectors: compiled for AVX2 in a process of its own, and run here."""

import os
import platform
import subprocess
import sys

import pytest
from processors import AVX2

START = """
import numpy as np
import tilewise
from tilewise import kernels
from tilewise.kernels.cpu import jit, simd

assert simd.VECTOR_BYTES == 32, simd.VECTOR_BYTES
rng = np.random.default_rng(0)


def check(function, *args, **options):
    with tilewise.using(backend="reference"):
        expected = function(*args, **options)
    ours = function(*args, **options)
    pairs = zip(ours, expected, strict=True) if isinstance(ours, tuple) else [(ours, expected)]
    for one, other in pairs:
        error = np.abs(one - other).max()
        assert error <= 1e-4 * max(1, np.abs(other).max()), (function.__name__, options, error)
    return ours


def normal(*shape):
    return rng.standard_normal(shape, dtype=np.float32)


"""
END = """
compiled = [kernel.serial for kernel in jit.KERNELS if "serial" in vars(kernel)]
code = [text for dispatcher in compiled for text in dispatcher.inspect_asm().values()]
assert any("ymm" in text for text in code)
assert not any("zmm" in text for text in code)
print("checked", len(code))
"""
PROGRAMS = {
    "products": """
for m, n, depth in ((37, 51, 130), (1, 1030, 261), (199, 130, 513), (70, 33, 2049)):
    for a in (normal(m, depth), normal(depth, m).T):
        for b in (normal(depth, n), normal(n, depth).T):
            check(kernels.matmul, a, b)
check(kernels.linear, normal(9, 70), normal(33, 70), normal(33))
check(kernels.linear_backward, normal(9, 33), normal(9, 70), normal(33, 70))
""",
    "convolutions": """
for layout, shape in (("NCHW", (2, 9, 15, 17)), ("NHWC", (2, 15, 17, 9))):
    x, weight, bias = normal(*shape), normal(13, 9, 3, 3), normal(13)
    for stride in (1, 2):
        options = {"stride": stride, "padding": 1, "layout": layout}
        y = check(kernels.conv2d, x, weight, bias, activation="relu", algorithm="gemm", **options)
        check(kernels.conv2d, x, weight, bias, activation="relu", algorithm="gemm", add=y, **options)
        check(kernels.conv2d_backward, y, x, weight, **options)
    y = check(kernels.conv2d, x, weight, bias, padding=1, layout=layout, algorithm="winograd")
    check(kernels.conv2d, x, weight, bias, padding=1, layout=layout, algorithm="winograd", add=y)
    for algorithm in ("gemm", "winograd"):
        options = {"padding": 1, "layout": layout, "algorithm": algorithm}
        prepared = kernels.prepare_conv2d(weight, bias, **options)
        assert (prepared(x) == kernels.conv2d(x, weight, bias, **options)).all()
    for size in ((13, 9, 1, 1), (13, 9, 5, 5)):
        y = check(kernels.conv2d, x, normal(*size), padding=size[2] // 2, layout=layout)
        check(kernels.conv2d_backward, y, x, normal(*size), padding=size[2] // 2, layout=layout)
    few = normal(2, 3, 15, 17) if layout == "NCHW" else normal(2, 15, 17, 3)
    check(kernels.conv2d_backward, y, few, normal(13, 3, 5, 5), padding=2, layout=layout)
    square = normal(2, 32, 32, 32)  # by Winograd
    check(kernels.conv2d_backward, square, square, normal(32, 32, 3, 3), padding=1, layout=layout)
    depthwise = normal(9, 1, 3, 3)
    for stride in (1, 2):
        options = {"stride": stride, "padding": 1, "groups": 9, "layout": layout}
        y = check(kernels.conv2d, x, depthwise, **options)
        check(kernels.conv2d_backward, y, x, depthwise, **options)
        wide = normal(1, 9, 5, 37) if layout == "NCHW" else normal(1, 5, 37, 9)
        y = check(kernels.conv2d, wide, depthwise, **options)
        check(kernels.conv2d_backward, y, wide, depthwise, **options)
        short = normal(1, 9, 7, 13) if layout == "NCHW" else normal(1, 7, 13, 9)
        y = check(kernels.conv2d, short, depthwise, **options)
        check(kernels.conv2d_backward, y, short, depthwise, **options)
""",
    "pooling": """
for layout, shape in (("NCHW", (2, 5, 14, 29)), ("NHWC", (2, 14, 29, 5)), ("NHWC", (1, 10, 9, 16))):
    x = normal(*shape)
    for window in ((2, 2), (3, 2, 1), (3, 1, 1), (5, 3)):
        y = check(kernels.max_pool2d, x, *window, layout=layout)
        _, where = kernels.max_pool2d(x, *window, return_indices=True, layout=layout)
        check(kernels.max_pool2d_backward, y, where, shape, *window, layout=layout)
        check(kernels.avg_pool2d, x, *window, layout=layout)
        check(kernels.avg_pool2d_backward, y, shape, *window, layout=layout)
    y = check(kernels.adaptive_avg_pool2d, x, 1, layout=layout)
    check(kernels.adaptive_avg_pool2d_backward, y, shape, layout=layout)
""",
    "batch norm": """
for layout, shape in (("NCHW", (3, 21, 7, 9)), ("NHWC", (3, 7, 9, 21))):
    x = normal(*shape)
    mean, var = np.zeros(21, np.float32), np.ones(21, np.float32)
    check(kernels.batch_norm, x, mean, var, normal(21), normal(21), layout=layout)
    check(kernels.batch_norm_backward, normal(*shape), x, normal(21), abs(normal(21)), normal(21), layout=layout)
""",
}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 is an x86-64 feature")
@pytest.mark.parametrize("family", PROGRAMS)
def test_avx2_machines_get_right_results_without_zmm_registers(family, tmp_path):
    environment = os.environ | AVX2 | {"NUMBA_CACHE_DIR": str(tmp_path)}  # code from a cache cannot be looked at
    program = START + PROGRAMS[family] + END
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("checked")
