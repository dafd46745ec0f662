"""Maxima of windows and bins on the GPU: a thread for each unit of the result.

NaN wins, and of several the last; of equal maxima the first. The common 2 x 2 and 3 x 3 windows over units of 16 bytes
(NHWC) load all their taps at once where none lies outside of the image; pool_columns.py has those of NCHW.
"""

from numba import cuda

from tilewise.kernels.cuda.launch import ELEMENTS, FLOATS, INDICES, INT32, INT64, device, kernel
from tilewise.kernels.cuda.memory import at, comparable, lanes, load_vector, registers, store_vector
from tilewise.kernels.cuda.pool_windows import THREADS, blocks_of, split, window
from tilewise.kernels.pool_plan import Pool

INTEGERS = tuple(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))


@device
def take(best, where, i, raw, k, place):
    """best[i], where[i] = raw[k], place if raw[k] wins."""
    value = comparable(raw[k])
    if value > comparable(best[i]) or value != value:
        best[i] = raw[k]
        where[i] = place


def _make(vector: bool, indexed: bool, side: int):
    name = f"max_pool_{'vectors' if vector else 'elements'}"
    name += f"_{side}x{side}" if side else ""
    taps = max(side * side, 1)
    room = taps * 16

    @kernel(
        threads=THREADS, name=name + ("_with_indices" if indexed else ""),
        dtypes=FLOATS + INTEGERS if indexed and not side else FLOATS, promises=("LDG.128", "STG.128") if vector else (),
    )  # fmt: skip
    def max_pool(
        x: ELEMENTS, y: ELEMENTS, indices: INDICES, windows: INT64,
        height: INT64, width: INT64, rows: INT64, columns: INT64, units: INT64,
        kh: INT32, kw: INT32, sh: INT32, sw: INT32, top: INT32, left: INT32, dh: INT32, dw: INT32, wanted: INT32,
    ):  # fmt: skip
        """wanted: whether there is room for indices; kernels for integers come in this one form."""
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if i < windows:
            count = lanes(x) if vector else 1
            rest, unit = split(i, units)
            rest, column = split(rest, columns)
            image, row = split(rest, rows)
            first_row, end_row = window(row, height, rows, kh, sh, top, dh)
            first_column, end_column = window(column, width, columns, kw, sw, left, dw)
            channels, channel = units * count, unit * count
            origin = image * height * width * channels + channel
            raw, best, where = registers(x, room), registers(x, 16), registers(indices, 16)
            if side and end_row - first_row == side and end_column - first_column == side:
                for t in range(taps):
                    place = (first_row + t // side) * width + first_column + t % side
                    load_vector(at(raw, t * count), x, origin + place * channels)
                for k in range(count):
                    best[k] = raw[k]
                    where[k] = first_row * width + first_column
                for t in range(1, taps):
                    place = (first_row + t // side) * width + first_column + t % side
                    for k in range(count):
                        take(best, where, k, raw, t * count + k, place)
            else:
                place = first_row * width + first_column
                if vector:
                    load_vector(best, x, origin + place * channels)
                else:
                    best[0] = x[origin + place * channels]
                for k in range(count):
                    where[k] = place
                for h in range(first_row, end_row, dh):
                    for w in range(first_column, end_column, dw):
                        place = h * width + w
                        if vector:
                            load_vector(raw, x, origin + place * channels)
                        else:
                            raw[0] = x[origin + place * channels]
                        for k in range(count):
                            take(best, where, k, raw, k, place)
            if vector:
                store_vector(y, i * count, best)
                if indexed and wanted:
                    for k in range(0, count, 2):
                        store_vector(indices, i * count + k, at(where, k))
            else:
                y[i] = best[0]
                if indexed and wanted:
                    indices[i] = where[0]

    return max_pool


_kernels = {
    (vector, indexed, side): _make(vector, indexed, side)
    for vector in (False, True) for indexed in (False, True) for side in ((0, 2, 3) if vector else (0,))
}  # fmt: skip


def run_maximum(pool: Pool, x, y, indices):
    """y, and where indices is not None they: the maxima of the windows over x."""
    wanted, floats = indices is not None, x.dtype.kind == "f"
    run = _kernels[pool.width > 1, wanted or not floats, pool.side if floats else 0]
    numbers = (*pool.shape, *pool.kernel, *pool.stride, *pool.low, *pool.dilation, wanted)
    run(x.place, blocks_of(pool.windows), x, y, indices, pool.windows, *numbers)
