"""GPU kernels executed on the CPU, so that the ordinary tests run every line of them: see emulator.py."""
