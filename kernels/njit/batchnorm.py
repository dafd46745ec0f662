"""Batch norm inside @njit, in evaluation and training, and its gradient: all native."""

import numpy as np
from numba.core.errors import TypingError
from numba.extending import register_jitable

from tilewise.kernels.cpu import batchnorm as cpu
from tilewise.kernels.cpu.epilogue import ACTIVATION_CODES
from tilewise.kernels.cpu.jit import kernel
from tilewise.kernels.njit.arguments import WrongShape, check_arrays, check_number, is_absent, literal
from tilewise.kernels.njit.images import check_images
from tilewise.kernels.njit.linking import call_kernel, contiguous, optional, shaped
from tilewise.kernels.shapes import EPILOGUES

for function in (cpu._rows, cpu._group, cpu._kept):
    register_jitable(error_model="numpy")(function)
rows_of, group_of, kept_of = cpu._rows, cpu._group, cpu._kept
ENOUGH_CHANNELS, SMALL, FORWARD_CHUNK, BACKWARD_CHUNK = (
    cpu.ENOUGH_CHANNELS, cpu.SMALL, cpu.FORWARD_CHUNK, cpu.BACKWARD_CHUNK
)  # fmt: skip


@kernel(parallel=False)
def evaluated(x, y, images, channels, pixels, running_mean, running_var, weight, bias, mean, invstd, eps, code):
    """pixels: of a plane in NCHW, else 0, where `images` counts all pixels."""
    operands = running_mean, running_var, weight, bias, mean, invstd
    if pixels == 0:
        width, block = rows_of(channels, images, x.itemsize)
        mode = kept_of(x.size, channels, x.itemsize, 2, False)
        call_kernel(
            "cpu.batchnorm_rows.forward_by_row",
            (x, y, channels, width, block, *operands, False, 0.0, eps, code, mode, 1),
        )
    else:
        call_kernel(
            "cpu.batchnorm_planes.forward_by_block",
            (x, y, images, channels, pixels, *operands, False, 0.0, eps, code, False),
        )


@kernel(parallel=False)
def trained(x, y, images, channels, pixels, running_mean, running_var, weight, bias, mean, invstd, momentum, eps, code):
    """As `evaluated`."""
    operands = running_mean, running_var, weight, bias, mean, invstd
    if pixels == 0:
        width, block = rows_of(channels, images, x.itemsize)
        mode = kept_of(x.size, channels, x.itemsize, 2, False)
        call_kernel(
            "cpu.batchnorm_rows.forward_by_row",
            (x, y, channels, width, block, *operands, True, momentum, eps, code, mode, 1),
        )
    elif channels < ENOUGH_CHANNELS and x.size >= SMALL:
        call_kernel(
            "cpu.batchnorm_planes.forward_by_block",
            (x, y, images, channels, pixels, *operands, True, momentum, eps, code, False),
        )
    else:
        group = group_of(images, pixels, FORWARD_CHUNK, images * pixels * x.itemsize * 2)
        call_kernel(
            "cpu.batchnorm_planes.forward_by_channel",
            (x, y, images, channels, pixels, group, *operands, momentum, eps, code, False),
        )


@kernel(parallel=False)
def gradients(grad, x, result, images, channels, pixels, mean, invstd, weight, grad_weight, grad_bias, frozen):
    """As `evaluated`."""
    mode = kept_of(x.size, channels, x.itemsize, 3, frozen)
    operands = mean, invstd, weight, grad_weight, grad_bias, mode
    if pixels == 0:
        width, block = rows_of(channels, images, x.itemsize)
        call_kernel("cpu.batchnorm_rows.backward_by_row", (grad, x, result, channels, width, block, *operands, 1))
    elif channels < ENOUGH_CHANNELS and x.size >= SMALL:
        call_kernel("cpu.batchnorm_planes.backward_by_block", (grad, x, result, images, channels, pixels, *operands))
    else:
        group = group_of(images, pixels, BACKWARD_CHUNK, images * pixels * x.itemsize * 3)
        call_kernel(
            "cpu.batchnorm_planes.backward_by_channel", (grad, x, result, images, channels, pixels, group, *operands)
        )


def _channel_axis(function: str, kind, layout) -> int:
    """Which axis of x holds the channels."""
    layout = literal(function, "layout", layout, "NCHW", "NHWC")
    if kind.ndim != 2:
        check_images(function, layout, x=kind)
    return kind.ndim - 1 if layout == "NHWC" or kind.ndim == 2 else kind.ndim - 3


