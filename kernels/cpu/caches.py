"""How large this processor's last cache is, and from which size on a result is better written past it."""

from functools import lru_cache
from pathlib import Path

from tilewise.kernels.cpu.simd import VECTOR_BYTES

# Linux tells it here. (glibc's sysconf adds up the caches of all cores that a virtual machine cannot see: 320 MB where
# 32 are there.)
_THIRD_LEVEL = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


@lru_cache(maxsize=1)
def third_level_bytes() -> int | None:
    """The third-level cache that the first core shares with others; None where the system does not tell."""
    try:
        text = _THIRD_LEVEL.read_text(encoding="ascii").strip()
        return int(text.removesuffix("K")) << 10 if text.endswith("K") else int(text)
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=1)
def memory_from() -> int:
    """Bytes of a result from which on it is written past the caches.

    Whoever reads the result next finds none of it in the cache then, but its memory need not be read before it is
    written. With 32 MB of third-level cache (Zen 3 and 4) that wins from 12 MB on, also where a relu of the result
    follows: on Zen 3, in ms on one thread, batch norm's evaluation, training and gradient with the relu take with 26 MB
    in NHWC 5.1 instead of 5.2, 8.4 instead of 9.1, 8.9 instead of 9.9; with 13 MB 2.3, 3.3, 4.4 instead of 2.2, 3.6,
    4.3; with 6 MB more (1.05 instead of 0.91). Alone, on Zen 4, with 26 MB in NHWC 1.4 instead of 1.8, 2.2 instead of
    3.9, 4.7 instead of 10.4. With the larger caches of Xeons it wins from 64 MB on.
    """
    known = third_level_bytes()
    small = known <= 48 << 20 if known is not None else VECTOR_BYTES < 64
    return 12 << 20 if small else 64 << 20
