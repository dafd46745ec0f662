"""Convolution on the GPU: the choice of algorithm, and every gradient as one of three kinds of pass.

- Forward, and the gradient with respect to x: correlations (conv_geometry.py), computed directly (conv_direct.py).
- Gradients with respect to the weights and the bias: sums over pixels in fixed parts (conv_sums.py).
"""

from tilewise.kernels import settings
from tilewise.kernels.cuda import (
    conv_depthwise,
    conv_depthwise_weight,
    conv_direct,
    conv_geometry,
    conv_product,
    conv_product_weight,
    conv_sums,
    conv_tensor,
    conv_tensor_weight,
    conv_winograd,
)
from tilewise.kernels.cuda.epilogue import ACTIVATION_CODES, NONE
from tilewise.kernels.cuda.launch import ceil_div
from tilewise.kernels.device_arrays import DeviceArray

# Fewer FLOPs than this fill no tile, nor does a group with fewer weights: a thread for each result is enough.
DIRECT_BELOW = 4_000
_FEW_WEIGHTS = 32
MOST_BLOCKS = (1 << 16) - 1  # of a grid's y (tiles of outputs) and z (groups)
_MODULES = {"depthwise": conv_depthwise, "direct": conv_direct, "gemm": conv_product, "winograd": conv_winograd}


def _window(stride, padding, dilation, groups, layout) -> dict:
    return {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout}


def choose_conv2d(shapes, dtype, options, packed=False):
    """(algorithm, why not the others) for this problem; raises ValueError where the one asked for does not apply."""
    x, weight, *_ = shapes
    window = {name: options[name] for name in ("stride", "padding", "dilation", "groups", "layout")}
    it = conv_geometry.forward(x, weight, conv_geometry.output_size(x, weight, **window), **window)
    why_not = {}
    reason = conv_winograd.why_not(it, dtype)
    if reason:
        why_not["winograd"] = reason
    if not _fits_a_grid(it):
        why_not["gemm"] = "too many groups or outputs for a grid"
    if not conv_depthwise.applies(it, dtype):
        why_not["depthwise"] = "needs groups of one channel of x, and a kernel and a layout that there is a tile for"
    wanted = options["algorithm"]
    if wanted != "auto":
        if wanted in why_not:
            raise ValueError(f"conv2d: algorithm {wanted!r} does not apply: {why_not[wanted]}")
        return wanted, why_not
    best = _choose(it, dtype)
    reasons = {
        "depthwise": "slower where it does not apply", "gemm": "a group is too thin for a tile, or the work too little",
        "direct": "no operand is used twice from registers",
        "winograd": "tensor cores are faster" if settings.active().tf32 else "too few channels or tiles",
    }  # fmt: skip
    return best, {name: reason for name, reason in reasons.items() if name != best} | why_not


def _choose(it, dtype) -> str:
    if conv_depthwise.applies(it, dtype):
        return "depthwise"
    if _is_little(it) or not _fits_a_grid(it):
        return "direct"
    if settings.active().tf32:  # tensor cores multiply faster than Winograd's transforms save
        return "gemm"
    return "winograd" if conv_winograd.why_not(it, dtype) is None and conv_winograd.pays(it) else "gemm"


def _is_little(it) -> bool:
    return it.outputs * it.channels * it.taps < _FEW_WEIGHTS or it.flops < DIRECT_BELOW


def _fits_a_grid(it) -> bool:
    return max(it.groups, ceil_div(it.outputs, conv_product.LOW.rows)) <= MOST_BLOCKS


def _correlate(it, x, weight, y, bias, extra, code, algorithm, turned=None):
    """turned: a list that keeps what conv_tensor made of x, for the next correlation of the same x."""
    if algorithm == "auto":
        algorithm = _choose(it, x.dtype)
    if algorithm != "gemm" or not conv_tensor.applies(it, x):
        _MODULES[algorithm].correlate(it, x, weight, y, bias, extra, code)
        return
    turned = [] if turned is None else turned
    if not turned:
        turned.append(conv_tensor.in_vectors(x, it.layout, it.groups))
    conv_tensor.correlate(it, turned[0], weight, y, bias, extra, code)


