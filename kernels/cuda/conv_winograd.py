"""3x3 convolution of stride 1 in float32 by Winograd's F(4x4, 3x3): 16 outputs of a tile from 36 products, not 144.

    V[xi, c, tile] = B^T d B     of the 6 x 6 pixels d around a tile of 4 x 4 results        (winograd_input)
    U[xi, c, o]    = G g G^T     of the 3 x 3 weights g                                      (winograd_weight)
    M[xi, o, tile] = sum over c of U V: 36 matrix products, which conv_product.py computes as a convolution by 1x1
                     kernels of 36 groups
    y              = A^T m A, then bias, summand and activation                              (winograd_output)

V and M lie in memory in the layout of x and y: tiles, or channels where they are last, are side by side, and so are
threads. The transforms are bound by memory; each tile's numbers are read and written once.

Error: the transforms add numbers of different size, so single results may be off by 1e-5 of the largest; the relative
2-norm is about 1e-6 (direct: 2e-7). A NaN or Inf spreads over its tile, so the thread that ends up with one computes
its tile again by the definition.

Source: A. Lavin, S. Gray: Fast algorithms for convolutional neural networks, arXiv:1509.09308.
"""

from dataclasses import replace

from numba import cuda

from tilewise.kernels import conv_winograd_plan
from tilewise.kernels.conv_geometry import Axis, Correlation
from tilewise.kernels.conv_plan import MOST_BLOCKS, made_of
from tilewise.kernels.conv_winograd_plan import POINTS, tiles_of
from tilewise.kernels.cuda import conv_product
from tilewise.kernels.cuda.conv_direct import epilogue_arguments, finished
from tilewise.kernels.cuda.conv_product import pick
from tilewise.kernels.cuda.launch import ELEMENTS, INT32, INT64, REAL, ceil_div, device, kernel
from tilewise.kernels.cuda.memory import register_sums, zero

_THREADS = 128


@device
def _forth(v, first, step):
    """B^T times six numbers, in place."""
    x0, x1, x2 = v[first], v[first + step], v[first + 2 * step]
    x3, x4, x5 = v[first + 3 * step], v[first + 4 * step], v[first + 5 * step]
    two, four, five = type(x0)(2), type(x0)(4), type(x0)(5)
    v[first] = four * x0 - five * x2 + x4
    v[first + step] = (x3 + x4) - four * (x1 + x2)
    v[first + 2 * step] = (x4 - x3) + four * (x1 - x2)
    v[first + 3 * step] = (x4 - x2) + two * (x3 - x1)
    v[first + 4 * step] = (x4 - x2) - two * (x3 - x1)
    v[first + 5 * step] = four * x1 - five * x3 + x5


@device
def _spread(target, to, to_step, g0, g1, g2):
    """G times three numbers."""
    sixth, half, quarter = type(g0)(1.0 / 6.0), type(g0)(0.5), type(g0)(0.25)
    even, odd = quarter * g0 + g2, half * g1
    target[to] = quarter * g0
    target[to + to_step] = -sixth * (g0 + g1 + g2)
    target[to + 2 * to_step] = -sixth * (g0 - g1 + g2)
    target[to + 3 * to_step] = sixth * (even + odd)
    target[to + 4 * to_step] = sixth * (even - odd)
    target[to + 5 * to_step] = g2


@device
def _back(v, first, step):
    """A^T times six numbers; four are left, in the first places."""
    m0, m5 = v[first], v[first + 5 * step]
    two, four, eight = type(m0)(2), type(m0)(4), type(m0)(8)
    s, d = v[first + step] + v[first + 2 * step], v[first + step] - v[first + 2 * step]
    t, e = v[first + 3 * step] + v[first + 4 * step], v[first + 3 * step] - v[first + 4 * step]
    v[first] = m0 + s + t
    v[first + step] = d + two * e
    v[first + 2 * step] = s + four * t
    v[first + 3 * step] = d + eight * e + m5