def _sizes_of(rank: int, axis: int):
    """A function x -> (images, channels, pixels) as the kernels above take them."""
    if axis == rank - 1:
        return lambda shape, size: (size // max(shape[axis], 1), shape[axis], 0)
    if rank == 4:
        return lambda shape, size: (shape[0], shape[1], shape[2] * shape[3])
    return lambda shape, size: (1, shape[0], shape[1] * shape[2])


def batch_norm(
    x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5, layout="NCHW",
    activation=None, return_stats=False,
):  # fmt: skip
    name = "batch_norm"
    check_arrays(
        name, {"running_mean": (1,), "running_var": (1,), "weight": (1,), "bias": (1,)}, x=x,
        running_mean_=running_mean, running_var_=running_var, weight_=weight, bias_=bias,
    )  # fmt: skip
    check_number(name, momentum=momentum, eps=eps)
    axis = _channel_axis(name, x, layout)
    learns = literal(name, "training", training, False, True)
    code = ACTIVATION_CODES[literal(name, "activation", activation, *EPILOGUES)]
    stats = literal(name, "return_stats", return_stats, False, True)
    present = [not is_absent(running) for running in (running_mean, running_var)]
    if present[0] != present[1]:
        raise TypingError(f"{name}: running_mean and running_var must both be arrays or both None")
    if not learns and not present[0]:
        raise TypingError(f"{name}: running_mean and running_var are required in evaluation (training=False)")
    for running in (running_mean, running_var):
        if learns and present[0] and not (running.layout == "C" and running.mutable):
            raise TypingError(f"{name}: inside @njit, running statistics must be contiguous and writeable in training")
    sizes = register_jitable(_sizes_of(x.ndim, axis))

    def implementation(
        x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5, layout="NCHW",
        activation=None, return_stats=False,
    ):  # fmt: skip
        c = x.shape[axis]
        means, variances = optional(running_mean, x), optional(running_var, x)
        factors, offsets = optional(weight, x), optional(bias, x)
        for vector in (means, variances, factors, offsets):
            if vector.size != c and vector.size > 0:
                raise WrongShape(
                    "batch_norm: running_mean, running_var, weight and bias must have shape ({},), one value for each "
                    "channel, got ({},) (x {})", c, vector.size, x.shape,
                )  # fmt: skip
        if learns and x.size == c:
            raise WrongShape("batch_norm: more than 1 value per channel is needed in training, got x {}", x.shape)
        if not eps > 0 and (learns or not eps == 0):
            raise WrongShape("batch_norm: eps must be positive, got {}", float(eps))
        y = np.empty(x.shape, x.dtype)
        mean, invstd = np.zeros(c if stats else 0, x.dtype), np.zeros(c if stats else 0, x.dtype)
        if x.size > 0:
            flat = shaped(contiguous(x), (x.size,)), shaped(y, (y.size,))
            vectors = means, variances, factors, offsets, mean, invstd
            if learns:
                numbers = float(momentum), float(eps), code
                call_kernel("njit.batchnorm.trained", (*flat, *sizes(x.shape, x.size), *vectors, *numbers))
            else:
                call_kernel("njit.batchnorm.evaluated", (*flat, *sizes(x.shape, x.size), *vectors, float(eps), code))
        elif stats:
            for i in range(c):
                mean[i] = means[i] if not learns else x.dtype.type(0)
                invstd[i] = ((variances[i] if not learns else x.dtype.type(0)) + x.dtype.type(eps)) ** -0.5
        if stats:
            return y, mean, invstd
        return y

    return implementation


def batch_norm_backward(grad, x, mean, invstd, weight=None, training=True, layout="NCHW"):
    name = "batch_norm_backward"
    check_arrays(
        name, {"mean": (1,), "invstd": (1,), "weight": (1,)}, grad=grad, x=x, mean=mean, invstd=invstd, weight_=weight
    )
    axis = _channel_axis(name, x, layout)
    if grad.ndim != x.ndim:
        raise TypingError(f"{name}: grad must have x's shape, got {grad.ndim} and {x.ndim} dimensions")
    frozen = not literal(name, "training", training, False, True)
    sizes = register_jitable(_sizes_of(x.ndim, axis))

    def implementation(grad, x, mean, invstd, weight=None, training=True, layout="NCHW"):
        c = x.shape[axis]
        if grad.shape != x.shape:
            raise WrongShape("batch_norm_backward: grad must have x's shape {}, got {}", x.shape, grad.shape)
        factors = optional(weight, x)
        if mean.size != c or invstd.size != c or (factors.size != c and factors.size > 0):
            raise WrongShape(
                "batch_norm_backward: mean, invstd and weight must have shape ({},), one value for each channel", c
            )
        result = np.empty(x.shape, x.dtype)
        grad_weight, grad_bias = np.zeros(c, x.dtype), np.zeros(c, x.dtype)
        if x.size > 0:
            arrays = shaped(contiguous(grad), (x.size,)), shaped(contiguous(x), (x.size,)), shaped(result, (x.size,))
            vectors = contiguous(mean), contiguous(invstd), factors, grad_weight, grad_bias
            call_kernel("njit.batchnorm.gradients", (*arrays, *sizes(x.shape, x.size), *vectors, frozen))
        return result, grad_weight, grad_bias

    return implementation
