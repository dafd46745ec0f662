"""Into how many parts the depth of a product is split, by an estimate of the time that it takes.

Fewer tiles than a device has room for leave it partly idle; parts of their depth fill it, but their sums are written to
memory, read again, and added by a second kernel. Of every number of parts the estimate is

    rounds * (ROUND + steps * max(least of a step, its multiplications at the device's rate)) + parts' cost

with constants of an H100, rounded from measurements (microseconds). Other devices are taken to be one: what matters is
the proportion, and the order of a sum depends on the shape and the kernel alone.
"""

from functools import lru_cache
from typing import NamedTuple

from tilewise.kernels.channel_plan import ceil_div


class Pace(NamedTuple):
    """step: bytes of the depth. least: microseconds that a step takes at least: what it loads has to arrive. rate:
    multiplications a microsecond, of a multiprocessor. fewest: steps of a part."""

    step: int
    least: float
    rate: float
    fewest: int


PACES = {
    "wgmma": Pace(128, 0.45, 2.6e6, 8),
    "wgmma in TF32": Pace(128, 0.6, 0.7e6, 8),
    "wgmma in 3xTF32": Pace(128, 0.6, 0.4e6, 8),
    "mma": Pace(64, 0.4, 0.9e6, 2),
    "mma in TF32": Pace(64, 0.4, 0.45e6, 2),
    "mma in 3xTF32": Pace(64, 0.6, 0.2e6, 4),
    "tiles": Pace(128, 0.9, 0.16e6, 2),
}
ROUND = 1.5  # of blocks at work together: until the first step is there, and until the results are written
ADDING, BYTES_A_MICROSECOND = 2.0, 2.5e6  # another kernel; of the parts' sums, written and read
MULTIPROCESSORS = 132
LIKELY = 0.85  # an estimate is taken to be better that is less than so much of the one without parts


def estimate(
    algorithm: str, tile, size: tuple[int, int, int, int], itemsize: int, multiprocessors: int, parts: int
) -> tuple[float, int]:  # fmt: skip
    """(microseconds, depth of each part). tile: with the blocks that fit one. size: rows, columns, depth, matrices."""
    m, n, depth, matrices = size
    pace = PACES[algorithm]
    step = max(1, pace.step // itemsize)
    steps = max(1, ceil_div(ceil_div(depth, step), parts))
    parts = max(1, ceil_div(depth, steps * step))
    blocks = ceil_div(m, tile.rows) * ceil_div(n, tile.columns) * matrices * parts
    busiest = ceil_div(blocks, multiprocessors)
    together = min(tile.resident, busiest)
    one = max(pace.least, together * tile.rows * tile.columns * step / pace.rate)
    time = busiest / together * (ROUND + steps * one)
    if parts > 1:
        time += ADDING + parts * matrices * m * n * 8 / BYTES_A_MICROSECOND
    return time, steps * step


@lru_cache(maxsize=4096)
def split(
    algorithm: str, tile, size: tuple[int, int, int, int], itemsize: int, multiprocessors: int = MULTIPROCESSORS
) -> tuple[float, int, int]:  # fmt: skip
    """(microseconds, parts, depth of each)."""
    depth = size[2]
    pace = PACES[algorithm]
    most = max(1, depth * itemsize // (pace.fewest * pace.step))
    tried, parts = [], 1
    while parts <= most:
        time, each = estimate(algorithm, tile, size, itemsize, multiprocessors, parts)
        tried.append((time, max(1, ceil_div(depth, each)), each))
        parts += max(1, parts // 4)
    best = min(tried)
    return best if best[0] < LIKELY * tried[0][0] else tried[0]
