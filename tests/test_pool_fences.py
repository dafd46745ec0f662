"""Pooling whose operands and results end before a page that may not be touched (fences.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BEFORE_A_FENCE = """
from fences import fenced
from fences import fenced_copy as copy
from tilewise import kernels
from tilewise.kernels.cpu import pool

pool._allocator = lambda shape, dtype: fenced  # results end before a fence, too
for layout, channels in (("NCHW", 1), ("NCHW", 3), ("NHWC", 1), ("NHWC", 3), ("NHWC", 16)):
    for width in (8, 16, 17, 34, 35):
        x = fenced((1, channels, 6, width) if layout == "NCHW" else (1, 6, width, channels))
        for options in ((2, 2), (3, 2, 1), (3, 2), (2, 1), (3, 1, 1), (5, 3, 1), (5, 3), (4, 4)):
            y, indices = kernels.max_pool2d(x, *options, return_indices=True, layout=layout)
            assert (kernels.max_pool2d(x, *options, layout=layout) == y).all()
            grad, indices = copy(y), copy(indices)
            kernels.max_pool2d_backward(grad, indices, x.shape, *options, layout=layout)
            kernels.avg_pool2d(x, *options, layout=layout)
            kernels.avg_pool2d_backward(grad, x.shape, *options, layout=layout)
        for bins in (1, 2, (2, 3)):
            y, indices = kernels.adaptive_max_pool2d(x, bins, True, layout=layout)
            kernels.adaptive_avg_pool2d(x, bins, layout=layout)
            kernels.adaptive_avg_pool2d_backward(copy(y), x.shape, layout=layout)
print("unharmed")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects a page with mprotect, as Linux has it")
def test_nothing_after_an_operand_or_a_result_is_touched():
    """The arrays end where the process may not go on: vectors that overrun them would kill it."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", BEFORE_A_FENCE], capture_output=True, text=True, check=False, env=environment
    )
    assert done.stdout.strip() == "unharmed", f"exit status {done.returncode}: {done.stderr}"
