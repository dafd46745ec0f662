"""Convolution in numba.cuda, executed on the CPU, against the reference in float64."""

import numpy as np
import pytest
from conv_cases import DEPTHWISE, LAYOUTS, OPTIONS, SMALL, check, reference

import tilewise
from tilewise import kernels

DTYPES = [np.float16, np.float32, np.float64]
# what the CPU's tests have, without the large ones: each thread is executed
CASES = {"options": OPTIONS, "depthwise": DEPTHWISE, "small": SMALL}
ACTIVATIONS = (None, "relu", "leaky_relu", "sigmoid", "tanh")


def operands(rng, case, dtype, layout):
    """x, weight, bias, add: the weights small enough for float16 and for tanh."""
    x, weight, bias = case.arrays(rng, np.float32, layout)
    weight /= max(case.taps, 1) ** 0.5
    with tilewise.using(backend="reference"):
        shape = kernels.conv2d(x, weight, **case.options, layout=layout).shape
    add = rng.standard_normal(shape)
    return tuple(a.astype(dtype) for a in (x, weight, bias, add))


def forward(rng, case, dtype, layout, number=0, algorithm="auto"):
    x, weight, bias, add = operands(rng, case, dtype, layout)
    options = case.options | {"layout": layout, "activation": ACTIVATIONS[number % 5]}
    bias, add = None if number % 3 == 1 else bias, None if number % 3 == 2 else add
    y = kernels.conv2d(x, weight, bias, add=add, algorithm=algorithm, **options)
    added = {} if add is None else {"add": add.astype(np.float64)}
    expected = reference(kernels.conv2d, x, weight, bias, **options, **added)
    check(y, expected, case.taps, (case, layout, options), dtype)


def backward(rng, case, dtype, layout):
    x, weight, _, grad = operands(rng, case, dtype, layout)
    options = case.options | {"layout": layout}
    got = kernels.conv2d_backward(grad, x, weight, **options)
    expected = reference(kernels.conv2d_backward, grad, x, weight, **options)
    pixels = grad.size // case.o
    lengths = case.o // case.groups * case.kernel[0] * case.kernel[1], pixels, pixels
    for name, mine, right, length in zip(("x", "weight", "bias"), got, expected, lengths, strict=True):
        check(mine, right, length, (name, case, layout), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("algorithm", ["auto", "direct"])
def test_forward(gpu, rng, name, layout, dtype, algorithm):
    for number, case in enumerate(CASES[name]):
        forward(rng, case, dtype, layout, number, algorithm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_backward(gpu, rng, name, layout, dtype):
    for case in CASES[name]:
        backward(rng, case, dtype, layout)
