"""The kinds of benchmark case: a call of a public function, its FLOPs, its bytes, and operands for it.

FLOPs are counted nominally, 2 for a multiply-add, padded taps included; bytes count each operand and each result once.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import numpy as np

Shape = tuple[int, ...]
Arguments = tuple[tuple, dict[str, Any]]  # the positional and the keyword arguments of the public function


@dataclass(frozen=True)
class Case:
    """One call of a public function. The subclasses add the fields of the shape, and the formulas."""

    op: str  # the public function
    layer: str  # network and layer, as in "resnet50.conv2.3x3"
    batch: int

    family: ClassVar[str]  # the file name of the op family
    rate_unit: ClassVar[str]  # "GFLOP/s" where arithmetic is the limit, "GB/s" where memory is
    draws: ClassVar[bool] = False  # random numbers, which are others in each engine: results cannot be compared

    @property
    def key(self) -> str:
        return f"{self.op} {self.layer}"

    @property
    def is_backward(self) -> bool:
        return self.op.endswith("_backward")

    @property
    def shape(self) -> str:
        """The shape, as the table shows it."""
        raise NotImplementedError

    @property
    def flops(self) -> int:
        return 0

    @property
    def reduction(self) -> int:
        """How many products make one result: rounding errors grow with its root."""
        return 1

    def bytes(self, itemsize: int) -> int:
        raise NotImplementedError

    def arguments(self, rng: np.random.Generator, dtype) -> Arguments:
        """Fresh operands, normally distributed. A call may change them (running statistics)."""
        raise NotImplementedError

    def with_batch(self, batch: int) -> "Case":
        return replace(self, batch=batch)

    def backward(self) -> "Case":
        return replace(self, op=f"{self.op}_backward")


def _normal(rng: np.random.Generator, dtype, *shapes: Shape) -> tuple[np.ndarray, ...]:
    return tuple(rng.standard_normal(shape, dtype=dtype) for shape in shapes)


@dataclass(frozen=True)
class Matmul(Case):
    """(batch, m, k) @ (batch, k, n); 2-D where batch is 1."""

    m: int
    k: int
    n: int

    family = "gemm"
    rate_unit = "GFLOP/s"

    @property
    def _shapes(self) -> tuple[Shape, Shape, Shape]:
        lead = (self.batch,) if self.batch > 1 else ()
        return ((*lead, self.m, self.k), (*lead, self.k, self.n), (*lead, self.m, self.n))

    @property
    def shape(self):
        return " @ ".join("x".join(map(str, shape)) for shape in self._shapes[:2])

    @property
    def flops(self):
        return 2 * self.batch * self.m * self.k * self.n

    @property
    def reduction(self):
        return self.k

    def bytes(self, itemsize):
        return sum(map(prod, self._shapes)) * itemsize

    def arguments(self, rng, dtype):
        return _normal(rng, dtype, *self._shapes[:2]), {}


@dataclass(frozen=True)
class Linear(Case):
    """y = x weight^T + bias, or the three gradients: each of the two products costs as much as the forward pass."""

    inputs: int
    outputs: int

    family = "gemm"
    rate_unit = "GFLOP/s"

    @property
    def _shapes(self) -> dict[str, Shape]:
        b, i, o = self.batch, self.inputs, self.outputs
        return {"x": (b, i), "weight": (o, i), "bias": (o,), "y": (b, o)}

    @property
    def shape(self):
        return f"{self.batch}x{self.inputs} -> {self.outputs}"

    @property
    def flops(self):
        return (4 if self.is_backward else 2) * self.batch * self.inputs * self.outputs

    @property
    def reduction(self):
        return max(self.batch, self.outputs) if self.is_backward else self.inputs

    def bytes(self, itemsize):
        return _forward_or_backward_bytes(self._shapes, self.is_backward, itemsize)

    def arguments(self, rng, dtype):
        names = ("y", "x", "weight") if self.is_backward else ("x", "weight", "bias")
        return _normal(rng, dtype, *(self._shapes[name] for name in names)), {}


def _forward_or_backward_bytes(shapes: dict[str, Shape], is_backward: bool, itemsize: int) -> int:
    """Of a layer with x, weight, bias and y. Backward reads grad (as large as y), x and weight and writes the
    gradients of x, weight and bias."""
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    again = sizes["x"] + sizes["weight"] if is_backward else 0
    return (sum(sizes.values()) + again) * itemsize


@dataclass(frozen=True)
class Conv(Case):
    """A square image, filter, stride and padding; or all three gradients, two products of the forward pass's cost."""

    channels: int
    size: int
    outputs: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1

    family = "conv"
    rate_unit = "GFLOP/s"

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def _shapes(self) -> dict[str, Shape]:
        return {
            "x": (self.batch, self.channels, self.size, self.size),
            "weight": (self.outputs, self.channels // self.groups, self.kernel, self.kernel),
            "bias": (self.outputs,),
            "y": (self.batch, self.outputs, self.out_size, self.out_size),
        }

    @property
    def shape(self):
        text = f"{self.batch}x{self.channels}x{self.size}x{self.size} -> {self.outputs}, {self.kernel}x{self.kernel}"
        text += f" s{self.stride}" if self.stride > 1 else ""
        text += f" p{self.padding}" if self.padding else ""
        return text + (f" g{self.groups}" if self.groups > 1 else "")

    @property
    def flops(self):
        products = self.batch * self.outputs * self.out_size**2 * self.channels // self.groups * self.kernel**2
        return (4 if self.is_backward else 2) * products

    @property
    def reduction(self):
        if self.is_backward:  # grad_weight sums over all output pixels, grad_x over a filter's outputs
            return max(self.batch * self.out_size**2, self.outputs // self.groups * self.kernel**2)
        return self.channels // self.groups * self.kernel**2

    def bytes(self, itemsize):
        return _forward_or_backward_bytes(self._shapes, self.is_backward, itemsize)

    def arguments(self, rng, dtype):
        names = ("y", "x", "weight") if self.is_backward else ("x", "weight", "bias")
        options = {"stride": self.stride, "padding": self.padding, "groups": self.groups}
        return _normal(rng, dtype, *(self._shapes[name] for name in names)), options


@dataclass(frozen=True)
class Pool(Case):
    """Max, average or global average pooling of a square image; kernel is not used by the global one."""

    channels: int
    size: int
    kernel: int = 0
    stride: int = 1
    padding: int = 0
    ceil_mode: bool = False

    family = "pool"
    rate_unit = "GB/s"

    @property
    def is_global(self) -> bool:
        return self.op.startswith("adaptive")

    @property
    def out_size(self) -> int:
        if self.is_global:
            return 1
        span = self.size + 2 * self.padding - self.kernel
        return (-(-span // self.stride) if self.ceil_mode else span // self.stride) + 1

    @property
    def shape(self):
        text = f"{self.batch}x{self.channels}x{self.size}x{self.size}"
        if self.is_global:
            return f"{text} -> 1x1"
        text += f", {self.kernel}x{self.kernel} s{self.stride}" + (f" p{self.padding}" if self.padding else "")
        return text + (" ceil" if self.ceil_mode else "")

    @property
    def reduction(self):
        return self.size**2 if self.is_global else self.kernel**2

    @property
    def _shapes(self) -> tuple[Shape, Shape]:
        lead = (self.batch, self.channels)
        return (*lead, self.size, self.size), (*lead, self.out_size, self.out_size)

    def bytes(self, itemsize):
        x, y = map(prod, self._shapes)
        indices = 8 * y if self.op == "max_pool2d_backward" else 0
        return (x + y) * itemsize + indices

    def arguments(self, rng, dtype):
        options: dict[str, Any] = {"output_size": 1} if self.is_global else self._window()
        x, y = self._shapes
        if not self.is_backward:
            return _normal(rng, dtype, x), options
        if self.is_global:
            options = {}
        options["input_shape"] = x
        if self.op != "max_pool2d_backward":
            return _normal(rng, dtype, y), options
        import tilewise

        (image,) = _normal(rng, dtype, x)
        _, indices = tilewise.max_pool2d(image, **self._window(), return_indices=True)
        return (*_normal(rng, dtype, y), indices), options

    def _window(self) -> dict[str, Any]:
        names = ("kernel", "stride", "padding", "ceil_mode")
        return {"kernel_size" if name == "kernel" else name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class BatchNorm(Case):
    """With the batch's statistics (training) or the running ones."""

    channels: int
    size: int
    training: bool

    family = "batchnorm"
    rate_unit = "GB/s"

    @property
    def shape(self):
        mode = "" if self.is_backward else ", training" if self.training else ", inference"
        return f"{self.batch}x{self.channels}x{self.size}x{self.size}{mode}"

    @property
    def reduction(self):
        return self.batch * self.size**2

    def bytes(self, itemsize):
        image, channel = self.batch * self.channels * self.size**2, self.channels
        # forward: x, y, the running mean and variance, weight and bias
        # backward: grad, x, grad_x, and mean, 1/deviation, weight, grad_weight, grad_bias
        elements = 3 * image + 5 * channel if self.is_backward else 2 * image + 4 * channel
        return elements * itemsize

    def arguments(self, rng, dtype):
        shape, channel = (self.batch, self.channels, self.size, self.size), (self.channels,)
        x, weight, bias = _normal(rng, dtype, shape, channel, channel)
        if self.is_backward:
            mean = x.mean(axis=(0, 2, 3))
            invstd = 1 / np.sqrt(x.var(axis=(0, 2, 3)) + np.asarray(1e-5, dtype))
            return (*_normal(rng, dtype, shape), x, mean, invstd, weight), {}
        return (x, np.zeros(channel, dtype), np.ones(channel, dtype), weight, bias), {"training": self.training}


@dataclass(frozen=True)
class Activation(Case):
    """Elementwise, or along the last axis (softmax)."""

    features: Shape

    family = "activation"
    rate_unit = "GB/s"

    @property
    def shape(self):
        return "x".join(map(str, (self.batch, *self.features)))

    @property
    def reduction(self):
        return self.features[-1] if "softmax" in self.op else 1

    def bytes(self, itemsize):
        return (3 if self.is_backward else 2) * self.batch * prod(self.features) * itemsize

    def arguments(self, rng, dtype):
        arrays = _normal(rng, dtype, *[(self.batch, *self.features)] * (1 + self.is_backward))
        return arrays, ({"axis": -1} if "softmax" in self.op else {})


@dataclass(frozen=True)
class Dropout(Case):
    """Half of the elements, chosen anew from the same seed."""

    features: Shape

    family = "dropout_mask"
    rate_unit = "GB/s"
    draws = True

    @property
    def shape(self):
        return "x".join(map(str, (self.batch, *self.features)))

    def bytes(self, itemsize):
        return 2 * self.batch * prod(self.features) * itemsize

    def arguments(self, rng, dtype):
        return _normal(rng, dtype, (self.batch, *self.features)), {"p": 0.5, "seed": 1}
