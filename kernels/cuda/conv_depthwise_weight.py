"""The weight gradient of a depthwise convolution: T sums a channel over all pixels, in two stages (conv_sums.py).

A thread keeps the sums of all taps of one channel in registers: a number of grad, once loaded, meets T of x, which L1
has. NCHW: a block has one channel, and its threads every THREADS-th pixel. NHWC: a block has 32 channels, one a lane,
and its warps take turns at the pixels.
"""

from numba import cuda

from tilewise.kernels.conv_geometry import Correlation, image_steps
from tilewise.kernels.conv_plan import DEPTHWISE_ROWS, split
from tilewise.kernels.cuda.conv_sums import THREADS, WARPS, add_parts, join_lanes, new_parts
from tilewise.kernels.cuda.launch import ELEMENTS, INT64, SUMS, ceil_div, kernel
from tilewise.kernels.cuda.memory import register_sums, shared_sums, widen, zero


def _make(taps: int, size: int, some: int, channels_last: bool):
    area = some * taps
    name = f"depthwise_weight_{taps}x{taps}_{'nhwc' if channels_last else 'nchw'}{'_double' if size == 8 else ''}"

    @kernel(threads=THREADS, name=name, dtypes=("float64",) if size == 8 else ("float16", "float32"))
    def depthwise_weight(
        grad: ELEMENTS, x: ELEMENTS, parts: SUMS, oh: INT64, ow: INT64, h: INT64, w: INT64,
        top: INT64, left: INT64, stride_h: INT64, stride_w: INT64, dilation_h: INT64, dilation_w: INT64,
        gn: INT64, gc: INT64, gh: INT64, gw: INT64, xn: INT64, xc: INT64, xh: INT64, xw: INT64,
        outputs: INT64, multiplier: INT64, pixels: INT64, per_part: INT64,
    ):  # fmt: skip
        """parts[part, o, p, q]; block (o or 32 of them, part, rows of taps)."""
        first_tap = cuda.blockIdx.z * some
        thread, part = cuda.threadIdx.x, cuda.blockIdx.y
        lane, warp = thread % 32, thread // 32
        o = cuda.blockIdx.x * 32 + lane if channels_last else cuda.blockIdx.x
        first, step = (warp, WARPS) if channels_last else (thread, THREADS)
        sums, joined = register_sums(grad, area), shared_sums(grad, THREADS)
        for t in range(area):
            sums[t] = zero(grad)
        end = min((part + 1) * per_part, pixels) if o < outputs else 0
        for k in range(part * per_part + first, end, step):
            j, number = k % ow, k // ow
            i, n = number % oh, number // oh
            value = widen(grad[n * gn + o * gc + i * gh + j * gw])
            source = n * xn + o // multiplier * xc
            for p in range(some):
                row = top + i * stride_h + (first_tap + p) * dilation_h
                for q in range(taps):
                    column = left + j * stride_w + q * dilation_w
                    inside = row >= 0 and row < h and column >= 0 and column < w
                    other = widen(x[source + row * xh + column * xw]) if inside else zero(grad)
                    sums[p * taps + q] += value * other
        for t in range(area):
            total = sums[t] if channels_last else join_lanes(sums[t])
            joined[thread] = total
            cuda.syncthreads()
            if (warp == 0 if channels_last else thread == 0) and o < outputs:
                for other_warp in range(1, WARPS):
                    total += joined[other_warp * 32 + (lane if channels_last else 0)]
                parts[((part * outputs + o) * taps + first_tap) * taps + t] = total
            cuda.syncthreads()

    return depthwise_weight


weight_kernels = {(*k, last): _make(*k, some, last) for k, some in DEPTHWISE_ROWS.items() for last in (False, True)}


def weight_gradient(it: Correlation, grad, x, shape: tuple[int, ...]):
    """conv2d's gradient with respect to a weight of that shape; `it`: its forward correlation."""
    outputs = shape[0]
    blocks = ceil_div(outputs, 32) if it.channels_last else outputs
    many, per_part = split(it.pixels, blocks)
    parts = new_parts(grad.place, many, outputs * it.taps, grad.dtype)
    rows, columns, size = it.rows, it.columns, parts.dtype.itemsize
    weight_kernels[rows.taps, size, it.channels_last](
        grad.place, (blocks, many, rows.taps // DEPTHWISE_ROWS[rows.taps, size]), grad, x, parts,
        rows.count, columns.count, rows.size, columns.size, rows.origin,
        columns.origin, rows.stride, columns.stride, rows.spacing, columns.spacing,
        *image_steps(it.shape_y, it.layout), *image_steps(it.shape_x, it.layout),
        outputs, it.outputs, it.pixels, per_part,
    )  # fmt: skip
    return add_parts(parts, grad.place.empty(shape, grad.dtype))
