"""What counts as an array and what does not, tensors in and out, and what `out=` may be. On the reference backend:
nothing here depends on the kernels."""

import inspect

import numpy as np
import pytest

import tilewise
from tilewise import kernels

a32 = np.arange(6, dtype=np.float32).reshape(2, 3)
image, weight = np.ones((1, 3, 8, 8), np.float32), np.ones((4, 3, 3, 3), np.float32)
FUNCTIONS = [name for family, names in kernels._EXPORTS.items() if family != "dispatch" for name in names]


@pytest.fixture(autouse=True)
def _reference():
    with tilewise.using(backend="reference"):
        yield


# ---------------------------------------------------------------------------------------- what counts as an array


def test_numpy_subclasses_are_arrays(tmp_path):
    np.save(tmp_path / "a.npy", a32)
    for array in (np.load(tmp_path / "a.npy", mmap_mode="r"), a32.view(np.recarray), np.asmatrix(a32)):
        y = kernels.matmul(array, np.asarray(a32).T)
        assert type(y) is np.ndarray
        np.testing.assert_array_equal(y, a32 @ a32.T)


class OnTheGpu:
    __cuda_array_interface__ = {"shape": (2, 3), "typestr": "<f4", "data": (0, False), "version": 3}  # noqa: RUF012


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (a32.tolist(), r"matmul: a must be a NumPy array or a CPU torch tensor, got list"),
        (1.0, r"matmul: a must be a NumPy array or a CPU torch tensor, got float"),
        (np.float32(1), r"matmul: a must be a NumPy array or a CPU torch tensor, got float32"),
        ("a", r"matmul: a must be a NumPy array or a CPU torch tensor, got str"),
        (None, r"matmul: a must be an array, got None"),
        (np.ma.masked_less(a32, 1), r"matmul: a is a masked array; pass \.filled\(value\) or \.data"),
        (OnTheGpu(), r"matmul: a is a OnTheGpu; use CuPy, Numba or PyTorch arrays on the GPU"),
        (a32.astype(object), r"matmul: a is object, which is not supported"),
    ],
    ids=["list", "float", "scalar", "str", "None", "masked", "gpu", "object"],
)
def test_what_is_not_an_array(array, message):
    other = a32.T.astype(array.dtype) if type(array) is np.ndarray else a32.T
    with pytest.raises(TypeError, match=message):
        kernels.matmul(array, other)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_none_for_the_first_array_is_an_error(name):
    function = getattr(kernels, name)
    # plausible values for what else has no default, so that nothing but the None is wrong
    values = {
        "input_shape": (1, 1, 4, 4),
        "kernel_size": 2,
        "output_size": 2,
        "padding": 1,
        "lr": 0.1,
        "step": 1,
        "seed": 0,
    }
    required = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty][1:]
    keywords = {p.name: values[p.name] for p in required if p.kind is p.KEYWORD_ONLY}
    with pytest.raises(TypeError, match=rf"{name}: \w+ must be an array, got None"):
        function(None, *(values.get(p.name) for p in required if p.name not in keywords), **keywords)


def test_tensors_in_tensors_out(torch):
    a = torch.arange(6, dtype=torch.float64).reshape(2, 3)
    y = kernels.matmul(a, a.T)
    assert type(y) is torch.Tensor
    assert torch.equal(y, a @ a.T)
    dot = kernels.matmul(a[0], a[1])
    assert dot.shape == ()
    assert dot.item() == 14
    gradients = kernels.matmul_backward(y, a, a.T, needs=("b",))
    assert gradients[0] is None
    assert type(gradients[1]) is torch.Tensor


def test_tensors_that_are_refused(torch):
    a = torch.ones(2, 2)
    with pytest.raises(TypeError, match=r"matmul: b requires grad, .* pass b\.detach\(\)"):
        kernels.matmul(a, torch.ones(2, 2, requires_grad=True))
    with torch.no_grad(), pytest.raises(TypeError, match="requires grad"):
        kernels.matmul(torch.nn.Parameter(a), a)
    with pytest.raises(TypeError, match=r"matmul: a is on meta"):
        kernels.matmul(torch.ones(2, 2, device="meta"), a)
    with pytest.raises(NotImplementedError, match=r"matmul: a is bfloat16"):
        kernels.matmul(a.bfloat16(), a.bfloat16())
    with pytest.raises(TypeError, match=r"matmul: a must be dense, got a tensor of layout torch\.sparse_coo"):
        kernels.matmul(a.to_sparse(), a)
    with pytest.raises(TypeError, match=r"matmul: the arrays must be of one kind, got a Tensor, b ndarray"):
        kernels.matmul(a, a32[:, :2])
    with pytest.raises(TypeError, match=r"conv2d: the arrays must be of one kind, got x ndarray, weight ndarray, bias"):
        kernels.conv2d(image, weight, torch.ones(4))


# ------------------------------------------------------------------------------------------------------------ out=


@pytest.mark.parametrize("unbatched", [False, True])
def test_wrong_out(torch, unbatched):
    x = image[0] if unbatched else image
    y = kernels.conv2d(x, weight)
    frozen = np.zeros_like(y)
    frozen.flags.writeable = False
    memory = np.zeros(1000, np.float32)
    inside = memory[: x.size].reshape(x.shape)
    overlapping = memory[x.size - 1 : x.size - 1 + y.size].reshape(y.shape)
    wrong = [
        (np.zeros(y.shape), ValueError, r"conv2d: out must have shape .* dtype float32, got .* dtype float64"),
        (np.zeros((*y.shape, 1), y.dtype), ValueError, r"conv2d: out must have shape"),
        (np.zeros((2, *y.shape[-3:]), y.dtype), ValueError, r"conv2d: out must have shape"),
        (frozen, ValueError, r"conv2d: out is read-only"),
        (overlapping, ValueError, r"conv2d: out overlaps x"),
        (y.tolist(), TypeError, r"conv2d: out must be a NumPy array or a CPU torch tensor, got list"),
        (torch.zeros(y.shape), TypeError, r"conv2d: out must be a NumPy array, as the operands are"),
    ]
    for out, error, message in wrong:
        with pytest.raises(error, match=message):
            kernels.conv2d(inside, weight, out=out)


def test_out_may_not_be_an_operand_in_any_memory_layout(torch):
    a = np.ones((4, 4))
    for left, right, out in ((a, a.copy(), a), (a.T, a.copy(), a), (a[::2, ::2], np.ones((2, 2)), a[1:3, 1:3])):
        with pytest.raises(ValueError, match=r"matmul: out overlaps a"):
            kernels.matmul(left, right, out=out)
    with pytest.raises(ValueError, match=r"linear: out overlaps bias"):
        kernels.linear(a[1:2].copy(), a.copy(), a[0], out=a[:1])
    tensor = torch.ones(4, 4)
    with pytest.raises(ValueError, match=r"matmul: out overlaps b"):
        kernels.matmul(tensor.clone(), tensor, out=tensor)
    with pytest.raises(TypeError, match=r"matmul: out must be of the operands' kind, got ndarray"):
        kernels.matmul(tensor, tensor, out=np.ones((4, 4), np.float32))
    interleaved = np.ones((4, 8))
    kernels.matmul(a, interleaved[:, ::2], out=interleaved[:, 1::2])  # neighbours, but no common element
    np.testing.assert_array_equal(interleaved[:, 1::2], np.full((4, 4), 4.0))
