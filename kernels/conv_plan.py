"""Convolution on a GPU, for any backend: the choice of algorithm, and every gradient as one of three kinds of pass.

- Forward, and the gradient with respect to x: correlations (conv_geometry.py).
- Gradients with respect to the weights and the bias: sums over pixels in fixed parts.

A backend gives its kernels; `Convolution` makes conv2d and its relatives of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod

from tilewise.kernels import conv_geometry, settings
from tilewise.kernels.channel_plan import ceil_div
from tilewise.kernels.conv_geometry import Correlation
from tilewise.kernels.device_arrays import DeviceArray

# Fewer FLOPs than this fill no tile, nor does a group with fewer weights: a thread for each result is enough.
DIRECT_BELOW = 4_000
_FEW_WEIGHTS = 32
MOST_BLOCKS = (1 << 16) - 1  # of a grid's y (tiles of outputs) and z (groups)
_LEAST_TILE = 32  # outputs of the lowest tile of a product
ENOUGH_TILES = 128  # blocks of a product from which on larger tiles are taken
# Depthwise convolution in NCHW: (taps, stride) -> results of a thread: more of them share more rows of x, as long as
# all numbers stay in registers (of four results of 7 x 7, Numba's compiler unrolls no loop for sm_100).
DEPTHWISE_PLANES = {(3, 1): 4, (3, 2): 4, (5, 1): 4, (5, 2): 2, (7, 1): 2}
DEPTHWISE_COLUMNS = 4  # in NHWC: results of a thread
# The weight's gradient: (taps of square kernels, bytes of a sum) -> rows of them that a block sums: all, but for 49
# sums, or 25 in float64, which do not fit the registers everywhere.
DEPTHWISE_ROWS = {(3, 4): 3, (3, 8): 3, (5, 4): 5, (5, 8): 1, (7, 4): 1, (7, 8): 1}
# Blocks that keep a large GPU busy, and pixels below which another part of a sum costs more than it brings.
_ENOUGH_BLOCKS, _LEAST_PIXELS, _MOST_PARTS = 1024, 1024, 1 << 15
TILED_PIXELS = 512  # the same for a sum by tiles of a product


def split(pixels: int, blocks: int, least: int = _LEAST_PIXELS) -> tuple[int, int]:
    """(parts, pixels of each) for sums over so many pixels, where one part takes `blocks` blocks."""
    parts = max(1, min(ceil_div(pixels, least), ceil_div(_ENOUGH_BLOCKS, max(blocks, 1)), _MOST_PARTS))
    per_part = ceil_div(max(pixels, 1), parts)
    return ceil_div(max(pixels, 1), per_part), per_part


class KeptWeight(DeviceArray):
    """A weight for many calls. keep: `made_of` for it."""

    __slots__ = ("keep",)

    def __init__(self, array: DeviceArray, keep: Callable):
        super().__init__(array.place, array.pointer, array.shape, array.dtype, array.owner)
        self.keep = keep


def made_of(weight: DeviceArray, name: str, shape: tuple[int, ...], dtype, write: Callable) -> DeviceArray:
    """What `write` puts into an array of this shape: a weight as an algorithm wants it. Of a weight for many calls it
    is made once for each name and shape."""
    if isinstance(weight, KeptWeight):
        return weight.keep(name, shape, dtype, write)
    made = weight.place.empty(shape, dtype)
    write(made)
    return made


def is_little(it: Correlation) -> bool:
    """Whether it is too little for a tile of a product."""
    return it.outputs * it.channels * it.taps < _FEW_WEIGHTS or it.flops < DIRECT_BELOW


def is_thin(it: Correlation) -> bool:
    """Whether a tile of a product would compute one output of each group, and nothing with its other rows."""
    return it.groups > 1 and it.outputs == 1


def choose_tile(it: Correlation, large, middle, low):
    """Of tiles of 128 x 128, 64 x 64 and 32 outputs x 128 pixels: the large one where it is filled, and makes enough
    blocks."""
    if it.outputs <= _LEAST_TILE:
        return low
    blocks = ceil_div(it.outputs, 128) * ceil_div(it.pixels, 128) * it.groups
    return large if it.outputs > 64 and blocks >= ENOUGH_TILES else middle


def choose_tensor_tile(it: Correlation, multiprocessors: int, large, narrow):
    """Of tiles of 128 pixels x 128 and 64 outputs: the largest of which the outputs fill more than half, and which
    occupies the device; None where a tile of 64 x 64 is better."""
    for tile, outputs in ((large, 128), (narrow, 64)):
        blocks = ceil_div(it.pixels, 128) * ceil_div(it.outputs, outputs) * it.groups
        if 2 * it.outputs > outputs and 2 * it.pixels > 128 and blocks >= multiprocessors:
            return tile
    return None


def choose_weight_tile(it: Correlation, *tiles):
    """Of tiles of outputs x (tap, channel): the first that is filled by more than half, or None."""
    columns = it.taps * it.channels
    return next((tile for tile in tiles if 2 * it.outputs > tile.rows and 2 * columns > tile.columns), None)


def fits_a_grid(it: Correlation) -> bool:
    return max(it.groups, ceil_div(it.outputs, _LEAST_TILE)) <= MOST_BLOCKS


def is_depthwise(it: Correlation, dtype) -> bool:
    """Whether there is a kernel for this depthwise correlation."""
    if it.channels != 1 or it.groups == 1:
        return False
    if it.channels_last:
        return it.outputs == 1 and it.groups * dtype.itemsize % 16 == 0
    rows, columns = it.rows, it.columns
    plain = rows.step == columns.step == 1 and rows.spacing == columns.spacing == 1
    square = rows.taps == columns.taps and rows.stride == columns.stride
    return plain and square and (rows.taps, rows.stride) in DEPTHWISE_PLANES


def is_depthwise_weight(it: Correlation) -> bool:
    """Whether there is a kernel for the weight's gradient of this depthwise forward correlation."""
    return (
        it.channels == 1 and it.groups > 1 and it.rows.taps == it.columns.taps and (it.rows.taps, 4) in DEPTHWISE_ROWS
    )


