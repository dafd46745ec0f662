"""Images inside @njit: batches and single ones, sizes of windows, and Python functions that kernels' plans are made of.

The plans' functions are the ones that the Python calls use; they are compiled as they are.
"""

from numba.core.errors import TypingError
from numba.extending import overload, register_jitable

from tilewise.kernels.cpu import pool_planes, pool_quads, pool_windows, simd
from tilewise.kernels.cpu.jit import device
from tilewise.kernels.njit.arguments import WrongShape
from tilewise.kernels.njit.linking import contiguous, shaped
from tilewise.kernels.shapes import output_size

for function in (
    simd.lane_count, pool_planes.vectors, pool_quads.serves, pool_windows._rounded, pool_windows.plan_fields,
    output_size,
):  # fmt: skip
    register_jitable(error_model="numpy")(function)


def check_images(function: str, layout: str, **operands):
    """Images have 4 dimensions, or 3 without the batch; all of them alike."""
    for name, kind in operands.items():
        if kind.ndim not in (3, 4):
            axes = ", ".join(layout)
            raise TypingError(
                f"{function}: {name} must have 4 dimensions ({axes}), or 3 without the batch, got {kind.ndim}"
            )


def batch(image):
    """The image or images as a contiguous batch."""
    raise NotImplementedError("for compiled code only")


@overload(batch)
def _overload_batch(image):
    if image.ndim == 3:
        return lambda image: shaped(contiguous(image), (1, *image.shape))
    return lambda image: contiguous(image)


def unbatch(result, like):
    """The result without its batch axis, where `like` has none."""
    raise NotImplementedError("for compiled code only")


@overload(unbatch)
def _overload_unbatch(result, like):
    if like.ndim == 3:
        return lambda result, like: shaped(result, result.shape[1:])
    return lambda result, like: result


@device()
def plane(shape, nhwc):
    """(height, width) of images of this shape."""
    return (shape[1], shape[2]) if nhwc else (shape[2], shape[3])


@device()
def resized(shape, nhwc, height, width):
    return (shape[0], height, width, shape[3]) if nhwc else (shape[0], shape[1], height, width)


@device(raises=True)
def check_channels(shape, nhwc):
    if shape[3 if nhwc else 1] == 0:
        raise WrongShape("images must have at least 1 channel, got shape {}", shape)


@device(raises=True)
def check_options(function, kernel, stride, padding, dilation):
    """Windows' numbers: at least 1, padding at least 0."""
    for i in range(2):
        if kernel[i] < 1:
            raise WrongShape("{}: kernel_size must be at least 1, got {}", function, kernel)
        if stride[i] < 1:
            raise WrongShape("{}: stride must be at least 1, got {}", function, stride)
        if dilation[i] < 1:
            raise WrongShape("{}: dilation must be at least 1, got {}", function, dilation)
        if padding[i][0] < 0 or padding[i][1] < 0:
            raise WrongShape("{}: padding must be at least 0, got {}", function, padding)


@device()
def settled_padding(name, padding, size, kernel, stride, dilation):
    """The padding in numbers; name: see `check_padding`."""
    if name < 2:
        return padding
    sides = padding
    for i in range(2):
        n, k, s, d = size[i], kernel[i], stride[i], dilation[i]
        total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
        small = total // 2
        side = (small, total - small) if name == 2 else (total - small, small)
        sides = (side, sides[1]) if i == 0 else (sides[0], side)
    return sides


@device(raises=True)
def window_count(function, n, kernel, stride, padding, dilation, ceil_mode):
    """How many windows there are along an axis; each must hold a pixel."""
    count = output_size(n, kernel, stride, padding, dilation, ceil_mode)
    if count < 1:
        raise WrongShape(
            "{}: a window of {} (kernel_size {}, dilation {}) does not fit into the padded axis of {} (padding {})",
            function, dilation * (kernel - 1) + 1, kernel, dilation, n + padding[0] + padding[1], padding,
        )  # fmt: skip
    for o in range(count):
        start = o * stride - padding[0]
        first = 0 if start >= 0 else -(start // dilation)
        if first >= kernel or start + first * dilation >= n:
            raise WrongShape(
                "{}: the window that starts at {} finds no input, only padding (axis of {}, padding {})",
                function, start, n, padding,
            )  # fmt: skip
    return count
