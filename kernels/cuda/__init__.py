"""GPU kernels in numba.cuda: the same families, file by file, as the reference and the CPU.

launch.py says what a kernel is and starts it; memory.py has the numbers that it works on, ptx.py the instructions that
Numba lacks; driver.py is the GPU. The tests compile every kernel for its architectures and execute it on the CPU
(tests/simt).
"""
