"""GPU kernels in numba.cuda: the same families, file by file, as the reference and the CPU.

launch.py says what a kernel is and starts it; memory.py has the numbers that it works on, ptx.py the instructions that
Numba lacks; driver.py is the GPU. The tests compile every kernel for its architectures and execute it on the CPU
(tests/simt).
"""

from contextlib import suppress
from importlib import import_module
from typing import Any

import numpy as np


def _load_numba_arrays():
    """What Numba loads at its first compilation: numba-cuda 0.30 asks for numpy.row_stack there, gone in NumPy 2.5."""
    names: Any = vars(np)
    if "row_stack" in names:
        return
    names["row_stack"] = np.vstack
    try:
        with suppress(ModuleNotFoundError):  # the first kernel tells what is missing
            import_module("numba.cuda.np.arrayobj")
    finally:
        del names["row_stack"]


_load_numba_arrays()
