"""The kernels in Numba for the CPU: hand-written, vectorised, parallel."""
