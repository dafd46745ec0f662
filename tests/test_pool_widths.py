"""Pooling on a machine with narrower vectors: compiled for AVX2 in a process of its own, and run here."""

import os
import platform
import subprocess
import sys

import pytest

HASWELL = (
    "+avx,+avx2,+bmi,+bmi2,+cmov,+cx16,+f16c,+fma,+fxsr,+lzcnt,+mmx,+movbe,+popcnt,"
    "+sse,+sse2,+sse3,+sse4.1,+sse4.2,+ssse3,-avx512f,-avx512bw,-avx512cd,-avx512dq,-avx512vl,-avx512vnni"
)

PROGRAM = """
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
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4, err_msg=str(options))
    return ours


for layout, shape in (("NCHW", (2, 5, 14, 29)), ("NHWC", (2, 14, 29, 5)), ("NHWC", (1, 9, 9, 16))):
    x = rng.standard_normal(shape, dtype=np.float32)
    for window in ((2, 2), (3, 2, 1), (3, 1, 1), (5, 3)):
        y = check(kernels.max_pool2d, x, *window, layout=layout)
        _, where = kernels.max_pool2d(x, *window, return_indices=True, layout=layout)
        check(kernels.max_pool2d_backward, y, where, shape, *window, layout=layout)
        check(kernels.avg_pool2d, x, *window, layout=layout)
        check(kernels.avg_pool2d_backward, y, shape, *window, layout=layout)
    y = check(kernels.adaptive_avg_pool2d, x, 1, layout=layout)
    check(kernels.adaptive_avg_pool2d_backward, y, shape, layout=layout)
compiled = [kernel.serial for kernel in jit.KERNELS if "serial" in vars(kernel)]
code = [text for dispatcher in compiled for text in dispatcher.inspect_asm().values()]
assert any("ymm" in text for text in code)
assert not any("zmm" in text for text in code)
print("checked", len(code))
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 is an x86-64 feature")
def test_avx2_machines_pool_right_without_zmm_registers():
    environment = os.environ | {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": HASWELL}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("checked")
