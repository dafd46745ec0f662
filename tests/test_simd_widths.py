"""The vector code on a machine with narrower vectors: compiled for AVX2 in a process of its own, and run here."""

import os
import platform
import subprocess
import sys

import pytest

# Naming the processor alone keeps the host's AVX-512 features.
HASWELL = (
    "+avx,+avx2,+bmi,+bmi2,+cmov,+cx16,+f16c,+fma,+fxsr,+lzcnt,+mmx,+movbe,+popcnt,"
    "+sse,+sse2,+sse3,+sse4.1,+sse4.2,+ssse3"
)

PROGRAM = """
import numpy as np
import tilewise
from tilewise.kernels.cpu import jit, simd

assert simd.VECTOR_BYTES == 32, simd.VECTOR_BYTES
rng = np.random.default_rng(0)


def check(function, *shapes, **options):
    operands = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
    with tilewise.using(backend="reference"):
        expected = function(*[a.astype(np.float64) for a in operands], **options)
    error = np.abs(function(*operands, **options) - expected).max()
    assert error <= 1e-4 * np.abs(expected).max(), (function.__name__, options, error)


check(tilewise.matmul, (37, 130), (130, 51))
check(tilewise.conv2d, (2, 9, 15, 17), (13, 9, 3, 3), padding=1, stride=2, algorithm="gemm")
check(tilewise.conv2d, (2, 9, 15, 17), (13, 9, 3, 3), padding=1, algorithm="winograd")
check(tilewise.conv2d, (2, 15, 17, 9), (13, 9, 3, 3), padding=1, layout="NHWC")
compiled = [kernel.serial for kernel in jit.KERNELS if "serial" in vars(kernel)]
code = [text for dispatcher in compiled for text in dispatcher.inspect_asm().values()]
assert any("ymm" in text for text in code)
assert not any("zmm" in text for text in code)
print("checked", len(code))
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 is an x86-64 feature")
def test_avx2_machines_get_right_results_without_zmm_registers():
    features = HASWELL + ",-avx512f,-avx512bw,-avx512cd,-avx512dq,-avx512vl,-avx512vnni"
    environment = os.environ | {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("checked")
