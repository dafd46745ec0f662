"""Convolution on the GPU; conv_plan.py chooses the algorithm."""

from tilewise.kernels import conv_winograd_plan
from tilewise.kernels.activation_plan import ACTIVATION_CODES
from tilewise.kernels.conv_plan import Convolution, fits_a_grid, is_depthwise_weight, is_little
from tilewise.kernels.cupy import (
    conv_depthwise,
    conv_depthwise_weight,
    conv_direct,
    conv_product,
    conv_product_weight,
    conv_sums,
    conv_tensor,
    conv_tensor_weight,
    conv_thin,
    conv_winograd,
    conv_winograd_weight,
    driver,
)
from tilewise.kernels.cupy.gemm_plan import NAMES_OF_WAYS

HAS_BFLOAT16 = True  # operation.py asks


def _by_tensor_cores(it, dtype, ordinal: int) -> bool:
    return conv_tensor.choose(it, dtype, driver.engine(ordinal))[0] is not None


def _by_product(it, x, weight, y, bias, extra, code, kept):
    choice, _ = conv_tensor.choose(it, x.dtype, driver.engine(x.place.ordinal))
    if choice is None:
        conv_product.correlate(it, x, weight, y, bias, extra, code)
    else:
        conv_tensor.correlate(it, x, weight, y, bias, extra, code, kept, choice)


def _is_narrow(it, dtype) -> bool:
    """Whether there are so few channels or outputs that a kernel without tiles is faster than a product."""
    return conv_direct.is_few(it, dtype) or conv_thin.applies(it)


def _directly(it, x, *given):
    (conv_thin if conv_thin.applies(it) else conv_direct).correlate(it, x, *given)


def _of_direct(it, dtype) -> str:
    if conv_thin.applies(it):
        return "tiles of few outputs"
    return "tiles of few channels" if conv_direct.is_few(it, dtype) else ""


def _weight_gradient(it, grad, x, shape, kept):
    if is_depthwise_weight(it):
        return conv_depthwise_weight.weight_gradient(it, grad, x, shape)
    if is_little(it) or not fits_a_grid(it) or not it.narrow:
        return conv_sums.weight_gradient(it, grad, x, shape)
    if conv_winograd_weight.applies(it, x.dtype, x.place.ordinal):
        return conv_winograd_weight.weight_gradient(it, grad, x, shape)
    choice, _ = conv_tensor_weight.choose(it, x.dtype, driver.engine(x.place.ordinal))
    if choice is not None:
        return conv_tensor_weight.weight_gradient(it, grad, x, shape, kept, choice)
    module = conv_product_weight if conv_product_weight.applies(it) else conv_sums
    return module.weight_gradient(it, grad, x, shape)


def _describe(it, dtype, algorithm: str, ordinal: int) -> str:
    """Of a call on that device."""
    engine = driver.engine(ordinal)
    if algorithm == "winograd":
        return conv_winograd.describe(it, dtype, engine)
    if algorithm != "gemm":
        return "" if algorithm != "direct" else _of_direct(it, dtype)
    choice, reasons = conv_tensor.choose(it, dtype, engine)
    tile = conv_product.tile_for(it, dtype, engine.capability) if choice is None else choice.tile
    way = "" if choice is None else f"{NAMES_OF_WAYS[choice.way]}, "
    by_pixels = it.channels_last if choice is None else conv_tensor.by_pixels(choice.way, it)
    order = "pixels x outputs" if by_pixels else "outputs x pixels"
    others = "".join(f"; not {name}: {reason}" for name, reason in reasons.items())
    return f"{way}tiles of {tile.rows} x {tile.columns} {order}{others}"


_CONVOLUTION = Convolution(
    "cupy",
    {"depthwise": conv_depthwise.correlate, "direct": _directly, "gemm": _by_product,
     "winograd": conv_winograd.correlate},
    _weight_gradient, conv_sums.bias_gradient, ACTIVATION_CODES,
    why_not_winograd=conv_winograd_plan.why_not, winograd_pays=conv_winograd_plan.pays,
    by_tensor_cores=_by_tensor_cores, tf32_is_faster=conv_winograd.tf32_is_faster, describe=_describe,
    prefers_direct=_is_narrow, counts=lambda it: it.narrow,
    engine_of=lambda place: driver.engine(place.ordinal),
)  # fmt: skip

choose_conv2d, describe_conv2d = _CONVOLUTION.choose_conv2d, _CONVOLUTION.describe_conv2d
bind_conv2d, conv2d, conv2d_backward = _CONVOLUTION.bind_conv2d, _CONVOLUTION.conv2d, _CONVOLUTION.conv2d_backward
conv_transpose2d = _CONVOLUTION.conv_transpose2d
conv_transpose2d_backward = _CONVOLUTION.conv_transpose2d_backward