@kernel(threads=_THREADS, dtypes=("float32",))
def winograd_weight(
    weight: ELEMENTS, packed: ELEMENTS, size: INT64, padded_depth: INT64, channels: INT64, outputs: INT64,
    padded_outputs: INT64, group_step: INT64, output_step: INT64, channel_step: INT64, width: INT64, p0: INT64,
    p_step: INT64, q0: INT64, q_step: INT64,
):  # fmt: skip
    """packed[g, xi, c, o] = U, with zeros beyond the channels and the outputs."""
    number = cuda.blockIdx.x * _THREADS + cuda.threadIdx.x
    if number >= size:
        return
    o, rest = number % padded_outputs, number // padded_outputs
    c, group = rest % padded_depth, rest // padded_depth
    taps, half, whole = register_sums(weight, 9), register_sums(weight, 18), register_sums(weight, 36)
    source = group * group_step + o * output_step + c * channel_step
    for t in range(3):
        for u in range(3):
            inside = c < channels and o < outputs
            taps[t * 3 + u] = weight[source + (p0 + t * p_step) * width + q0 + u * q_step] if inside else zero(weight)
    for u in range(3):
        _spread(half, u, 3, taps[u], taps[3 + u], taps[6 + u])
    for i in range(6):
        _spread(whole, i * 6, 1, half[i * 3], half[i * 3 + 1], half[i * 3 + 2])
    plane = padded_depth * padded_outputs
    target = (group * 36 * padded_depth + c) * padded_outputs + o
    for xi in range(36):
        packed[target + xi * plane] = whole[xi]


@kernel(threads=_THREADS, dtypes=("float32",))
def winograd_input(
    x: ELEMENTS, values: ELEMENTS, size: INT64, first: INT64, tiles: INT64, tile_rows: INT64,
    tile_columns: INT64, h: INT64, w: INT64, top: INT64, left: INT64, all_channels: INT64, channels: INT64,
    xn: INT64, xc: INT64, xh: INT64, xw: INT64, tile_step: INT64, channel_step: INT64, channels_last: INT32,
):  # fmt: skip
    """V of one tile and channel a thread; tiles are counted through all images, from `first` on."""
    number = cuda.blockIdx.x * _THREADS + cuda.threadIdx.x
    if number >= size:
        return
    if channels_last != 0:
        c, tile = number % all_channels, number // all_channels
    else:
        tile, c = number % tiles, number // tiles
    column, rest = (first + tile) % tile_columns, (first + tile) // tile_columns
    row, n = rest % tile_rows, rest // tile_rows
    v = register_sums(x, 36)
    source = n * xn + c * xc
    for i in range(6):
        r = row * 4 + i + top
        for j in range(6):
            s = column * 4 + j + left
            inside = r >= 0 and r < h and s >= 0 and s < w
            v[i * 6 + j] = x[source + r * xh + s * xw] if inside else zero(x)
    for i in range(6):
        _forth(v, i * 6, 1)
    for j in range(6):
        _forth(v, j, 6)
    group = c // channels
    target = tile * tile_step + (group * 36 * channels + c - group * channels) * channel_step
    for xi in range(36):
        values[target + xi * channels * channel_step] = v[xi]


@kernel(threads=_THREADS, dtypes=("float32",))
def winograd_output(
    products: ELEMENTS, y: ELEMENTS, x: ELEMENTS, weight: ELEMENTS, bias: ELEMENTS, has_bias: INT32, extra: ELEMENTS,
    has_extra: INT32, code: INT32, slope: REAL, size: INT64, first: INT64, tiles: INT64, tile_rows: INT64,
    tile_columns: INT64, oh: INT64, ow: INT64, h: INT64, w: INT64, top: INT64, left: INT64, all_outputs: INT64,
    outputs: INT64, channels: INT64, xn: INT64, xc: INT64, xh: INT64, xw: INT64, yn: INT64, yc: INT64, yh: INT64,
    yw: INT64, tile_step: INT64, output_place: INT64, group_step: INT64, output_step: INT64, channel_step: INT64,
    width: INT64, p0: INT64, p_step: INT64, q0: INT64, q_step: INT64, channels_last: INT32,
):  # fmt: skip
    """The 4 x 4 results of one tile and output a thread."""
    number = cuda.blockIdx.x * _THREADS + cuda.threadIdx.x
    if number >= size:
        return
    if channels_last != 0:
        o, tile = number % all_outputs, number // all_outputs
    else:
        tile, o = number % tiles, number // tiles
    column, rest = (first + tile) % tile_columns * 4, (first + tile) // tile_columns
    row, n = rest % tile_rows * 4, rest // tile_rows
    group = o // outputs
    v = register_sums(y, 36)
    source = tile * tile_step + (group * 36 * outputs + o - group * outputs) * output_place
    for xi in range(36):
        v[xi] = products[source + xi * outputs * output_place]
    for i in range(6):
        _back(v, i * 6, 1)
    for j in range(4):
        _back(v, j, 6)
    results, check = register_sums(y, 16), zero(y)
    for i in range(4):
        for j in range(4):
            results[i * 4 + j] = v[i * 6 + j]
            check += v[i * 6 + j] * zero(y)
    for k in range(16):  # as a loop, or the epilogue would be there sixteen times
        i, j = row + k // 4, column + k % 4
        if i < oh and j < ow:
            place, total = n * yn + o * yc + i * yh + j * yw, pick(results, 1, 16, k)
            y[place] = finished(total, o, place, bias, has_bias, extra, has_extra, code, slope)
    if check == check:
        return
    # a NaN or an Inf, maybe of a neighbour in the tile: by the definition
    weights = group * group_step + (o - group * outputs) * output_step
    for k in range(16):
        i, j = row + k // 4, column + k % 4
        if i < oh and j < ow:
            total = zero(y)
            for t in range(3):
                for u in range(3):
                    r, s = i + t + top, j + u + left
                    inside = r >= 0 and r < h and s >= 0 and s < w
                    at_x = n * xn + group * channels * xc + r * xh + s * xw
                    at_weight = weights + (p0 + t * p_step) * width + q0 + u * q_step
                    for c in range(channels):
                        value = x[at_x + c * xc] if inside else zero(x)
                        total += value * weight[at_weight + c * channel_step]
            place = n * yn + o * yc + i * yh + j * yw
            y[place] = finished(total, o, place, bias, has_bias, extra, has_extra, code, slope)


