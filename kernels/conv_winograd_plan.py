"""Winograd's F(4x4, 3x3) on a GPU: where it applies, where it pays, and its tiles; the same in every backend.

Source: A. Lavin, S. Gray: Fast algorithms for convolutional neural networks, arXiv:1509.09308.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tilewise.kernels.channel_plan import ceil_div
from tilewise.kernels.conv_geometry import Correlation

POINTS = 36  # products of a tile, and matrices for each group
_TILE = 4  # results along an axis
_ROOM = 256 << 20  # bytes of the transformed inputs and of their products: more tiles go one part after the other
_TOGETHER = 32  # parts are a multiple of these many tiles, so that rows of their matrices are whole vectors
# One product instead of four saves 13.5 C M FLOPs a pixel and moves 22 (C + M) bytes more: at the 40 TFLOP/s and 3.5
# TB/s that a large GPU reaches, worth it from here on.
_LEAST_CHANNELS = 24
_LEAST_TILES = 128


class Tiles(NamedTuple):
    """The tiles of an image, and how many, of all images, go at once."""

    rows: int
    columns: int
    at_once: int

    @property
    def of_image(self) -> int:
        return self.rows * self.columns

    def parts(self, images: int) -> Iterator[tuple[int, int]]:
        """(the first tile, counted through all images; how many) of each part."""
        tiles = images * self.of_image
        for first in range(0, tiles, self.at_once):
            yield first, min(self.at_once, tiles - first)


def tiles_of(it: Correlation, itemsize: int) -> Tiles:
    rows, columns = ceil_div(it.rows.count, _TILE), ceil_div(it.columns.count, _TILE)
    bytes_of_tile = POINTS * it.groups * (it.channels + it.outputs) * itemsize
    at_once = max(1, _ROOM // max(bytes_of_tile, 1) // _TOGETHER) * _TOGETHER
    return Tiles(rows, columns, min(it.images * rows * columns, at_once))


def why_not(it: Correlation, dtype) -> str | None:
    """Why F(4x4, 3x3) does not apply; None where it does."""
    axes = it.rows, it.columns
    if any(a.taps != 3 or a.stride != 1 or a.spacing != 1 or a.step != 1 for a in axes):
        return "needs a 3x3 kernel with stride and dilation 1"
    return None if dtype == np.float32 else "float32 only: its error is not small beside the rounding of float64"


def is_narrow(it: Correlation, channels: int) -> bool:
    """Whether either side has fewer: a product of TF32 is faster then."""
    return min(it.channels, it.outputs) < channels


def pays(it: Correlation) -> bool:
    """Whether it saves more time in products than it adds in memory."""
    tiles = it.images * ceil_div(it.rows.count, _TILE) * ceil_div(it.columns.count, _TILE)
    many = it.channels * it.outputs >= _LEAST_CHANNELS * (it.channels + it.outputs)
    return many and tiles >= _LEAST_TILES
