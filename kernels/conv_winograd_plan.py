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
_ROOM = 256 << 20  # bytes of the transformed inputs and of their products: more images go one part after the other
# One product instead of four saves 13.5 C M FLOPs a pixel and moves 22 (C + M) bytes more: at the 40 TFLOP/s and 3.5
# TB/s that a large GPU reaches, worth it from here on.
_LEAST_CHANNELS = 24
_LEAST_TILES = 128
_MOST_GROUPS = 65_535  # of a product


class Tiles(NamedTuple):
    """The tiles of an image, and how many images go at once."""

    rows: int
    columns: int
    at_once: int

    @property
    def of_image(self) -> int:
        return self.rows * self.columns

    def parts(self, images: int) -> Iterator[tuple[int, int]]:
        """(the first image, tiles) of each part."""
        for first in range(0, images, self.at_once):
            yield first, min(self.at_once, images - first) * self.of_image


def tiles_of(it: Correlation, itemsize: int) -> Tiles:
    rows, columns = ceil_div(it.rows.count, _TILE), ceil_div(it.columns.count, _TILE)
    bytes_of_image = POINTS * rows * columns * it.groups * (it.channels + it.outputs) * itemsize
    return Tiles(rows, columns, max(1, min(it.images, _ROOM // max(bytes_of_image, 1))))


def why_not(it: Correlation, dtype) -> str | None:
    """Why F(4x4, 3x3) does not apply; None where it does."""
    axes = it.rows, it.columns
    if any(a.taps != 3 or a.stride != 1 or a.spacing != 1 or a.step != 1 for a in axes):
        return "needs a 3x3 kernel with stride and dilation 1"
    if POINTS * it.groups > _MOST_GROUPS:
        return "too many groups for a grid"
    return None if dtype == np.float32 else "float32 only: its error is not small beside the rounding of float64"


def pays(it: Correlation) -> bool:
    """Whether it saves more time in products than it adds in memory."""
    tiles = it.images * ceil_div(it.rows.count, _TILE) * ceil_div(it.columns.count, _TILE)
    many = it.channels * it.outputs >= _LEAST_CHANNELS * (it.channels + it.outputs)
    return many and tiles >= _LEAST_TILES