def tf32_is_faster(it: Correlation) -> bool:
    """By an H100, benchmarks/results/gpu: of 256 channels, and not of 512."""
    return conv_winograd_plan.is_narrow(it, 512)


def why_not(it: Correlation, dtype) -> str | None:
    """conv_winograd_plan.why_not; and a grid must have room for all products."""
    too_many = "too many groups for a grid" if POINTS * it.groups > MOST_BLOCKS else None
    return conv_winograd_plan.why_not(it, dtype) or too_many


def _products(it: Correlation, tiles: int) -> Correlation:
    """The 36 products, as a convolution by 1x1 kernels of 36 groups for each of its own."""
    one = Axis(1, 0, 1, 1, 0, 1, 1, 1, 0, 1)
    along = replace(one, size=tiles, count=tiles)
    inputs, results = POINTS * it.groups * it.channels, POINTS * it.groups * it.outputs
    shapes = ((1, 1, tiles, n) if it.channels_last else (1, n, 1, tiles) for n in (inputs, results))
    shape_x, shape_y = shapes
    return replace(it, rows=one, columns=along, shape_x=shape_x, shape_y=shape_y, groups=POINTS * it.groups)


def correlate(it: Correlation, x, weight, y, bias, extra, code: int):
    """y = activation(the correlation + bias + extra); bias and extra may be None."""
    place, rows, columns = x.place, it.rows, it.columns
    tiling = tiles_of(it, x.dtype.itemsize)
    most, tile_counts = tiling.at_once, (tiling.rows, tiling.columns)
    all_channels, all_outputs = it.groups * it.channels, it.groups * it.outputs
    product_tile = conv_product.choose_tile(_products(it, most), x.dtype)
    padded_outputs = ceil_div(it.outputs, product_tile.rows) * product_tile.rows
    padded_depth = ceil_div(it.channels, product_tile.depth) * product_tile.depth
    taps = rows.first_tap, rows.tap_step, columns.first_tap, columns.tap_step
    weight_steps = it.group_step, it.output_step, it.channel_step, it.width
    size = it.groups * padded_depth * padded_outputs

    def write(packed):
        winograd_weight(
            place, ceil_div(size, _THREADS), weight, packed, size, padded_depth, it.channels, it.outputs,
            padded_outputs, *weight_steps, *taps,
        )  # fmt: skip

    packed = made_of(weight, "winograd", (it.groups * POINTS, padded_depth, padded_outputs), x.dtype, write)
    values = place.empty((POINTS * most * all_channels,), x.dtype)
    products = place.empty((POINTS * most * all_outputs,), x.dtype)
    for first, tiles in tiling.parts(it.images):
        input_steps = (POINTS * all_channels, 1) if it.channels_last else (1, tiles)
        output_steps = (POINTS * all_outputs, 1) if it.channels_last else (1, tiles)
        last = int(it.channels_last)
        window = rows.size, columns.size, rows.origin, columns.origin
        winograd_input(
            place, ceil_div(tiles * all_channels, _THREADS), x, values, tiles * all_channels, first, tiles,
            *tile_counts, *window, all_channels, it.channels, *it.steps[:4], *input_steps, last,
        )  # fmt: skip
        conv_product.multiply_packed(
            _products(it, tiles), values, packed, products, product_tile, padded_depth // product_tile.depth,
            padded_outputs,
        )  # fmt: skip
        winograd_output(
            place, ceil_div(tiles * all_outputs, _THREADS), products, y, x, weight,
            *epilogue_arguments(bias, extra, code), tiles * all_outputs, first, tiles, *tile_counts,
            rows.count, columns.count, *window, all_outputs, it.outputs, it.channels, *it.steps, *output_steps,
            *weight_steps, *taps, last,
        )  # fmt: skip
