"""The quick cases under pytest-benchmark: `pytest tests/bench --benchmark-enable`.

Without that option, as in `make test`, each runs once, after its result was compared with the reference.
"""

import pytest

from tilewise.benchmarks import timing
from tilewise.benchmarks.cases import QUICK


@pytest.mark.parametrize("key", QUICK)
def test_bench(key, benchmark):
    case = QUICK[key]
    ours, _ = timing.checked(case, "float32")
    benchmark.group = case.op
    benchmark.extra_info |= {"shape": case.shape, "flops": case.flops, "bytes": case.bytes(4)}
    benchmark(ours)
