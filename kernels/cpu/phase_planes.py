"""Rows of x copied into planes, every stride-th pixel of every stride-th row, with the padding as zeros (conv_nchw.py).

How a plane is filled follows from four numbers in `phases`: the first row (of block row 0), the leading zeros, the
columns inside x, and the first of them.
"""

from tilewise.kernels.cpu.emitted import emitted
from tilewise.kernels.cpu.row_moves import clear_row, copy_lines, copy_row, gather_row
from tilewise.kernels.cpu.simd import address, lanes


@emitted
def _copy_plane_row(x, base, h, w, row, stride_w, phases, phase, pitch, planes, target):
    left, count = phases[phase + 1], phases[phase + 2]
    if row < 0 or row >= h or count == 0:
        clear_row(address(planes, target), pitch)
        return
    source = address(x, base + row * w + phases[phase + 3])
    if left > 0:
        clear_row(address(planes, target), left)
    if stride_w > 2 or base + row * w + phases[phase + 3] + (count + lanes(x)) * stride_w > x.size:
        gather_row(address(planes, target + left), source, count, stride_w)
    elif stride_w == 1:
        copy_row(1, address(planes, target + left), source, count)
    else:
        copy_row(2, address(planes, target + left), source, count)
    if left + count < pitch:
        clear_row(address(planes, target + left + count), pitch - left - count)


@emitted
def copy_plane(x, base, h, w, row, rows, stride_h, stride_w, phases, phase, pitch, planes, target):
    """The rows row, row + stride_h, ... of x into one plane; those inside x, clear of its end, in one call."""
    left, count = phases[phase + 1], phases[phase + 2]
    first, end = 0, rows
    if stride_w > 2 or count == 0 or left > lanes(x) or pitch - left - count > lanes(x):
        end = 0
    while end > 0 and row + first * stride_h < 0:
        first += 1
        end = 0 if first == end else end
    # what the last vectors of a row read must lie in x
    behind = base + phases[phase + 3] + (count + lanes(x)) * stride_w
    while end > first and (row + (end - 1) * stride_h >= h or behind + (row + (end - 1) * stride_h) * w > x.size):
        end -= 1
    end = max(first, end)
    for i in range(first):
        _copy_plane_row(x, base, h, w, row + i * stride_h, stride_w, phases, phase, pitch, planes, target + i * pitch)
    if end > first:
        to = address(planes, target + first * pitch)
        source = address(x, base + (row + first * stride_h) * w + phases[phase + 3])
        if stride_w == 1:
            copy_lines(1, to, pitch, left, source, stride_h * w, count, end - first)
        else:
            copy_lines(2, to, pitch, left, source, stride_h * w, count, end - first)
    for i in range(end, rows):
        _copy_plane_row(x, base, h, w, row + i * stride_h, stride_w, phases, phase, pitch, planes, target + i * pitch)


@emitted
def copy_planes(x, base, image_step, images, channels, row0, rows, geometry, phases, planes):
    """planes[(c * phases + phase) * plane + (image * rows + i) * pitch + j]; `rows` with those that taps add."""
    h, w, stride_h, stride_w = geometry[3], geometry[4], geometry[8], geometry[9]
    n_phases, pitch, plane = geometry[11], geometry[13], geometry[18]
    shared = geometry[27]
    for c in range(channels):
        for phase in range(n_phases):
            row = row0 * stride_h + phases[4 * phase]
            # in the order of their places, for each runs over into the next
            for image in range(images):
                copy_plane(
                    x, base + image * image_step + c * h * w, h, w, row, rows, stride_h, stride_w, phases, 4 * phase,
                    pitch, planes, (c * n_phases + phase) * plane + image * rows * pitch,
                )  # fmt: skip
            if shared > 0:  # the last row's padding; no next row brings it
                clear_row(address(planes, (c * n_phases + phase) * plane + images * rows * pitch), shared)
