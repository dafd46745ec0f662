"""Convolution and transposed convolution of images, forward and backward."""

from functools import partial
from typing import Any

import numpy as np

from tilewise.kernels import arrays, shapes
from tilewise.kernels.bound import Bound, Constants
from tilewise.kernels.conv_checks import (
    check_conv2d,
    check_conv2d_backward,
    check_conv_transpose2d,
    check_conv_transpose2d_backward,
    check_preparation,
    check_prepared_conv2d,
)
from tilewise.kernels.device_arrays import on_host
from tilewise.kernels.operation import Operation


def conv2d(
    x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *,
    layout="NCHW", activation=None, algorithm="auto", add=None, out=None,
):  # fmt: skip
    """The convolution of images with a bank of filters (cross-correlation, as in every CNN).

    y[n, o, i, j] = activation(bias[o] + add[n, o, i, j] + sum over c, p, q of
                               x[n, g C/groups + c, i S - P_top + p D, j S - P_left + q D] * weight[o, c, p, q])

    where g is o's group and x is 0 outside the image; OH = floor((H + P_top + P_bottom - D (KH - 1) - 1) / S) + 1, OW
    alike.

    Args:
        x: (N, C, H, W), or unbatched (C, H, W); float16, float32 or float64, on a GPU also bfloat16; any
            strides.
        weight: (O, C/groups, KH, KW), in both layouts.
        bias: (O,), or None for none.
        stride, dilation: an int or a pair (height, width).
        padding: rows and columns of zeros around x: an int, a pair (height, width), two pairs ((top, bottom),
            (left, right)), "valid" (none), "same" (OH = ceil(H / S), an odd row or column goes after) or "same_lower"
            (before).
        groups: output channel o sees the C/groups input channels of its own group; groups = C is depthwise.
        layout: "NCHW", or "NHWC" for x and y (N, H, W, C).
        activation: None, "relu", "relu6", "leaky_relu" (slope 0.01), "sigmoid" or "tanh", applied in the same pass.
        algorithm: "auto", or the one to use: "direct", "gemm", "winograd" (F(4x4, 3x3)) or "depthwise". The reference
            backend has one way and takes any of them.
        add: an array of exactly the result's shape and dtype, any strides, added before the activation in the same
            pass, such as the shortcut of a residual block; or None.
        out: an array of exactly the result's shape and dtype that overlaps no operand; it is filled and returned. It
            may be `add` itself, so that the convolution is added to what is there.

    Returns:
        (N, O, OH, OW) in x's layout, kind and dtype; without N if x has none.

    Raises:
        TypeError: not arrays; dtypes that differ or are not supported; an option of the wrong kind.
        ValueError: shapes or options that do not fit together, a kernel larger than the padded x, no channels or no
            pixels, an algorithm that is unknown or does not apply, a wrong `add` or `out`.

    Source: V. Dumoulin, F. Visin: A guide to convolution arithmetic for deep learning, arXiv:1603.07285.
    """
    return _CONV2D.call((x, weight, bias, add), (stride, padding, dilation, groups, layout, activation, algorithm), out)


