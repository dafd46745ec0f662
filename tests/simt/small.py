"""Kernels of the tests' own, which do not count as tilewise's."""

from tilewise.kernels.cuda.launch import KERNELS, Kernel, kernel


def small_kernel(function, **options) -> Kernel:
    """A kernel of a function with annotated parameters; the function itself may be used again."""
    annotations = dict(function.__annotations__)
    made = kernel(**{"threads": 32} | options)(function)
    function.__annotations__ = annotations
    KERNELS.remove(made)
    return made
