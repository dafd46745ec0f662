"""The statistics of batch normalisation on the GPU; src/batchnorm_statistics.cu says how."""

from functools import partial

from tilewise.kernels.batchnorm_plan import sums_numbers
from tilewise.kernels.channel_plan import Planes
from tilewise.kernels.cupy.launch import Kernel


def sums_of_channels(source: str, name: str, operands: str) -> dict[tuple[bool, bool], Kernel]:
    """The kernels `name`_of_planes and `name`_of_rows of a source, by whether they are for planes, and for vectors.

    operands: the kinds of their pointers; what follows is the plan's.
    """
    kinds = {True: ("planes", "q q q i"), False: ("rows", "q q i i i")}
    return {
        (planes, vector): Kernel(
            source, f"{name}_of_{kinds[planes][0]}<{{T}}, {'{N}' if vector else 1}>", f"{operands} {kinds[planes][1]}",
            promises=("LDG.128",) if vector else (),
        )
        for planes in (True, False) for vector in (False, True)
    }  # fmt: skip


def start_sums(kernels: dict[tuple[bool, bool], Kernel], plan, parts: int, first, *others):
    """Starts a kernel of `sums_of_channels`; `first` tells its dtype."""
    grid, numbers = sums_numbers(plan, parts)
    kernels[isinstance(plan, Planes), plan.width > 1](first.place, grid, first, *others, *numbers)


run_sums = partial(start_sums, sums_of_channels("batchnorm_statistics.cu", "sums", "P P"))
finish = Kernel("batchnorm_statistics.cu", "batch_norm_finish<{T}>", "P P P P P P P P P r r q q q i")