def prepare_conv2d(
    weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *,
    layout="NCHW", activation=None, algorithm="auto", batch_norm=None,
):  # fmt: skip
    """`conv2d` for weights that are used many times, as in inference: what a call makes of them is made once.

    A convolution first brings its weights into the order in which its kernel reads them; Winograd's transforms them to
    four times their size. With one or a few small images that takes as long as the convolution itself. Here it is done
    at the first call with each kind of x, and kept: other shapes share it where their algorithm wants the same.

        prepared = prepare_conv2d(weight, bias, padding=1, activation="relu")
        y = prepared(x)                      # conv2d(x, weight, bias, padding=1, activation="relu")
        y = prepared(x, add=shortcut)        # ... the same with add=shortcut

    Args:
        weight, bias, stride, padding, dilation, groups, layout, activation, algorithm: as for `conv2d`; arrays on a
            GPU are copied to the host, whence each device gets its own. With "auto", the choice counts with packed
            weights, so that it may be another one than that of `conv2d`.
        batch_norm: (running_mean, running_var, weight, bias, eps) of an evaluation batch norm that follows the
            convolution, before `add` and the activation; weight and bias may be None. It is folded into weight and
            bias: weight[o] * s[o] and (bias[o] - running_mean[o]) * s[o] + batch norm's bias[o], with s = batch norm's
            weight / sqrt(running_var + eps), computed in float64 and rounded once; where x is float16,
            that is to float32, in which the CPU multiplies, and for a GPU once more, to float16.

    Returns:
        A `PreparedConv2d`. It keeps copies: later changes of the arrays given do not reach it.

    Raises:
        TypeError, ValueError: as `conv2d`, for what can be seen without x; a batch_norm that is not five things, or
            not of weight's dtype and number of outputs.
    """
    function = "prepare_conv2d"
    arrays.required(function, weight=weight)
    statistics, eps = _batch_norm_arrays(function, batch_norm)
    given = {"weight": weight, "bias": bias, **statistics}
    views: dict[str, Any] = {
        n: None if a is None else arrays.host_view(function, n, on_host(a))[0] for n, a in given.items()
    }
    weight, bias, *vectors = views.values()
    statistics = dict(zip(statistics, vectors, strict=True))
    dtype, options = check_preparation(
        function, weight, bias, statistics, stride, padding, dilation, groups, layout, activation, algorithm
    )
    # float16 is computed in float32, and what is folded need not be rounded to less
    computed = np.dtype(np.float32) if dtype == np.float16 else dtype
    with np.errstate(all="ignore"):  # a channel of negative variance is NaN, as in batch_norm
        if batch_norm is not None:
            weight, bias = _folded(weight, bias, vectors, eps)
        weight = np.array(weight, computed, order="C")
        bias = None if bias is None else np.array(bias, computed)
    return PreparedConv2d(weight, bias, dtype, options)


class PreparedConv2d:
    """What `prepare_conv2d` makes: call it with x as `conv2d`, with x alone.

    prepared(x, *, add=None, out=None) gives the numbers that conv2d with these weights and options gives, bit for bit
    where the algorithm is the same and no batch norm was folded, for any x that conv2d would take: batched or not,
    arrays or tensors (whatever the weights were), under any `using`. `tilewise.explain(prepared, x)` tells what it
    does. Several threads may call it at once.

    Attributes:
        dtype: of the weights as they were given, which x must have.
        nbytes: the memory that it holds now: a copy of the weights, and what was packed for the shapes seen so far.
    """

    def __init__(self, weight: np.ndarray, bias: np.ndarray | None, dtype: np.dtype, options: dict):
        self.dtype = dtype
        self._arrays, self._options = (weight, bias), options
        self._constants = Constants({"weight": weight, "bias": bias})
        check = partial(check_prepared_conv2d, weight, bias, dtype, options)
        self._alone = Bound(_CONV2D, ("x",), check, self._constants)
        self._with_add = Bound(_CONV2D, ("x", "add"), check, self._constants)

    def __call__(self, x, *, add=None, out=None):
        if add is None:
            return self._alone.call((x,), (), out)
        return self._with_add.call((x, add), (), out)

    @property
    def nbytes(self) -> int:
        return self._constants.nbytes

    def __reduce__(self):
        """Copies and pickles go without what was packed."""
        return PreparedConv2d, (*self._arrays, self.dtype, self._options)

    def __repr__(self):
        weight, bias = self._arrays
        options = ", ".join(f"{name}={value!r}" for name, value in self._options.items())
        return f"PreparedConv2d(weight {weight.shape} {self.dtype}, {'no ' if bias is None else ''}bias, {options})"


def _batch_norm_arrays(function: str, batch_norm) -> tuple[dict, float]:
    """The arrays of a batch norm to fold, by the names that messages use, and its eps."""
    if batch_norm is None:
        return {}, 0.0
    if not isinstance(batch_norm, tuple | list) or len(batch_norm) != 5:
        raise TypeError(
            f"{function}: batch_norm must be (running_mean, running_var, weight, bias, eps), got {batch_norm!r}"
        )
    names = [f"batch_norm's {name}" for name in ("running_mean", "running_var", "weight", "bias")]
    statistics = dict(zip(names, batch_norm, strict=False))
    arrays.required(function, **{name: statistics[name] for name in names[:2]})
    return statistics, shapes.number(function, "batch_norm's eps", batch_norm[4])


