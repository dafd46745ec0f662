"""How it is measured: results are compared with the reference first, then each engine is timed in blocks.

A thread pool that has just worked may spin and slow down whoever runs next (OpenMP's several times), so engines
take turns in blocks, with a pause before each block, and never call by call.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from .layers import Case

SEED = 20261121
PAUSE = 0.1  # seconds; an idle OpenMP pool spins for some milliseconds, OpenBLAS' threads for about 30
BLOCKS = 3
SAMPLE = 100e-6  # seconds; shorter calls are timed several at a time, so that the clock's own cost disappears


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the best, the median, and the spread: half the samples lie within it, relative to the median."""

    best: float
    median: float
    spread: float
    samples: int


@dataclass(frozen=True)
class Comparison:
    """One case, ours against the NumPy reference, measured in one process."""

    op: str
    layer: str
    shape: str
    dtype: str
    flops: int
    bytes: int
    rate_unit: str
    ours: Timing
    numpy: Timing

    @property
    def ratio(self) -> float:
        """Our time over NumPy's: lower is better."""
        return self.ours.best / self.numpy.best

    @property
    def rate(self) -> float:
        """GFLOP/s or GB/s, as rate_unit says."""
        work = self.flops if self.rate_unit == "GFLOP/s" else self.bytes
        return work / self.ours.best / 1e9

    def as_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict) -> "Comparison":
        fields: dict = record | {"ours": Timing(**record["ours"]), "numpy": Timing(**record["numpy"])}
        return cls(**fields)


def measure(engines: dict[str, Callable[[], object]], seconds: float = 0.3) -> dict[str, Timing]:
    """Time each engine for about `seconds`, in blocks that take turns; each block has at least one sample.

    Every engine must have run before: the first call compiles, loads libraries and starts threads.
    """
    samples: dict[str, list[float]] = {name: [] for name in engines}
    calls = {name: _calls_per_sample(call) for name, call in engines.items()}
    for _ in range(BLOCKS):
        for name, call in engines.items():
            time.sleep(PAUSE)
            samples[name] += _block(call, calls[name], seconds / BLOCKS)
    return {name: _summary(values) for name, values in samples.items()}


def _calls_per_sample(call: Callable[[], object]) -> int:
    start = time.perf_counter()
    call()
    return max(1, int(SAMPLE / max(time.perf_counter() - start, 1e-9)))


def _block(call: Callable[[], object], calls: int, seconds: float) -> list[float]:
    samples = []
    end = time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        now = time.perf_counter()
        samples.append((now - start) / calls)
        if now >= end:
            return samples


def _summary(samples: list[float]) -> Timing:
    low, median, high = (float(q) for q in np.quantile(samples, (0.25, 0.5, 0.75)))
    return Timing(min(samples), median, (high - low) / median, len(samples))


def prepared(case: Case, dtype) -> partial[Any]:
    """The case as a call without arguments, on operands that are the same in every process.

    Raises NotImplementedError where there is no kernel for this function or dtype.
    """
    import tilewise

    args, options = case.arguments(np.random.default_rng(SEED), np.dtype(dtype))
    return partial(getattr(tilewise, case.op), *args, **options)


def _reference(call: partial) -> Callable[[], Any]:
    """The same call on copies of its operands (a call may change them), by the NumPy reference."""
    import tilewise

    args = [np.copy(a) if isinstance(a, np.ndarray) else a for a in call.args]

    def pinned():
        with tilewise.using(backend="reference"):
            return call.func(*args, **call.keywords)

    return pinned


def check(case: Case, dtype, ours: Any, reference: Any) -> None:
    """AssertionError where a result is further from the reference's than rounding explains."""
    if not isinstance(reference, tuple):
        ours, reference = (ours,), (reference,)
    for actual, expected in zip(ours, reference, strict=True):
        check_error(case, dtype, float(np.abs(actual - expected).max() / np.abs(expected).max()))


def check_error(case: Case, dtype, worst: float) -> None:
    """AssertionError where an error, relative to the largest result, is more than rounding explains, or NaN.

    Errors of a sum of n random products grow like sqrt(n); 8 covers the spread over all elements. bfloat16, whose eps
    that would make any error allowed, is summed in float32, and rounded on the way in parts at most.
    """
    if dtype == "bfloat16":
        bound = 8 * 2.0**-7 + 8 * float(np.finfo(np.float32).eps) * (1 + case.reduction) ** 0.5
    else:
        bound = 8 * float(np.finfo(dtype).eps) * (1 + case.reduction) ** 0.5
    assert worst <= bound, f"{case.key} {dtype}: off by {worst:.3g} of the largest result, allowed {bound:.3g}"


def checked(case: Case, dtype) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Our call and the reference's, after the results of both were compared."""
    ours = prepared(case, dtype)
    reference = _reference(ours)
    check(case, dtype, ours(), reference())
    return ours, reference


def compare(case: Case, dtype="float32", seconds: float = 0.3) -> Comparison:
    """Check the case's result, then time it against the reference."""
    ours, reference = checked(case, dtype)
    timings = measure({"ours": ours, "numpy": reference}, seconds)
    work = case.flops, case.bytes(np.dtype(dtype).itemsize), case.rate_unit
    return Comparison(case.op, case.layer, case.shape, str(dtype), *work, timings["ours"], timings["numpy"])
