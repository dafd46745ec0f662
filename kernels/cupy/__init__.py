"""GPU kernels in CUDA C++ (src/), compiled by NVRTC and started through CuPy: the same families, file by file.

launch.py says what a kernel is and starts it; module.py compiles; driver.py is the GPU. Nothing here needs Numba. The
tests compile every kernel for its architectures and execute it on the CPU (tests/simt).
"""