def _window(stride, padding, dilation, groups, layout) -> dict:
    return {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout}


_SLOWER = {
    "depthwise": "slower where it does not apply", "gemm": "a group is too thin for a tile, or the work too little",
    "direct": "no operand is used twice from registers", "winograd": "too few channels or tiles",
}  # fmt: skip


@dataclass
class Convolution:
    """conv2d and its relatives of a backend.

    backend: its name. algorithms: name -> correlate(it, x, weight, y, bias, extra, code, kept), which computes
    y = activation(the correlation + bias + extra); bias and extra may be None. kept: a dict in which it may leave what
    it made of x for the next correlation of the same x. why_not_winograd(it, dtype), winograd_pays(it): as their names
    say. weight_gradient(it, grad, x, shape, kept): of the forward correlation; kept: of grad. bias_gradient(grad,
    layout).
    codes: of activations. describe(it, dtype, algorithm, ordinal): what the algorithm's name does not tell.
    by_tensor_cores(it, dtype, ordinal): whether its product goes to that device's tensor cores.
    tf32_is_faster(it): than Winograd's algorithm, where both are to be had.
    prefers_direct(it, dtype): whether its direct sum is faster than a product. counts(it): whether its product's
    kernels count so far. engine_of(place).
    """

    backend: str
    algorithms: dict[str, Callable]
    weight_gradient: Callable
    bias_gradient: Callable
    codes: dict
    why_not_winograd: Callable
    winograd_pays: Callable
    by_tensor_cores: Callable
    tf32_is_faster: Callable
    describe: Callable = lambda it, dtype, algorithm, ordinal: ""
    prefers_direct: Callable = lambda it, dtype: False
    counts: Callable = lambda it: True
    engine_of: Callable = lambda place: place.engine

    def choose_conv2d(self, shapes, dtype, options, packed=False, ordinal=0):
        """(algorithm, why not the others), on any device; raises ValueError where the one asked for does not apply."""
        it = _forward_of(shapes, options)
        why_not = {}
        reason = self.why_not_winograd(it, dtype)
        if reason:
            why_not["winograd"] = reason
        if not fits_a_grid(it):
            why_not["gemm"] = "too many groups or outputs for a grid"
        elif not self.counts(it):
            why_not["gemm"] = "images, rows, columns or taps that its kernels, which count in 32 bits, cannot count"
        if not is_depthwise(it, dtype):
            why_not["depthwise"] = "needs groups of one channel, and a kernel and a layout that there is a tile for"
        wanted = options["algorithm"]
        if wanted != "auto":
            if wanted in why_not:
                raise ValueError(f"conv2d: algorithm {wanted!r} does not apply: {why_not[wanted]}")
            return wanted, why_not
        best = self._choose(it, dtype, ordinal)
        by_tf32 = best == "gemm" and self._prefers_tf32(it, dtype, ordinal)
        reasons = _SLOWER | ({"winograd": "tensor cores are faster"} if by_tf32 else {})
        return best, {name: reason for name, reason in reasons.items() if name != best} | why_not

    def describe_conv2d(self, shapes, dtype, options, ordinal) -> str:
        return self.describe(_forward_of(shapes, options), dtype, options["algorithm"], ordinal)

    def _prefers_tf32(self, it: Correlation, dtype, ordinal: int) -> bool:
        """Whether a product of float32 would be one of TF32, and faster than Winograd's algorithm."""
        return settings.active().tf32 and self.tf32_is_faster(it) and self.by_tensor_cores(it, dtype, ordinal)

    def _choose(self, it: Correlation, dtype, ordinal: int) -> str:
        if is_depthwise(it, dtype):
            return "depthwise"
        no_product = is_little(it) or is_thin(it) or not fits_a_grid(it) or not self.counts(it)
        if no_product or self.prefers_direct(it, dtype):
            return "direct"
        if self.why_not_winograd(it, dtype) is not None or not self.winograd_pays(it):
            return "gemm"
        return "gemm" if self._prefers_tf32(it, dtype, ordinal) else "winograd"

    def _correlate(self, it, x, weight, y, bias, extra, code, algorithm, kept):
        name = self._choose(it, x.dtype, x.place.ordinal) if algorithm == "auto" else algorithm
        self.algorithms[name](it, x, weight, y, bias, extra, code, kept)

    def _forward(self, x, weight, size, bias, extra, code, algorithm, **window):
        """activation(the convolution of x + bias + extra), of that many rows and columns."""
        it = conv_geometry.forward(x.shape, weight.shape, size, **window)
        y = x.place.empty(it.shape_y, x.dtype)
        if y.size:
            self._correlate(it, x, weight, y, bias, extra, code, algorithm, {})
        return y

    def _transposed(self, grad, weight, shape, bias, kept: dict, **window):
        """conv2d's gradient with respect to an x of that shape, plus bias."""
        result = grad.place.empty(shape, grad.dtype)
        if result.size:
            for it in conv_geometry.transposed(grad.shape, weight.shape, shape, **window):
                self._correlate(it, grad, weight, result, bias, None, self.codes[None], "auto", kept)
        return result

    def _gradient(self, grad, x, weight, kept: dict, **window):
        """conv2d's gradient with respect to the weight."""
        it = conv_geometry.forward(x.shape, weight.shape, conv_geometry.pixels(grad.shape, window["layout"]), **window)
        return self.weight_gradient(it, grad, x, weight.shape, kept)

    def conv2d(self, x, weight, bias, add, *, stride, padding, dilation, groups, layout, activation, algorithm):
        window = _window(stride, padding, dilation, groups, layout)
        size = conv_geometry.output_size(x.shape, weight.shape, **window)
        return self._forward(x, weight, size, bias, add, self.codes[activation], algorithm, **window)

    def bind_conv2d(self, shapes, dtype, arrays, packs, **options):
        """conv2d with weight and bias, in `arrays`, given once: run(x, add=None).

        The first run on a device sends them there and waits, and so does one that wants the weight in another order, as
        images of another size may; call it once with such images before a stream is captured into a graph.
        """

        def keep(place, name, shape, dtype, write):
            engine = self.engine_of(place)
            key = (self.backend, id(engine), name, shape)
            if key not in packs:
                memory = engine.allocate(prod(shape) * dtype.itemsize, every_stream=True)
                made = DeviceArray(place, memory.pointer, shape, dtype, memory)
                engine.synchronize()  # a pool may hand out what kernels of another stream than `write`'s still use
                write(made)
                engine.synchronize()  # whatever stream reads it
                packs.setdefault(key, made)  # another thread may have been faster, and others may use what it made
                place.made_lasting()
            kept = packs[key]
            return place.lasting(DeviceArray(place, kept.pointer, kept.shape, kept.dtype, kept.owner))

        def on_device(name, place):
            array = arrays[name]
            write = self.engine_of(place).write
            return keep(place, name, array.shape, dtype, lambda to: write(to.owner, array.astype(dtype)))

        def run(x, add=None):
            weight = KeptWeight(on_device("weight", x.place), partial(keep, x.place))
            bias = None if arrays["bias"] is None else on_device("bias", x.place)
            return self.conv2d(x, weight, bias, add, **options)

        return run

    def conv2d_backward(self, grad, x, weight, *, stride, padding, dilation, groups, layout, needs):
        window = _window(stride, padding, dilation, groups, layout)
        kept: dict = {}
        return (
            self._transposed(grad, weight, x.shape, None, kept, **window) if "x" in needs else None,
            self._gradient(grad, x, weight, kept, **window) if "weight" in needs else None,
            self.bias_gradient(grad, layout) if "bias" in needs else None,
        )

    def conv_transpose2d(self, x, weight, bias, *, stride, padding, output_padding, groups, dilation, layout):
        size = [
            (n - 1) * s - sum(pads) + d * (k - 1) + extra + 1
            for n, s, pads, d, k, extra in zip(
                conv_geometry.pixels(x.shape, layout), stride, padding, dilation, weight.shape[2:], output_padding,
                strict=True,
            )
        ]  # fmt: skip
        shape = conv_geometry.image_shape(x.shape[0], weight.shape[1] * groups, size, layout)
        return self._transposed(x, weight, shape, bias, {}, **_window(stride, padding, dilation, groups, layout))

    def conv_transpose2d_backward(
        self, grad, x, weight, *, stride, padding, output_padding, groups, dilation, layout, needs
    ):
        del output_padding  # in grad's shape already; the pixels it added are beyond the last window
        window, size = _window(stride, padding, dilation, groups, layout), conv_geometry.pixels(x.shape, layout)
        return (
            self._forward(grad, weight, size, None, None, self.codes[None], "auto", **window) if "x" in needs else None,
            self._gradient(x, grad, weight, {}, **window) if "weight" in needs else None,
            self.bias_gradient(grad, layout) if "bias" in needs else None,
        )


def _forward_of(shapes, options: dict) -> Correlation:
    """The correlation of a call of conv2d."""
    x, weight, *_ = shapes
    window = {name: options[name] for name in ("stride", "padding", "dilation", "groups", "layout")}
    return conv_geometry.forward(x, weight, conv_geometry.output_size(x, weight, **window), **window)
