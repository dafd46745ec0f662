"""Sums over the pixels of all images: the gradients of bias and weight, in two stages that always add alike.

    1. a block sums one part of the pixels, whose number follows from the shapes alone: parts[part, element]
    2. the parts are added in their order

Inside a block each thread sums every THREADS-th pixel; lanes are joined by shuffles, warps in their order.
"""

from numba import cuda

from tilewise.kernels.conv_geometry import Correlation, image_steps, pixels
from tilewise.kernels.conv_plan import split
from tilewise.kernels.cuda.launch import ELEMENTS, INT64, SUMS, ceil_div, device, kernel, sum_dtype
from tilewise.kernels.cuda.memory import narrow, shared_sums, widen, zero

THREADS = 128
WARPS = THREADS // 32
_ALL = 0xFFFFFFFF


@device
def join_lanes(value):
    """The sum over a warp, in every lane."""
    value += cuda.shfl_xor_sync(_ALL, value, 16)
    value += cuda.shfl_xor_sync(_ALL, value, 8)
    value += cuda.shfl_xor_sync(_ALL, value, 4)
    value += cuda.shfl_xor_sync(_ALL, value, 2)
    value += cuda.shfl_xor_sync(_ALL, value, 1)
    return value


@kernel(threads=THREADS)
def sum_parts(parts: SUMS, result: ELEMENTS, count: INT64, many: INT64, taps: INT64, channels: INT64, kept: INT64):
    """result[o, c, t] = parts[0, o, t, c] + ... + parts[many - 1, o, t, c] for c < kept; `count` of a part."""
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if i < count:
        total = zero(result)
        for part in range(many):
            total += parts[part * count + i]
        c, number = i % channels, i // channels
        t, o = number % taps, number // taps
        if c < kept:
            result[(o * kept + c) * taps + t] = narrow(total, result)


@kernel(threads=THREADS)
def sum_channel(grad: ELEMENTS, parts: SUMS, images: INT64, channels: INT64, area: INT64, per_part: INT64):
    """parts[part, c] = sum of grad[n, c, p] over the part's pixels of all images; block (c, part)."""
    c, part, thread = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
    warps = shared_sums(grad, WARPS)
    total = zero(grad)
    for k in range(part * per_part + thread, min((part + 1) * per_part, images * area), THREADS):
        n = k // area
        total += widen(grad[(n * channels + c) * area + k - n * area])
    total = join_lanes(total)
    if thread % 32 == 0:
        warps[thread // 32] = total
    cuda.syncthreads()
    if thread == 0:
        for warp in range(1, WARPS):
            total += warps[warp]
        parts[part * channels + c] = total


@kernel(threads=THREADS)
def sum_last_axis(grad: ELEMENTS, parts: SUMS, pixels: INT64, channels: INT64, per_part: INT64):
    """parts[part, c] = sum of grad[p, c] over the part's pixels; a warp reads 32 neighbouring channels."""
    lane, warp, part = cuda.threadIdx.x % 32, cuda.threadIdx.x // 32, cuda.blockIdx.y
    c = cuda.blockIdx.x * 32 + lane
    warps = shared_sums(grad, THREADS)
    total = zero(grad)
    if c < channels:
        for p in range(part * per_part + warp, min((part + 1) * per_part, pixels), WARPS):
            total += widen(grad[p * channels + c])
    warps[cuda.threadIdx.x] = total
    cuda.syncthreads()
    if warp == 0 and c < channels:
        for k in range(1, WARPS):
            total += warps[k * 32 + lane]
        parts[part * channels + c] = total


@kernel(threads=THREADS)
def weight_sums(
    grad: ELEMENTS, x: ELEMENTS, parts: SUMS, oh: INT64, ow: INT64, h: INT64, w: INT64,
    top: INT64, left: INT64, stride_h: INT64, stride_w: INT64, dilation_h: INT64, dilation_w: INT64,
    gn: INT64, gc: INT64, gh: INT64, gw: INT64, xn: INT64, xc: INT64, xh: INT64, xw: INT64,
    count: INT64, outputs: INT64, channels: INT64, taps: INT64, width: INT64, total_pixels: INT64, per_part: INT64,
):  # fmt: skip
    """parts[part, e] for element e = (o, c, p, q) of the weight; block (e, part). The definition, for any options."""
    element, part, thread = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
    warps = shared_sums(grad, WARPS)
    tap, number = element % taps, element // taps
    c, o = number % channels, number // channels
    row, column = top + tap // width * dilation_h, left + tap % width * dilation_w
    first_x, first_grad = (o // outputs * channels + c) * xc, o * gc
    total = zero(grad)
    for k in range(part * per_part + thread, min((part + 1) * per_part, total_pixels), THREADS):
        j, number = k % ow, k // ow
        i, n = number % oh, number // oh
        r, s = row + i * stride_h, column + j * stride_w
        inside = r >= 0 and r < h and s >= 0 and s < w
        value = widen(x[first_x + n * xn + r * xh + s * xw]) if inside else zero(grad)
        total += value * widen(grad[first_grad + n * gn + i * gh + j * gw])
    total = join_lanes(total)
    if thread % 32 == 0:
        warps[thread // 32] = total
    cuda.syncthreads()
    if thread == 0:
        for warp in range(1, WARPS):
            total += warps[warp]
        parts[part * count + element] = total


def new_parts(place, many: int, count: int, dtype):
    return place.empty((many, count), sum_dtype(dtype))


def add_parts(parts, result, taps: int = 1, channels: int = 1, kept: int | None = None):
    """The second stage; taps and channels, where the parts have them in the other order than the result, which has the
    first `kept` channels (None: all)."""
    many, count = parts.shape
    kept = channels if kept is None else kept
    numbers = count, many, taps, channels, kept
    sum_parts(result.place, ceil_div(count, THREADS), parts, result, *numbers, dtype=result.dtype)
    return result


def bias_gradient(grad, layout: str):
    """grad summed over images and pixels."""
    height, width = pixels(grad.shape, layout)
    images, area = grad.shape[0], height * width
    channels = grad.shape[1] if layout == "NCHW" else grad.shape[3]
    blocks = channels if layout == "NCHW" else ceil_div(channels, 32)
    many, per_part = split(images * area, blocks)
    parts = new_parts(grad.place, many, channels, grad.dtype)
    if layout == "NCHW":
        sum_channel(grad.place, (blocks, many, 1), grad, parts, images, channels, area, per_part)
    else:
        sum_last_axis(grad.place, (blocks, many, 1), grad, parts, images * area, channels, per_part)
    return add_parts(parts, grad.place.empty((channels,), grad.dtype))


def weight_gradient(it: Correlation, grad, x, shape: tuple[int, ...]):
    """conv2d's gradient with respect to a weight of that shape; `it`: its forward correlation."""
    count, taps = shape[0] * shape[1] * shape[2] * shape[3], shape[2] * shape[3]
    many, per_part = split(it.pixels, count)
    parts = new_parts(grad.place, many, count, grad.dtype)
    rows, columns = it.rows, it.columns
    weight_sums(
        grad.place, (count, many, 1), grad, x, parts, rows.count, columns.count, rows.size, columns.size, rows.origin,
        columns.origin, rows.stride, columns.stride, rows.spacing, columns.spacing,
        *image_steps(it.shape_y, it.layout), *image_steps(it.shape_x, it.layout),
        count, it.outputs, it.channels, taps, it.width, it.pixels, per_part,
    )  # fmt: skip
    return add_parts(parts, grad.place.empty(shape, grad.dtype))
