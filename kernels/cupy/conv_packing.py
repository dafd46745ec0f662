"""Operands of a convolution in the order of its product, on the GPU; src/conv_packing.cu says how."""

from tilewise.kernels.channel_plan import ceil_div
from tilewise.kernels.conv_geometry import Correlation, image_steps, pixels
from tilewise.kernels.conv_plan import made_of
from tilewise.kernels.copying_plan import WORDS
from tilewise.kernels.cupy.launch import Kernel

_SIDE = 32  # conv_packing.cu's
_MOST_BLOCKS = (1 << 31) - 1  # of a grid's x
_TURNED_COLUMNS, _TURNED_BYTES = 64, 256  # of a tile of conv_pack_vectors: columns, and bytes of rows in each
_pack = Kernel("conv_packing.cu", "conv_pack<{T}>", "P P 15q", dtypes=[WORDS[size].name for size in (2, 4, 8)])
_pack_vectors = Kernel(
    "conv_packing.cu", "conv_pack_vectors<{T}>", "P P 15q", dtypes=[WORDS[size].name for size in (2, 4)], blocks=4,
    promises=("LDG.128", "STG.128"),
)  # fmt: skip


def whole_vectors(length: int, dtype) -> int:
    """Rounded up to whole vectors of 16 bytes."""
    width = 16 // dtype.itemsize
    return ceil_div(length, width) * width


def _start(place, source, target, sizes, padded, steps, to_row: int, batch):
    """source: its address. sizes, padded, steps: of rows and columns; batch: (many, elements to the next of source, of
    target) of each. What a grid has no room for goes in parts of the batch's second axis."""
    many, from_, to = zip(*batch, strict=True)
    item, width = target.dtype.itemsize, 16 // target.dtype.itemsize
    lengths = (sizes[0], steps[1], *from_, padded[1], to_row, *to)
    by_rows = steps[0] == 1 and sizes[0] == padded[0]
    if item < 8 and by_rows and source % 16 == 0 and not any(n % width for n in lengths):
        kernel, side = _pack_vectors, (_TURNED_BYTES // item, _TURNED_COLUMNS)
    else:
        kernel, side = _pack, (_SIDE, _SIDE)
    of_one = ceil_div(padded[0], side[0]) * ceil_div(padded[1], side[1]) * many[0] * many[2]
    at_once = max(1, min(many[1], _MOST_BLOCKS // max(of_one, 1)))
    for first in range(0, many[1], at_once):
        some = min(at_once, many[1] - first)
        kernel(
            place, of_one * some, source + first * from_[1] * item, target.pointer + first * to[1] * item, *sizes,
            *padded, *steps, to_row, many[0], some, *from_, *to, dtype=WORDS[item],
        )  # fmt: skip


def pack_weights(it: Correlation, weight, channels: int):
    """(the weights as (group, row and column of the tap, `channels` channels, output), outputs in whole vectors)."""
    outputs, kh, kw = whole_vectors(it.outputs, weight.dtype), it.rows.taps, it.columns.taps
    first = it.rows.first_tap * it.width + it.columns.first_tap

    def write(packed):
        group, row, column, to_row, _ = (step // weight.dtype.itemsize for step in packed.strides)
        _start(
            weight.place, weight.pointer + first * weight.dtype.itemsize, packed, (it.channels, it.outputs),
            (channels, outputs), (it.channel_step, it.output_step), to_row,
            [(kw, it.columns.tap_step, column), (kh, it.rows.tap_step * it.width, row),
             (it.groups, it.group_step, group)],
        )  # fmt: skip

    return made_of(weight, "gemm", (it.groups, kh, kw, channels, outputs), weight.dtype, write), outputs


def in_vectors(x, layout: str, groups: int):
    """(x with its channels last, each group's in whole vectors; channels of a group then): x itself where it is so."""
    images, (height, width) = x.shape[0], pixels(x.shape, layout)
    channels = x.shape[1 if layout == "NCHW" else 3] // groups
    padded, area, last = whole_vectors(channels, x.dtype), height * width, layout == "NHWC" or height * width == 1
    if last and padded == channels:
        return x.reshape(images, height, width, groups * channels), channels
    turned = x.place.empty((images, height, width, groups * padded), x.dtype)
    image, channel, _, pixel = (0, 1, 0, groups * channels) if last else image_steps(x.shape, layout)
    many, rows = (1, images * area) if last else (images, area)
    _start(
        x.place, x.pointer, turned, (rows, channels), (rows, padded), (pixel, channel), groups * padded,
        [(groups, channels * channel, padded), (many, image, area * groups * padded), (1, 0, 0)],
    )  # fmt: skip
    return turned, padded


def in_planes(x):
    """x, in NHWC, as NCHW."""
    images, height, width, channels = x.shape
    area = height * width
    turned = x.place.empty((images, channels, height, width), x.dtype)
    size, once = (channels, area), (1, 0, 0)
    batch = [once, (images, area * channels, area * channels), once]
    _start(x.place, x.pointer, turned, size, size, (1, channels), area, batch)
    return turned
