"""Windows and bins of pooling on a GPU, for who starts the kernels.

All kernels see (images, H, W, units) with the channels in units of 16 bytes or of an element: NHWC as it lies, NCHW as
N * C images of one channel. A stride of 0 stands for an adaptive pool's bins.
"""

from dataclasses import dataclass

from tilewise.kernels.channel_plan import unit_width


@dataclass(frozen=True, slots=True)
class Pool:
    """Windows over the images of a tensor. width: elements of a unit; units: units of a pixel's channels."""

    images: int
    size: tuple[int, int]
    out: tuple[int, int]
    units: int
    width: int
    kernel: tuple[int, int] = (0, 0)
    stride: tuple[int, int] = (0, 0)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)

    @property
    def windows(self) -> int:
        """Units of the pooled tensor."""
        return self.images * self.out[0] * self.out[1] * self.units

    @property
    def pixels(self) -> int:
        """Units of the tensor that is pooled."""
        return self.images * self.size[0] * self.size[1] * self.units

    @property
    def shape(self) -> tuple[int, ...]:
        """H, W, OH, OW, units: how the kernels take it."""
        return (*self.size, *self.out, self.units)

    @property
    def low(self) -> tuple[int, int]:
        return self.padding[0][0], self.padding[1][0]

    @property
    def high(self) -> tuple[int, int]:
        return self.padding[0][1], self.padding[1][1]

    @property
    def reach(self) -> tuple[int, int]:
        return self.dilation[0] * (self.kernel[0] - 1), self.dilation[1] * (self.kernel[1] - 1)

    def divisor(self, include_pad: bool) -> int:
        """What every window's sum is divided by; 0 where windows differ."""
        result = 1
        axes = (self.size, self.out, self.kernel, self.stride, self.padding)
        for n, count, kernel, stride, (low, high) in zip(*axes, strict=True):
            beyond = (count - 1) * stride - low + kernel > n + high
            if n % count if stride == 0 else beyond or (not include_pad and (low or high)):
                return 0
            result *= kernel if stride else n // count
        return result

    def is_square(self, side: int, stride: int) -> bool:
        """Whether the windows are side x side, `stride` apart, not dilated."""
        return self.kernel == (side, side) and self.stride == (stride, stride) and self.dilation == (1, 1)


def pool_of(shape: tuple[int, ...], out: tuple[int, int], layout: str, dtype, **windows) -> Pool:
    """shape, dtype: of the tensor that is pooled."""
    if layout == "NCHW":
        n, c, h, w = shape
        return Pool(n * c, (h, w), out, 1, 1, **windows)
    n, h, w, c = shape
    width = unit_width(c, dtype)
    return Pool(n, (h, w), out, c // width, width, **windows)


def out_shape(shape: tuple[int, ...], out: tuple[int, int], layout: str) -> tuple[int, ...]:
    return (*shape[:2], *out) if layout == "NCHW" else (shape[0], *out, shape[3])
