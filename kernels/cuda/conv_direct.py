"""Convolution by the definition: each thread sums one result. Right for everything, and the yardstick of the others."""

from numba import cuda

from tilewise.kernels.activation_plan import LEAKY_SLOPE
from tilewise.kernels.conv_geometry import Correlation
from tilewise.kernels.cuda.epilogue import activate
from tilewise.kernels.cuda.launch import ELEMENTS, INT32, INT64, REAL, ceil_div, device, kernel
from tilewise.kernels.cuda.memory import narrow, widen, zero

_THREADS = 256


@device
def finished(total, channel, place, bias, has_bias, extra, has_extra, code, slope):
    """activation(total + bias[channel] + extra[place])."""
    if has_bias != 0:
        total += widen(bias[channel])
    if has_extra != 0:
        total += widen(extra[place])
    return activate(total, code, slope)


@kernel(threads=_THREADS)
def direct(
    x: ELEMENTS, weight: ELEMENTS, y: ELEMENTS, bias: ELEMENTS, has_bias: INT32, extra: ELEMENTS, has_extra: INT32,
    code: INT32, slope: REAL,
    h: INT64, row0: INT64, row_step: INT64, oh: INT64, top: INT64, stride_h: INT64, spacing_h: INT64, kh: INT64,
    p0: INT64, p_step: INT64,
    w: INT64, col0: INT64, col_step: INT64, ow: INT64, left: INT64, stride_w: INT64, spacing_w: INT64, kw: INT64,
    q0: INT64, q_step: INT64,
    xn: INT64, xc: INT64, xh: INT64, xw: INT64, yn: INT64, yc: INT64, yh: INT64, yw: INT64,
    size: INT64, all_outputs: INT64, outputs: INT64, channels: INT64,
    group_step: INT64, output_step: INT64, channel_step: INT64, width: INT64, channels_last: INT32,
):  # fmt: skip
    """y of a Correlation (conv_geometry.py); threads run along the columns, or the channels where they are last."""
    number = cuda.blockIdx.x * _THREADS + cuda.threadIdx.x
    if number >= size:
        return
    if channels_last != 0:
        o, number = number % all_outputs, number // all_outputs
        j, number = number % ow, number // ow
        i, n = number % oh, number // oh
    else:
        j, number = number % ow, number // ow
        i, number = number % oh, number // oh
        o, n = number % all_outputs, number // all_outputs
    group = o // outputs
    weights = group * group_step + (o - group * outputs) * output_step
    image = n * xn + group * channels * xc
    total = zero(y)
    for t in range(kh):
        row = top + i * stride_h + t * spacing_h
        for u in range(kw):
            column = left + j * stride_w + u * spacing_w
            source = image + row * xh + column * xw
            tap = weights + (p0 + t * p_step) * width + q0 + u * q_step
            inside = row >= 0 and row < h and column >= 0 and column < w
            for c in range(channels):
                value = widen(x[source + c * xc]) if inside else zero(y)
                total += value * widen(weight[tap + c * channel_step])
    place = n * yn + o * yc + (row0 + i * row_step) * yh + (col0 + j * col_step) * yw
    y[place] = narrow(finished(total, o, place, bias, has_bias, extra, has_extra, code, slope), y)


def epilogue_arguments(bias, extra, code: int) -> tuple:
    """What every kernel with an epilogue takes for it."""
    return bias, int(bias is not None), extra, int(extra is not None), code, LEAKY_SLOPE


def correlate(it: Correlation, x, weight, y, bias, extra, code: int):
    """y = activation(the correlation + bias + extra); bias and extra may be None."""
    direct(
        x.place, ceil_div(it.size, _THREADS), x, weight, y, *epilogue_arguments(bias, extra, code), *it.rows.numbers,
        *it.columns.numbers, *it.steps, it.size, it.groups * it.outputs, it.outputs, it.channels, it.group_step,
        it.output_step, it.channel_step, it.width, int(it.channels_last),
    )  # fmt: skip
