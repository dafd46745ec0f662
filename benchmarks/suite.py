"""What the asv classes share: cases as parameters, compilation in setup, the time, and the ratio to NumPy.

asv takes lower as better, always: hence a ratio of times, never GFLOP/s.
"""

import json
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numba  # noqa: F401  # asv forks its workers from a process that has imported this module: one import for all

from . import cases, timing

# With the quick suite one dtype, with the full one both.
DTYPES = ["float32"] if cases.suite() is cases.QUICK else ["float32", "float64"]


@lru_cache(maxsize=1)
def _ready(key: str, dtype: str):
    """The call, compiled; asv runs setup before every sample, and this only once."""
    call = timing.prepared(cases.ALL[key], dtype)
    call()
    return call


class _Prepared:
    """Sets `self.call` up; `params` comes from the subclass. (asv skips classes with a leading underscore.)"""

    param_names = ("case", "dtype")
    params: tuple[list[str], list[str]]
    timeout = 300  # seconds, for the first case of a family compiles its kernels

    def setup(self, key: str, dtype: str):
        self.call = _ready(key, dtype)  # NotImplementedError shows as n/a


class _Suite(_Prepared):
    rounds = 1
    warmup_time = 0
    repeat = (3, 30, 0.2)  # at least, at most, seconds

    def time_tilewise(self, key: str, dtype: str):
        self.call()

    def track_ratio_to_numpy(self, key: str, dtype: str) -> float:
        comparison = timing.compare(cases.ALL[key], dtype)
        keep(comparison)
        return comparison.ratio

    track_ratio_to_numpy.unit = "of NumPy's time"  # pyright: ignore[reportFunctionMemberAccess]


def grid(keys: Iterable[str]) -> tuple[list[str], list[str]]:
    return list(keys), DTYPES


def keep(comparison: timing.Comparison):
    """Append the comparison to the file that TILEWISE_BENCH_RECORDS names, if it names one.

    asv stores one number a benchmark; the report also needs the two times behind the ratio, and their spreads.
    """
    path = os.environ.get("TILEWISE_BENCH_RECORDS")
    if path:
        with Path(path).open("a", encoding="utf-8") as records:
            records.write(json.dumps(comparison.as_dict()) + "\n")
