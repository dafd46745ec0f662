"""What conv2d takes besides its operands and result: half of x and y, 4.2 times the weights, and 4 MB a thread."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import numpy as np
import tilewise
from tilewise import kernels


def resident(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure(layout, n, channels, size, outputs, kernel, groups=1, **options):
    x = np.ones((n, channels, size, size) if layout == "NCHW" else (n, size, size, channels), np.float32)
    weight = np.ones((outputs, channels // groups, kernel, kernel), np.float32)
    call = lambda **out: kernels.conv2d(x, weight, groups=groups, layout=layout, **options, **out)
    y = np.zeros_like(call())
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak
    before = resident("VmRSS")
    call(out=y)
    extra = resident("VmHWM") - before
    most = 0.5 * (x.nbytes + y.nbytes) + 4.2 * weight.nbytes + 4e6 * tilewise.kernels.settings.active().threads
    print(layout, x.shape, weight.shape, options, f"{extra / 1e6:.1f} of {most / 1e6:.1f} MB", flush=True)
    assert extra <= most


for threads in (1, 2):
    with tilewise.using(threads=threads):
        for layout in ("NCHW", "NHWC"):
            measure(layout, 8, 64, 112, 64, 3, padding=1)  # Winograd
            measure(layout, 8, 512, 7, 512, 3, padding=1)  # Winograd, few tiles
            measure(layout, 64, 512, 7, 512, 3, padding=1)
            measure(layout, 5, 512, 28, 512, 3, padding=1)  # Winograd, many weights
            measure(layout, 256, 128, 7, 128, 5, padding=2)  # a product, by way of NHWC
            measure(layout, 8, 256, 56, 64, 1)
            measure(layout, 301, 256, 7, 256, 1)  # images joined
            measure(layout, 8, 128, 56, 128, 3, padding=1, stride=2)
            measure(layout, 8, 3, 224, 64, 7, padding=3, stride=2)
            measure(layout, 8, 64, 112, 64, 3, padding=1, groups=64)
with tilewise.using(threads=8):  # their chunks' sums, and planes for each tap column
    measure("NCHW", 4, 16, 112, 512, 7, padding=3)
    measure("NCHW", 8, 71, 56, 128, 3, padding=1, stride=2)
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the process's memory from /proc")
def test_extra_memory_of_a_convolution_is_bounded():
    # what is freed goes back to the system at once, or the call measured would find the first one's memory
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment |= {"NUMBA_NUM_THREADS": "8"}  # also with fewer cores
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, (result.stdout, result.stderr)
    assert result.stdout.endswith("done\n")
