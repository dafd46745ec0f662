"""How the pooling kernels take a plan (kernels/pool_plan.py): src/pool_windows.cuh's Windows and Index."""

from tilewise.kernels.pool_plan import Pool

WINDOWS = "5q11i"
INDICES = ("int", "long long")
# Numbers of a call up to which indices have 32 bits: one that is rounded up to whole blocks must fit, too.
NARROW_BELOW = (1 << 31) - (1 << 16)


def windows_of(pool: Pool, include_pad: bool = False) -> tuple[int, ...]:
    """The numbers of a Windows."""
    return (*pool.shape, *pool.kernel, *pool.stride, *pool.low, *pool.high, *pool.dilation, include_pad)


def index_type(pool: Pool) -> str:
    """int where all offsets, and the numbers on the way to them, fit 32 bits."""
    most = [pool.width * max(pool.windows, pool.pixels)]
    axes = zip(pool.size, pool.out, pool.stride, pool.padding, pool.reach, strict=True)
    for n, count, stride, (low, high), reach in axes:
        most += [(n + 1) * (count + 1)] if stride == 0 else []
        most += [n + low + high + reach, (count + 1) * stride]
    return INDICES[max(most) >= NARROW_BELOW]