def _folded(weight, bias, statistics: list, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias, in float64, of the convolution that is this one followed by a batch norm in evaluation."""
    absent = 0, 0, 1, 1, 0  # what stands for a None
    vectors = [
        instead if a is None else a.astype(np.float64) for a, instead in zip((bias, *statistics), absent, strict=True)
    ]
    bias, mean, variance, scale, shift = vectors
    factor = scale / np.sqrt(variance + eps)
    return weight.astype(np.float64) * factor[:, None, None, None], (bias - mean) * factor + shift


def conv2d_backward(
    grad, x, weight, stride=1, padding=0, dilation=1, groups=1, *, layout="NCHW", needs=("x", "weight", "bias")
):
    """The gradients of `conv2d` without its activation.

    grad_x[n, c, h, w] sums grad[n, o, i, j] * weight[o, c, p, q] over all (o, i, j, p, q) in which that pixel met that
    tap; grad_weight sums grad * x over the same pairs; grad_bias sums grad over images and pixels.

    Args:
        grad: (N, O, OH, OW) in the layout, the gradient of the convolution plus bias: what the activation's backward
            gave, if there is one. Unbatched if x is.
        x, weight: the operands of the forward call, with its stride, padding, dilation, groups and layout.
        needs: which gradients to compute, out of "x", "weight" and "bias".

    Returns:
        (grad_x, grad_weight, grad_bias) of the shapes of x, weight and (O,); None for one that is not needed.

    Raises:
        TypeError, ValueError: as `conv2d`; also a grad whose shape is not the result's, or an unknown name in `needs`.
    """
    return _CONV2D_BACKWARD.call((grad, x, weight), (stride, padding, dilation, groups, layout, needs))


def conv_transpose2d(
    x, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1, *, layout="NCHW"
):
    """The transposed convolution: `conv2d`'s gradient with respect to its input, as a forward operation.

    Every x[n, c, i, j] adds x[n, c, i, j] * weight[c, o, p, q] to y[n, o, i S - P_top + p D, j S - P_left + q D], if
    that pixel exists; then bias[o] is added. OH = (H - 1) S - P_top - P_bottom + D (KH - 1) + output_padding + 1, OW
    alike.

    Args:
        x: (N, C, H, W), or unbatched (C, H, W); float16, float32 or float64, on a GPU also bfloat16; any
            strides.
        weight: (C, O/groups, KH, KW), in both layouts.
        bias: (O,), or None for none.
        stride, dilation: an int or a pair (height, width).
        padding: rows and columns cut off the result: an int, a pair, or two pairs ((top, bottom), (left, right)).
        output_padding: rows and columns added at the bottom and the right, an int or a pair, less than the larger of
            stride and dilation: it tells which of the sizes that conv2d maps to H is meant.
        groups: input channel c feeds the O/groups output channels of its own group.
        layout: "NCHW", or "NHWC" for x and y.

    Returns:
        (N, O, OH, OW) in x's layout, kind and dtype; without N if x has none.

    Raises:
        TypeError, ValueError, NotImplementedError: as `conv2d`; also a result without pixels.

    Source: V. Dumoulin, F. Visin: A guide to convolution arithmetic for deep learning, arXiv:1603.07285, chapter 4.
    """
    return _CONV_TRANSPOSE2D.call((x, weight, bias), (stride, padding, output_padding, groups, dilation, layout))


def conv_transpose2d_backward(
    grad, x, weight, stride=1, padding=0, output_padding=0, groups=1, dilation=1, *,
    layout="NCHW", needs=("x", "weight", "bias"),
):  # fmt: skip
    """The gradients of `conv_transpose2d`: grad_x is a `conv2d` of grad with the same weight.

    Args:
        grad: (N, O, OH, OW) in the layout, the gradient of the result. Unbatched if x is.
        x, weight: the operands of the forward call, with its options.
        needs: which gradients to compute, out of "x", "weight" and "bias".

    Returns:
        (grad_x, grad_weight, grad_bias) of the shapes of x, weight and (O,); None for one that is not needed.

    Raises:
        TypeError, ValueError: as `conv_transpose2d`; also a grad whose shape is not the result's, or an unknown name in
            `needs`.
    """
    options = (stride, padding, output_padding, groups, dilation, layout, needs)
    return _CONV_TRANSPOSE2D_BACKWARD.call((grad, x, weight), options)


_CONV2D = Operation("conv", "conv2d", ("x", "weight", "bias", "add"), check_conv2d, in_place=(3,))
_CONV2D_BACKWARD = Operation("conv", "conv2d_backward", ("grad", "x", "weight"), check_conv2d_backward)
_CONV_TRANSPOSE2D = Operation("conv", "conv_transpose2d", ("x", "weight", "bias"), check_conv_transpose2d)
_CONV_TRANSPOSE2D_BACKWARD = Operation(
    "conv", "conv_transpose2d_backward", ("grad", "x", "weight"), check_conv_transpose2d_backward
)
