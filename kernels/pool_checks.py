"""What the pooling functions accept, and their calls in normal form: windows, bins, indices, shapes."""

from functools import partial
from math import prod

import numpy as np

from tilewise.kernels import shapes
from tilewise.kernels.arrays import FLOATS, common_dtype, required
from tilewise.kernels.operation import Problem

INTEGERS = tuple(np.dtype(kind + size) for kind in "iu" for size in "1248")
ORDERED = FLOATS + INTEGERS  # what a maximum is defined for
INDEX = np.dtype(np.int64)


def flag(function: str, name: str, value) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{function}: {name} must be True or False, got {value!r}")
    return bool(value)


def image(function: str, name: str, array, layout: str) -> tuple[int, int, int, int]:
    """(N, C, H, W) of an operand that must be there and have channels."""
    required(function, **{name: array})
    return _with_channels(function, name, array.shape, layout)


def _with_channels(function: str, name: str, shape: tuple[int, ...], layout: str) -> tuple[int, int, int, int]:
    n, c, h, w = shapes.image_shape(function, name, shape, layout)
    if c == 0:
        raise ValueError(f"{function}: {name} must have at least 1 channel, got shape {shape}")
    return n, c, h, w


def source_shape(function: str, value, grad, layout: str) -> tuple[int, int, int, int]:
    """(N, C, H, W) of `input_shape`, the shape of the forward's x, which has as many axes as grad."""
    if not hasattr(value, "__iter__") or isinstance(value, str):
        raise TypeError(f"{function}: input_shape must be x's shape, a tuple of ints, got {value!r}")
    shape = tuple(shapes.integer(function, "input_shape", side, 0) for side in value)
    size = _with_channels(function, "input_shape", shape, layout)
    if len(shape) != grad.ndim:
        raise ValueError(
            f"{function}: input_shape {shape} and grad {grad.shape} must both have a batch axis, or neither"
        )
    return size


def expect_shape(function: str, name: str, array, n: int, c: int, out: shapes.Pair, layout: str, of: str):
    """The array must have the batched or unbatched shape of an (n, c, *out) image."""
    expected = shapes.layout_shape(n, c, *out, layout)[4 - array.ndim :]
    if array.shape != expected:
        raise ValueError(f"{function}: {name} must have shape {expected} for {of}, got {array.shape}")


def expect_indices(function: str, indices, shape: tuple[int, ...], of: str):
    """`indices` must be int64 and as large as the operand it belongs to; its values are checked where they are used."""
    required(function, indices=indices)
    if indices.dtype != INDEX:
        raise TypeError(f"{function}: indices must be int64, got {indices.dtype}")
    if indices.shape != shape:
        raise ValueError(f"{function}: indices must have {of}'s shape {shape}, got {indices.shape}")


def windows(function: str, size: shapes.Pair, kernel_size, stride, padding, dilation, ceil_mode):
    """The windows over an (H, W) image: (their options in normal form, how many there are along each axis)."""
    kernel = shapes.pair(function, "kernel_size", kernel_size)
    stride = kernel if stride is None else shapes.pair(function, "stride", stride)
    dilation = shapes.pair(function, "dilation", dilation)
    ceil_mode = flag(function, "ceil_mode", ceil_mode)
    sides = shapes.padding_pairs(function, padding, size, kernel, stride, dilation)
    height = _count(function, "height", size[0], kernel[0], stride[0], sides[0], dilation[0], ceil_mode)
    width = _count(function, "width", size[1], kernel[1], stride[1], sides[1], dilation[1], ceil_mode)
    options = {
        "kernel_size": kernel,
        "stride": stride,
        "padding": sides,
        "dilation": dilation,
        "ceil_mode": ceil_mode,
    }
    return options, (height, width)


