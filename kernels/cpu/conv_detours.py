"""Convolutions that copy their images first, because another arrangement of them is so much faster.

Each is a pass as those of conv_pass.py, around another that does the work.
"""

from math import prod

import numpy as np

from tilewise.kernels.cpu.plane_moves import exchange_images, spread_pixels, turn_planes

# Bytes that copies of x and y may always take.
COPIES = 4 << 20


class PointwiseJoined:
    """An NCHW convolution by 1x1 kernels of images so small that each would leave lanes empty: as one long image.

    49 pixels take 4 vectors of 16 lanes, 8 times 49 take 25. move: the pass for that image.
    """

    __slots__ = ("join", "move", "part", "sizes")

    packing = None
    detour = "the batch's small images are joined to one"

    def __init__(self, n, pixels, weight, move):
        outputs, channels = weight[:2]
        self.sizes = n, channels, outputs, pixels
        self.move = move
        self.join, self.part = (exchange_images.sized(1.0 * n * c * pixels) for c in (channels, outputs))

    def __call__(self, x, weight, y, bias, extra=None, packed=None):
        n, channels, outputs, pixels = self.sizes
        joined_x, joined_y = np.empty(x.size, x.dtype), np.empty(y.size, y.dtype)
        self.join(x.ravel(), n, channels, pixels, joined_x)
        if extra is not None and extra.size:
            self.part(extra, n, outputs, pixels, joined_y)
            extra = joined_y  # added in place
        self.move(joined_x, weight, joined_y, bias, extra)
        self.part(joined_y, outputs, n, pixels, y.ravel())


class PointwiseSpread:
    """A transposed NCHW convolution by 1x1 kernels with a stride: a dense one, whose pixels are then set apart.

    Each phase of the stride as a convolution would write every second pixel of every second row, and every line of y
    goes through the caches twice: once for the zeros between. x, y: shapes. move: the pass to the dense image. For
    gradients: there is neither an extra summand nor a packed weight.
    """

    __slots__ = ("dense", "move", "places", "spread")

    packing = None

    def __init__(self, x, y, stride, move):
        n, channels, *size = y
        self.dense, self.move = (n, channels, *x[2:]), move
        self.places = n * channels, channels, tuple(x[2:]), tuple(size), tuple(stride)
        self.spread = spread_pixels.sized(1.0 * prod(y))

    def __call__(self, x, weight, y, bias, extra=None, packed=None):
        dense = np.empty(self.dense, y.dtype)
        self.move(x, weight, dense, bias)
        self.spread(dense.ravel(), *self.places, bias, y.ravel())


class ThroughNHWC:
    """An NCHW convolution of small images, by way of NHWC.

    In NCHW the vectors run along pixels, and rows of 7 leave a quarter of their lanes empty; in NHWC they run along
    outputs. Turning x and y around costs an element each, which hundreds of products an element outweigh. With rows of
    10 pixels in planes of 14, as LeNet's second layer has them, 16 outputs are enough, but not for one image.
    """

    __slots__ = ("move", "turn_x", "turn_y", "x", "y")

    detour = "x and the result go through NHWC"

    def __init__(self, x, weight, y, prepare):
        self.x, self.y = (x[0], x[1], x[2] * x[3]), (y[0], y[2] * y[3], y[1])
        last = [(s[0], s[2], s[3], s[1]) for s in (x, y)]
        self.move = prepare(last[0], weight, last[1])
        self.turn_x, self.turn_y = (turn_planes.sized(1.0 * prod(s)) for s in (x, y))

    def __call__(self, x, weight, y, bias, extra=None, packed=None):
        x_last, y_last = np.empty(x.size, x.dtype), np.empty(y.size, y.dtype)
        self.turn_x(x.ravel(), *self.x, x_last)
        if extra is not None and extra.size:
            n, pixels, outputs = self.y
            self.turn_y(extra, n, outputs, pixels, y_last)
            extra = y_last  # added in place
        self.move(x_last, weight, y_last, bias, extra, packed)
        self.turn_y(y_last, *self.y, y.ravel())

    @property
    def packing(self):
        return self.move.packing

    def pack(self, weight):
        return self.move.pack(weight)


class PointwiseThroughNCHW:
    """An NHWC convolution by 1x1 kernels of few pixels, by way of NCHW, which reads the weights as they lie.

    NHWC packs them: 4 MB for 1024 channels and outputs, as long as the product itself with 49 pixels (2.2 ms, so 1.3).
    Turning x and y around costs an element as much as packing a weight, and the whole batch becomes one long image.
    move: the pass for that image.
    """

    __slots__ = ("move", "pixels", "sizes", "turn_x", "turn_y")

    packing = None
    detour = "x and the result go through NCHW"

    def __init__(self, pixels, weight, move):
        outputs, channels = weight[:2]
        self.pixels, self.sizes, self.move = pixels, (channels, outputs), move
        self.turn_x, self.turn_y = (turn_planes.sized(1.0 * pixels * c) for c in self.sizes)

    @staticmethod
    def pays(pixels, weight):
        return pixels * (weight[0] + weight[1]) <= weight[0] * weight[1]

    def __call__(self, x, weight, y, bias, extra=None, packed=None):
        channels, outputs = self.sizes
        x_first, y_first = np.empty(x.size, x.dtype), np.empty(y.size, y.dtype)
        self.turn_x(x.ravel(), 1, self.pixels, channels, x_first)
        if extra is not None and extra.size:
            self.turn_y(extra, 1, self.pixels, outputs, y_first)
            extra = y_first  # added in place
        self.move(x_first, weight, y_first, bias, extra)
        self.turn_y(y_first, 1, outputs, self.pixels, y.ravel())


class BatchInParts:
    """A batch in two or three parts, for passes that copy their images: the copies take half of x and y at most.

    prepare(n): the pass for n images.
    """

    __slots__ = ("last", "move", "n", "some")

    def __init__(self, n, some, prepare):
        self.n, self.some = n, some
        self.move = prepare(some)
        self.last = prepare(n % some) if n % some else self.move

    @classmethod
    def where_large(cls, x, y, dtype, prepare):
        """The whole batch at once, unless that takes more than COPIES bytes."""
        n = x[0]
        some = max(n // 2, COPIES // ((prod(x[1:]) + prod(y[1:])) * dtype.itemsize), 1)
        return prepare(n) if some >= n else cls(n, some, prepare)

    def __call__(self, x, weight, y, bias, extra=None, packed=None):
        x, y = x.reshape(self.n, -1), y.reshape(self.n, -1)
        extra = None if extra is None or extra.size == 0 else extra.reshape(self.n, -1)
        for first in range(0, self.n, self.some):
            images = slice(first, min(self.n, first + self.some))
            move = self.move if images.stop - first == self.some else self.last
            more = None if extra is None else extra[images].ravel()
            move(x[images], weight, y[images], bias, more, packed)

    @property
    def detour(self):
        return f"{self.move.detour}, {self.some} image{'s' * (self.some > 1)} at a time"

    @property
    def packing(self):
        return self.move.packing

    def pack(self, weight):
        return self.move.pack(weight)
