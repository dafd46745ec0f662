"""Processors that the host can stand in for: what Numba is told to compile for.

As a program: is there anything left to test with `AVX2` here, after a run compiled for the host itself?
"""

import sys

from llvmlite import binding

# Naming the processor alone keeps the host's AVX-512 features.
AVX2 = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": (
        "+avx,+avx2,+bmi,+bmi2,+cmov,+cx16,+f16c,+fma,+fxsr,+lzcnt,+mmx,+movbe,+popcnt,"
        "+sse,+sse2,+sse3,+sse4.1,+sse4.2,+ssse3"
        ",-avx512f,-avx512bw,-avx512cd,-avx512dq,-avx512vl,-avx512vnni"
    ),
}


def main() -> int:
    """0 if the host has AVX-512, so that code for AVX2 is other code; 1, with the reason, if not."""
    if binding.get_host_cpu_features().get("avx512f"):
        return 0
    print("This processor has no AVX-512 to leave out: `make test` is the same run.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