def _count(function, axis, n, kernel, stride, padding: shapes.Pair, dilation, ceil_mode) -> int:
    """How many windows there are along an axis; raises if there is none, or one that holds nothing but padding."""
    low, high = padding
    count = shapes.output_size(n, kernel, stride, padding, dilation, ceil_mode)
    if count < 1:
        raise ValueError(
            f"{function}: a window of {dilation * (kernel - 1) + 1} (kernel_size {kernel}, dilation {dilation}) does "
            f"not fit into the padded {axis} of {n + low + high} ({n}, padding {low} and {high})"
        )
    before = [o * stride - low for o in range(min(count, -(-low // stride)))]  # windows that start in the padding
    for start in before:
        first = -(start // dilation)  # the first tap that is not before the input
        if first >= kernel or start + first * dilation >= n:
            _raise_no_input(function, axis, start, n, padding)
    if (count - 1) * stride - low >= n:
        _raise_no_input(function, axis, (count - 1) * stride - low, n, padding)
    return count


def _raise_no_input(function, axis, start, n, padding):
    raise ValueError(
        f"{function}: the window that starts at {start} along the {axis} finds no input, only padding "
        f"({axis} {n}, padding {padding[0]} and {padding[1]})"
    )


def bins(function: str, size: shapes.Pair, output_size) -> shapes.Pair:
    """An adaptive pool's output_size as a pair; None is the input's size. An axis without pixels has no bins."""
    if output_size is None:
        output_size = size
    elif isinstance(output_size, (tuple, list)) and len(output_size) == 2:
        output_size = tuple(n if side is None else side for n, side in zip(size, output_size, strict=True))
    if 0 in size:
        raise ValueError(f"{function}: the image must have at least 1 pixel, got height {size[0]}, width {size[1]}")
    return shapes.pair(function, "output_size", output_size)


def expect_inside(function: str, plane: tuple[int, int], _, indices):
    """ValueError for an index that is not in its (H, W) plane."""
    h, w = plane
    if indices.size and (indices.min() < 0 or indices.max() >= h * w):
        raise shapes.outside_plane(function, indices, plane)


def forward_problem(x, n: int, c: int, out: shapes.Pair, taps: int, options: dict, indices: bool = False) -> Problem:
    """A forward's Problem: each element is read once, each result written once, one operation for each tap."""
    results = n * c * prod(out)
    moved = (x.size + results) * x.dtype.itemsize + (results * INDEX.itemsize if indices else 0)
    unbatched = (0,) if x.ndim == 3 else ()
    return Problem(options, flops=results * taps, bytes=moved, unbatched=unbatched, unbatched_results=(0, 1))


def backward_problem(grad, shape: tuple[int, ...], flops: int, options: dict, indices: bool = False) -> Problem:
    """A backward's Problem, where the result has (batched) shape `shape`."""
    moved = (grad.size + prod(shape)) * grad.dtype.itemsize + (grad.size * INDEX.itemsize if indices else 0)
    unbatched = () if grad.ndim == 4 else (0, 1) if indices else (0,)
    return Problem(options, flops=flops, bytes=moved, unbatched=unbatched)


def max_pool(x, kernel_size, stride, padding, dilation, ceil_mode, return_indices, layout) -> Problem:
    n, c, h, w = image("max_pool2d", "x", x, layout)
    common_dtype("max_pool2d", {"x": x}, ORDERED)
    options, out = windows("max_pool2d", (h, w), kernel_size, stride, padding, dilation, ceil_mode)
    options["return_indices"] = flag("max_pool2d", "return_indices", return_indices)
    options["layout"] = layout
    return forward_problem(x, n, c, out, prod(options["kernel_size"]), options, options["return_indices"])


def max_pool_backward(grad, indices, input_shape, kernel_size, stride, padding, dilation, ceil_mode, layout) -> Problem:
    function = "max_pool2d_backward"
    image(function, "grad", grad, layout)
    common_dtype(function, {"grad": grad})
    n, c, h, w = source_shape(function, input_shape, grad, layout)
    options, out = windows(function, (h, w), kernel_size, stride, padding, dilation, ceil_mode)
    expect_shape(function, "grad", grad, n, c, out, layout, f"input_shape {tuple(input_shape)}")
    expect_indices(function, indices, grad.shape, "grad")
    options["input_shape"] = shapes.layout_shape(n, c, h, w, layout)
    options["layout"] = layout
    problem = backward_problem(grad, options["input_shape"], grad.size, options, indices=True)
    problem.values = partial(expect_inside, function, (h, w))
    return problem


def _avg_options(function, size, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override):
    options, out = windows(function, size, kernel_size, stride, padding, 1, ceil_mode)
    del options["dilation"]
    options["count_include_pad"] = flag(function, "count_include_pad", count_include_pad)
    if divisor_override is not None:
        divisor_override = shapes.integer(function, "divisor_override", divisor_override)
    options["divisor_override"] = divisor_override
    return options, out


def avg_pool(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, layout) -> Problem:
    n, c, h, w = image("avg_pool2d", "x", x, layout)
    common_dtype("avg_pool2d", {"x": x})
    options, out = _avg_options(
        "avg_pool2d", (h, w), kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )
    options["layout"] = layout
    return forward_problem(x, n, c, out, prod(options["kernel_size"]), options)


def avg_pool_backward(
    grad, input_shape, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, layout
) -> Problem:
    function = "avg_pool2d_backward"
    image(function, "grad", grad, layout)
    common_dtype(function, {"grad": grad})
    n, c, h, w = source_shape(function, input_shape, grad, layout)
    options, out = _avg_options(
        function, (h, w), kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )
    expect_shape(function, "grad", grad, n, c, out, layout, f"input_shape {tuple(input_shape)}")
    options["input_shape"] = shapes.layout_shape(n, c, h, w, layout)
    options["layout"] = layout
    return backward_problem(grad, options["input_shape"], grad.size * prod(options["kernel_size"]), options)


def adaptive_avg_pool(x, output_size, layout) -> Problem:
    n, c, h, w = image("adaptive_avg_pool2d", "x", x, layout)
    common_dtype("adaptive_avg_pool2d", {"x": x})
    out = bins("adaptive_avg_pool2d", (h, w), output_size)
    return forward_problem(x, n, c, out, _bin_taps((h, w), out), {"output_size": out, "layout": layout})


def adaptive_max_pool(x, output_size, return_indices, layout) -> Problem:
    function = "adaptive_max_pool2d"
    n, c, h, w = image(function, "x", x, layout)
    common_dtype(function, {"x": x}, ORDERED)
    out = bins(function, (h, w), output_size)
    return_indices = flag(function, "return_indices", return_indices)
    options = {"output_size": out, "return_indices": return_indices, "layout": layout}
    return forward_problem(x, n, c, out, _bin_taps((h, w), out), options, return_indices)


def _bin_taps(size: shapes.Pair, out: shapes.Pair) -> int:
    """The nominal size of a bin, its overlap with its neighbours left out."""
    return -(-size[0] // out[0]) * -(-size[1] // out[1])


def adaptive_avg_pool_backward(grad, input_shape, layout) -> Problem:
    function = "adaptive_avg_pool2d_backward"
    options, flops = _adaptive_backward(function, grad, input_shape, layout)
    return backward_problem(grad, options["input_shape"], flops, options)


def adaptive_max_pool_backward(grad, indices, input_shape, layout) -> Problem:
    function = "adaptive_max_pool2d_backward"
    options, _ = _adaptive_backward(function, grad, input_shape, layout)
    expect_indices(function, indices, grad.shape, "grad")
    problem = backward_problem(grad, options["input_shape"], grad.size, options, indices=True)
    _, _, h, w = source_shape(function, input_shape, grad, layout)
    problem.values = partial(expect_inside, function, (h, w))
    return problem


def _adaptive_backward(function, grad, input_shape, layout) -> tuple[dict, int]:
    _, _, *out = image(function, "grad", grad, layout)
    common_dtype(function, {"grad": grad})
    n, c, h, w = source_shape(function, input_shape, grad, layout)
    bins(function, (h, w), tuple(out))
    expect_shape(function, "grad", grad, n, c, (out[0], out[1]), layout, f"input_shape {tuple(input_shape)}")
    shape = shapes.layout_shape(n, c, h, w, layout)
    return {"input_shape": shape, "layout": layout}, grad.size * _bin_taps((h, w), (out[0], out[1]))


def max_unpool(x, indices, kernel_size, stride, padding, output_size, layout) -> Problem:
    function = "max_unpool2d"
    n, c, h, w = image(function, "x", x, layout)
    common_dtype(function, {"x": x}, ORDERED)
    expect_indices(function, indices, x.shape, "x")
    if 0 in (h, w):
        raise ValueError(f"{function}: x must have at least 1 pixel, got shape {x.shape}")
    out = _unpooled_size(x.shape, (n, c, h, w), kernel_size, stride, padding, output_size, layout)
    problem = forward_problem(x, n, c, out, 0, {"output_size": out, "layout": layout})
    problem.bytes += indices.nbytes
    problem.unbatched = (0, 1) if x.ndim == 3 else ()
    problem.values = partial(expect_inside, function, out)
    return problem


def _unpooled_size(shape, image_size, kernel_size, stride, padding, output_size, layout) -> shapes.Pair:
    """The plane that pooling came from: by default the smallest; an explicit one must be less than a stride away."""
    function = "max_unpool2d"
    n, c, *pooled = image_size
    kernel = shapes.pair(function, "kernel_size", kernel_size)
    stride = kernel if stride is None else shapes.pair(function, "stride", stride)
    wanted = None
    if output_size is not None:
        wanted = _wanted_size(shape, n, c, output_size, layout)
    if isinstance(padding, str) and wanted is None:
        raise ValueError(f"{function}: padding {padding!r} needs output_size")
    sides = shapes.padding_pairs(function, padding, wanted or (0, 0), kernel, stride, (1, 1))
    default = [(m - 1) * s + k - sum(p) for m, s, k, p in zip(pooled, stride, kernel, sides, strict=True)]
    if wanted is None:
        wanted = (default[0], default[1])
    for axis, size, usual, step in zip(("height", "width"), wanted, default, stride, strict=True):
        if size < 1 or abs(size - usual) >= step:
            raise ValueError(
                f"{function}: an output {axis} of {size} cannot be; it must be at least 1 and between "
                f"{usual - step + 1} and {usual + step - 1} for x {shape}, kernel_size {kernel}, stride {stride}"
            )
    return wanted


def _wanted_size(shape, n: int, c: int, output_size, layout) -> shapes.Pair:
    """output_size: an int, a pair, or (as in PyTorch) the whole shape of the result."""
    if isinstance(output_size, (tuple, list)) and len(output_size) > 2:
        whole = tuple(shapes.integer("max_unpool2d", "output_size", side, 0) for side in output_size)
        size = shapes.image_shape("max_unpool2d", "output_size", whole, layout)
        if len(whole) != len(shape) or size[:2] != (n, c):
            raise ValueError(f"max_unpool2d: output_size {whole} does not belong to x {shape}")
        return (size[2], size[3])
    return shapes.pair("max_unpool2d", "output_size", output_size)


def max_unpool_backward(grad, indices, layout) -> Problem:
    function = "max_unpool2d_backward"
    n, c, h, w = image(function, "grad", grad, layout)
    common_dtype(function, {"grad": grad})
    m, d, *out = image(function, "indices", indices, layout)
    if indices.ndim != grad.ndim or (m, d) != (n, c):
        raise ValueError(f"{function}: indices {indices.shape} must have the batch and channels of grad {grad.shape}")
    expect_indices(function, indices, indices.shape, "x")
    if 0 in (h, w, *out):
        raise ValueError(f"{function}: the images must have at least 1 pixel, got {grad.shape} and {indices.shape}")
    moved = indices.size * (INDEX.itemsize + 2 * grad.dtype.itemsize)
    unbatched = (0, 1) if grad.ndim == 3 else ()
    values = partial(expect_inside, function, (h, w))
    return Problem({"layout": layout}, bytes=moved, unbatched=unbatched, values=values)