def _forward(x, weight, size, bias, extra, code, algorithm, **window):
    """activation(the convolution of x + bias + extra), of that many rows and columns."""
    it = conv_geometry.forward(x.shape, weight.shape, size, **window)
    y = x.place.empty(it.shape_y, x.dtype)
    if y.size:
        _correlate(it, x, weight, y, bias, extra, code, algorithm)
    return y


def _transposed(grad, weight, shape, bias, **window):
    """conv2d's gradient with respect to an x of that shape, plus bias."""
    result = grad.place.empty(shape, grad.dtype)
    turned = []
    if result.size:
        for it in conv_geometry.transposed(grad.shape, weight.shape, shape, **window):
            _correlate(it, grad, weight, result, bias, None, NONE, "auto", turned)
    return result


def _weight_gradient(grad, x, weight, **window):
    it = conv_geometry.forward(x.shape, weight.shape, conv_geometry.pixels(grad.shape, window["layout"]), **window)
    if conv_depthwise_weight.applies(it):
        return conv_depthwise_weight.weight_gradient(it, grad, x, weight.shape)
    if _is_little(it) or not _fits_a_grid(it):
        return conv_sums.weight_gradient(it, grad, x, weight.shape)
    module = conv_tensor_weight if conv_tensor.applies(it, x) else conv_product_weight
    return module.weight_gradient(it, grad, x, weight.shape)


def conv2d(x, weight, bias, add, *, stride, padding, dilation, groups, layout, activation, algorithm):
    window = _window(stride, padding, dilation, groups, layout)
    size = conv_geometry.output_size(x.shape, weight.shape, **window)
    return _forward(x, weight, size, bias, add, ACTIVATION_CODES[activation], algorithm, **window)


def bind_conv2d(shapes, dtype, arrays, packs, **options):
    """conv2d with weight and bias, in `arrays`, given once: run(x, add=None).

    The first run on a device sends them there and waits; so call it once before a stream is captured into a graph.
    """

    def on_device(name, place):
        array = arrays[name]
        if array is None:
            return None
        key = ("cuda", id(place.engine), name)
        if key not in packs:
            array = array.astype(dtype)
            memory = place.engine.allocate(array.nbytes, every_stream=True)
            place.engine.write(memory, array)
            place.engine.synchronize()  # whatever stream reads it
            packs[key] = DeviceArray(place, memory.pointer, array.shape, dtype, memory)
        kept = packs[key]
        return DeviceArray(place, kept.pointer, kept.shape, kept.dtype, kept.owner)

    def run(x, add=None):
        return conv2d(x, on_device("weight", x.place), on_device("bias", x.place), add, **options)

    return run


def conv2d_backward(grad, x, weight, *, stride, padding, dilation, groups, layout, needs):
    window = _window(stride, padding, dilation, groups, layout)
    return (
        _transposed(grad, weight, x.shape, None, **window) if "x" in needs else None,
        _weight_gradient(grad, x, weight, **window) if "weight" in needs else None,
        conv_sums.bias_gradient(grad, layout) if "bias" in needs else None,
    )


def conv_transpose2d(x, weight, bias, *, stride, padding, output_padding, groups, dilation, layout):
    size = [
        (n - 1) * s - sum(pads) + d * (k - 1) + extra + 1
        for n, s, pads, d, k, extra in zip(
            conv_geometry.pixels(x.shape, layout), stride, padding, dilation, weight.shape[2:], output_padding,
            strict=True,
        )
    ]  # fmt: skip
    shape = conv_geometry.image_shape(x.shape[0], weight.shape[1] * groups, size, layout)
    return _transposed(x, weight, shape, bias, **_window(stride, padding, dilation, groups, layout))


def conv_transpose2d_backward(grad, x, weight, *, stride, padding, output_padding, groups, dilation, layout, needs):
    del output_padding  # in grad's shape already; the pixels it added are beyond the last window
    window, size = _window(stride, padding, dilation, groups, layout), conv_geometry.pixels(x.shape, layout)
    return (
        _forward(grad, weight, size, None, None, NONE, "auto", **window) if "x" in needs else None,
        _weight_gradient(x, grad, weight, **window) if "weight" in needs else None,
        conv_sums.bias_gradient(grad, layout) if "bias" in needs else None,
    )
