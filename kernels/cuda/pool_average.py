"""Averages of windows and bins on the GPU: a thread for each unit of the result; global ones: a warp, a block.

Where a window is the whole image there are too few results for a thread each: for NCHW the lanes of a warp, or the
threads of a block, share a plane; for NHWC the threads of a block share the pixels.
"""

from numba import cuda

from tilewise.kernels.cuda.launch import ELEMENTS, INT32, INT64, REAL, kernel
from tilewise.kernels.cuda.memory import (
    at,
    lanes,
    load_vector,
    narrow,
    register_sums,
    registers,
    shared_sums,
    store_vector,
    widen,
    zero,
)  # fmt: skip
from tilewise.kernels.cuda.pool_windows import THREADS, blocks_of, extent, split, window
from tilewise.kernels.cuda.reduction import block_sum, group_sum
from tilewise.kernels.pool_plan import Pool

WARPS = THREADS // 32
ROOM = THREADS * 8  # sums of a block: 8 channels a thread at most (float16)


def _make(vector: bool, side: int):
    taps = max(side * side, 1)
    room = taps * 16
    name = f"avg_pool_{'vectors' if vector else 'elements'}" + (f"_{side}x{side}" if side else "")

    @kernel(threads=THREADS, name=name, promises=("LDG.128", "STG.128") if vector else ())
    def avg_pool(
        x: ELEMENTS, y: ELEMENTS, divisor: REAL, windows: INT64,
        height: INT64, width: INT64, rows: INT64, columns: INT64, units: INT64,
        kh: INT32, kw: INT32, sh: INT32, sw: INT32, top: INT32, left: INT32, bottom: INT32, right: INT32,
        include_pad: INT32,
    ):  # fmt: skip
        """divisor: 0 where it depends on the window."""
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if i < windows:
            count = lanes(x) if vector else 1
            rest, unit = split(i, units)
            rest, column = split(rest, columns)
            image, row = split(rest, rows)
            first_row, end_row = window(row, height, rows, kh, sh, top, 1)
            first_column, end_column = window(column, width, columns, kw, sw, left, 1)
            channels, channel = units * count, unit * count
            origin = image * height * width * channels + channel
            raw, sums = registers(x, room), register_sums(x, 16)
            for k in range(count):
                sums[k] = zero(x)
            if side and end_row - first_row == side and end_column - first_column == side:
                for t in range(taps):
                    place = (first_row + t // side) * width + first_column + t % side
                    load_vector(at(raw, t * count), x, origin + place * channels)
                for t in range(taps):
                    for k in range(count):
                        sums[k] += widen(raw[t * count + k])
            else:
                for h in range(first_row, end_row):
                    for w in range(first_column, end_column):
                        place = (h * width + w) * channels
                        if vector:
                            load_vector(raw, x, origin + place)
                        else:
                            raw[0] = x[origin + place]
                        for k in range(count):
                            sums[k] += widen(raw[k])
            if divisor == 0:
                high = extent(row, height, rows, kh, sh, top, bottom, include_pad)
                divisor = type(divisor)(high * extent(column, width, columns, kw, sw, left, right, include_pad))
            for k in range(count):
                raw[k] = narrow(sums[k] / divisor, y)
            if vector:
                store_vector(y, i * count, raw)
            else:
                y[i] = raw[0]

    return avg_pool


_kernels = {(vector, side): _make(vector, side) for vector in (False, True) for side in ((0, 2, 3) if vector else (0,))}


@kernel(threads=THREADS, promises=("LDG.128",))
def average_of_planes(x: ELEMENTS, y: ELEMENTS, planes: INT64, plane: INT64, vectors: INT64, group: INT32):
    """y[p] = the average of the plane p; `group` threads for each, a warp or the block."""
    width = lanes(x)
    thread = cuda.threadIdx.x
    which = cuda.blockIdx.x * (THREADS // group) + thread // group
    member = thread & (group - 1)
    raw, total = registers(x, 16), zero(x)
    if which < planes:
        first = which * plane
        for v in range(member, vectors, group):
            load_vector(raw, x, first + v * width)
            for k in range(width):
                total += widen(raw[k])
        for i in range(vectors * width + member, plane, group):
            total += widen(x[first + i])
    total = group_sum(total, 32) if group == 32 else block_sum(total, shared_sums(x, 32), WARPS)
    if member == 0 and which < planes:
        y[which] = narrow(total / type(total)(plane), y)


def _make_rows(vector: bool):
    @kernel(
        threads=THREADS, name=f"average_of_rows_in_{'vectors' if vector else 'elements'}",
        promises=("LDG.128",) if vector else (),
    )  # fmt: skip
    def average_of_rows(x: ELEMENTS, y: ELEMENTS, pixels: INT64, channels: INT64, span: INT32, rows: INT32):
        """y[image, c] = the average of x[image, :, c]. Block (image, tile): `span` units of channels, `rows` pixels at
        a time."""
        width = lanes(x) if vector else 1
        thread = cuda.threadIdx.x
        row, channel = thread // span, (cuda.blockIdx.y * span + thread % span) * width
        first = cuda.blockIdx.x * pixels * channels + channel
        raw, sums, scratch = registers(x, 16), register_sums(x, 8), shared_sums(x, ROOM)
        for k in range(width):
            sums[k] = zero(x)
        if row < rows and channel < channels:
            for pixel in range(row, pixels, rows):
                if vector:
                    load_vector(raw, x, first + pixel * channels)
                else:
                    raw[0] = x[first + pixel * channels]
                for k in range(width):
                    sums[k] += widen(raw[k])
        for k in range(width):
            scratch[thread * width + k] = sums[k]
        cuda.syncthreads()
        begin = cuda.blockIdx.y * span * width
        for c in range(thread, span * width, THREADS):
            if begin + c < channels:
                total = scratch[c]
                for other in range(1, rows):
                    total += scratch[other * span * width + c]
                y[cuda.blockIdx.x * channels + begin + c] = narrow(total / type(total)(pixels), y)

    return average_of_rows


average_of_rows = {vector: _make_rows(vector) for vector in (False, True)}


def run_average(pool: Pool, x, y, divisor, include_pad):
    """y: the sums of the windows over x, divided; divisor: 0 where it depends on the window."""
    numbers = (*pool.shape, *pool.kernel, *pool.stride, *pool.low, *pool.high, include_pad)
    run = _kernels[pool.width > 1, pool.side]
    run(x.place, blocks_of(pool.windows), x, y, divisor, pool.windows, *numbers)
