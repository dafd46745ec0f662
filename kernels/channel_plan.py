"""Who takes which part of an image tensor on a GPU where every channel has numbers of its own (batch normalisation).

NCHW: a channel is N planes, each in one piece; in *units* of 16 bytes where planes are made of whole ones, else of an
element. NHWC: a pixel is a row of channels, in the same units; a thread keeps to one unit of channels, so that what
belongs to them stays in its registers, and walks down the pixels.
"""

from dataclasses import dataclass

THREADS = 256
EACH = 4  # units a thread takes at least before another block shall help it
BLOCKS = 2048  # about as many blocks of sums as keep the largest device busy for two rounds


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def unit_width(run: int, dtype) -> int:
    """Elements of a unit, where runs of `run` elements must be whole units: a vector of 16 bytes, or one element."""
    width = 16 // dtype.itemsize
    return width if run % width == 0 else 1


@dataclass(frozen=True, slots=True)
class Planes:
    """NCHW: `images` planes of `plane` elements for each of `channels` channels."""

    images: int
    channels: int
    plane: int
    width: int

    @property
    def units(self) -> int:
        return self.plane // self.width

    def parts(self) -> int:
        """Blocks that share the sums of a channel. Fixed by the shape: sums have the same bits on every device."""
        work = ceil_div(self.images * self.units, THREADS * EACH)
        return max(1, min(work, ceil_div(BLOCKS, self.channels)))

    def groups(self) -> tuple[int, int, int]:
        """(blocks, threads for each plane: a power of two from 32 to THREADS, blocks for each plane)."""
        group = 32
        while group < THREADS and group * EACH < self.units:
            group *= 2
        chunks = max(1, ceil_div(self.units, THREADS * EACH))
        planes = self.images * self.channels
        return ceil_div(planes, THREADS // group) * chunks, group, chunks


@dataclass(frozen=True, slots=True)
class Rows:
    """NHWC: `pixels` rows of `channels` elements."""

    pixels: int
    channels: int
    width: int

    @property
    def units(self) -> int:
        return self.channels // self.width

    @property
    def span(self) -> int:
        """Units of a row that a block takes."""
        return min(self.units, THREADS)

    @property
    def rows(self) -> int:
        """Rows that a block takes at a time."""
        return THREADS // self.span

    @property
    def tiles(self) -> int:
        return ceil_div(self.units, self.span)

    def parts(self, each: int = 4 * EACH) -> int:
        """Blocks that share the rows: fixed by the shape, as for planes."""
        work = ceil_div(self.pixels, self.rows * each)
        return max(1, min(work, ceil_div(BLOCKS, self.tiles)))


def planes_or_rows(shape: tuple[int, ...], layout: str, dtype) -> Planes | Rows:
    if layout == "NCHW":
        n, c, h, w = shape
        return Planes(n, c, h * w, unit_width(h * w, dtype))
    n, h, w, c = shape
    return Rows(n * h * w, c, unit_width(c, dtype))
