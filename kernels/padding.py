"""Padding of images: constant, reflect, replicate and circular, and its gradient."""

from collections.abc import Sequence
from math import prod

from tilewise.kernels import shapes
from tilewise.kernels.arrays import common_dtype
from tilewise.kernels.operation import Operation, Problem

MODES = ("constant", "reflect", "replicate", "circular")


def pad(x, padding, mode="constant", value=0):
    """Extend the last two axes (H, W) of an image tensor.

    Args:
        x: (..., H, W), float16, float32 or float64, on a GPU also bfloat16; any strides.
        padding: an int, a pair (height, width), or two pairs ((top, bottom), (left, right)), in pixels.
        mode: what the new pixels hold. "constant": `value`. "replicate": the edge pixel. "reflect": the image mirrored
            at its edge pixel, which is not repeated. "circular": the image continued from its other side.
        value: the constant.

    Returns:
        (..., H + top + bottom, W + left + right), of x's kind and dtype.

    Raises:
        TypeError: not an array, or not of a supported dtype; padding not of ints.
        ValueError: fewer than two axes; negative padding; an unknown mode; "reflect" by H or W or more, "circular" by
            more than H or W, "replicate" of an empty axis.
    """
    return _PAD.call((x,), (padding, mode, value))


def pad_backward(grad, input_shape, padding, mode="constant"):
    """The gradient of `pad`: every input pixel gets the sum of the gradients of its copies.

    Args:
        grad: (..., H + top + bottom, W + left + right), the gradient of pad's result.
        input_shape: x's shape, (..., H, W).
        padding, mode: as in `pad`.

    Returns:
        (..., H, W).

    Raises:
        TypeError, ValueError: as `pad`; also a grad whose shape is not that of pad's result.
    """
    return _PAD_BACKWARD.call((grad,), (input_shape, padding, mode))


def _checked_padding(function: str, name: str, shape: tuple[int, ...], padding, mode) -> shapes.Padding:
    if len(shape) < 2:
        raise ValueError(f"{function}: {name} must have at least 2 dimensions (..., H, W), got {shape}")
    if mode not in MODES:
        raise ValueError(f"{function}: mode must be one of {', '.join(MODES)}, got {mode!r}")
    pairs = shapes.explicit_padding(function, padding)
    for axis, n, amounts in zip(("height", "width"), shape[-2:], pairs, strict=True):
        # reflect cannot repeat the edge pixel, circular can use every pixel once, replicate needs one
        limits = {"constant": max(amounts), "reflect": n - 1, "circular": n, "replicate": max(amounts) if n else 0}
        if max(amounts) > max(limits[mode], 0):
            raise ValueError(
                f"{function}: {mode} padding of {max(amounts)} needs a larger {axis} than {n} ({name} {shape}, "
                f"padding {pairs})"
            )
    return pairs


def _checked_shape(shape) -> tuple[int, ...]:
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"pad_backward: input_shape must be a tuple of ints, got {shape!r}")
    return tuple(shapes.integer("pad_backward", "input_shape", n, minimum=0) for n in shape)


def _check_pad(x, padding, mode, value) -> Problem:
    dtype = common_dtype("pad", {"x": x})
    pairs = _checked_padding("pad", "x", x.shape, padding, mode)
    if isinstance(value, str) or (not isinstance(value, (int, float)) and not hasattr(value, "__float__")):
        raise TypeError(f"pad: value must be a number, got {value!r}")
    results = prod(x.shape[:-2]) * prod(n + sum(p) for n, p in zip(x.shape[-2:], pairs, strict=True))
    options = {"padding": pairs, "mode": mode, "value": float(value)}
    return Problem(options, bytes=(x.size + results) * dtype.itemsize)


def _check_pad_backward(grad, input_shape, padding, mode) -> Problem:
    dtype = common_dtype("pad_backward", {"grad": grad})
    shape = _checked_shape(input_shape)
    pairs = _checked_padding("pad_backward", "input_shape", shape, padding, mode)
    expected = (*shape[:-2], *(n + sum(p) for n, p in zip(shape[-2:], pairs, strict=True)))
    if grad.shape != expected:
        raise ValueError(f"pad_backward: grad must have shape {expected} for input_shape {shape}, got {grad.shape}")
    options = {"input_shape": shape, "padding": pairs, "mode": mode}
    return Problem(options, flops=grad.size, bytes=(grad.size + prod(shape)) * dtype.itemsize)


_PAD = Operation("padding", "pad", ("x",), _check_pad)
_PAD_BACKWARD = Operation("padding", "pad_backward", ("grad",), _check_pad_backward)
