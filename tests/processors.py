"""Processors that the host can stand in for: what Numba is told to compile for."""

# Naming the processor alone keeps the host's AVX-512 features.
AVX2 = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": (
        "+avx,+avx2,+bmi,+bmi2,+cmov,+cx16,+f16c,+fma,+fxsr,+lzcnt,+mmx,+movbe,+popcnt,"
        "+sse,+sse2,+sse3,+sse4.1,+sse4.2,+ssse3"
        ",-avx512f,-avx512bw,-avx512cd,-avx512dq,-avx512vl,-avx512vnni"
    ),
}
