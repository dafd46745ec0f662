"""The same case as a call of every engine that can compute it: tilewise in both layouts, PyTorch, ONNX Runtime, NumPy.

Each engine gets the same numbers in the layout it is named after; layouts are converted beforehand. A result comes back
as NumPy arrays in NCHW through `as_arrays`, to be compared before anything is timed.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from .layers import Activation, BatchNorm, Case, Conv, Dropout, Linear, Matmul, Pool
from .timing import SEED

Engine = Callable[[], Any]
OURS, OURS_LAST = "tilewise", "tilewise NHWC"
OURS_OUT = "tilewise out="
OURS_PREPARED, OURS_LAST_PREPARED = "tilewise prepared", "tilewise NHWC prepared"
TORCH, TORCH_LAST = "torch", "torch channels_last"
ONNX, NUMPY = "onnxruntime", "numpy"
EPS = 1e-5
IMAGES = (Conv, Pool, BatchNorm)


def build(case: Case, threads: int, dtype="float32") -> dict[str, Engine]:
    """All engines that are installed and have this function."""
    args, options = case.arguments(np.random.default_rng(SEED), np.dtype(dtype))
    engines: dict[str, Engine] = {**_both_layouts(case, args, options)}
    engines |= _into_own_array(engines[OURS])
    engines |= torch_calls(case, args, options)
    session = _onnx_session(case, args, options, threads)
    if session:
        engines[ONNX] = session
    numpy_call = _numpy(case, args)
    if numpy_call:
        engines[NUMPY] = numpy_call
    return engines


def ours(case: Case, dtype="float32") -> dict[str, partial]:
    """Our kernel alone, in each layout that it has."""
    return _both_layouts(case, *case.arguments(np.random.default_rng(SEED), np.dtype(dtype)))


def prepared(case: Case, dtype="float32") -> dict[str, Engine]:
    """A forward convolution whose weights were packed beforehand, as ONNX Runtime's are, in each layout."""
    if not isinstance(case, Conv) or case.is_backward:
        return {}
    import tilewise

    prepare: Any = tilewise.prepare_conv2d
    args, options = case.arguments(np.random.default_rng(SEED), np.dtype(dtype))
    calls = {}
    for name, layout in ((OURS_PREPARED, "NCHW"), (OURS_LAST_PREPARED, "NHWC")):
        x, weight, bias = args if layout == "NCHW" else channels_last(case, args)
        calls[name] = partial(prepare(weight, bias, **options, layout=layout), x)
    return calls


def _into_own_array(call: Any) -> dict[str, Engine]:
    """The same call with `out=`, where the function has it: its result lies in memory that is there already."""
    if "out" not in inspect.signature(call.func).parameters:
        return {}
    return {OURS_OUT: partial(call, out=np.empty_like(call()))}


def _both_layouts(case: Case, args: tuple, options: dict) -> dict[str, partial]:
    calls = {OURS: _ours(case, args, options)}
    if isinstance(case, IMAGES):
        calls[OURS_LAST] = _ours(case, channels_last(case, args), options_last(options))
    return calls


def as_arrays(name: str, case: Case, result: Any) -> tuple[np.ndarray, ...]:
    """What an engine returned, as arrays in NCHW."""
    results = result if isinstance(result, tuple | list) else (result,)
    arrays = tuple(np.asarray(r) for r in results)
    if name in (OURS_LAST, OURS_LAST_PREPARED):
        arrays = tuple(a.transpose(0, 3, 1, 2) if _is_image(case, i) else a for i, a in enumerate(arrays))
    return arrays


def _is_image(case: Case, result: int) -> bool:
    """Only the first result of a forward or backward pass is an image."""
    return result == 0


def _last(array):
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(array.transpose(0, 2, 3, 1))
    return array.permute(0, 2, 3, 1).contiguous()


def channels_last(case: Case, args: Sequence) -> tuple:
    """The image operands of a case in NHWC; weights keep their layout."""
    images = {Conv: 2 if case.is_backward else 1, Pool: 2, BatchNorm: 2 if case.is_backward else 1}[type(case)]
    return tuple(_last(a) if i < images and getattr(a, "ndim", 0) == 4 else a for i, a in enumerate(args))


def options_last(options: dict) -> dict:
    """A call's options for its images in NHWC."""
    if "input_shape" in options:
        n, c, h, w = options["input_shape"]
        options = options | {"input_shape": (n, h, w, c)}
    return options | {"layout": "NHWC"}


def _ours(case: Case, args: tuple, options: dict) -> partial:
    import tilewise

    return partial(getattr(tilewise, case.op), *args, **options)


def _numpy(case: Case, args: tuple) -> Engine | None:
    """NumPy where it calls a BLAS; elsewhere its references are no rivals."""
    if isinstance(case, Matmul):
        return partial(np.matmul, *args)
    if isinstance(case, Linear) and not case.is_backward:
        x, weight, bias = args
        return lambda: x @ weight.T + bias
    if isinstance(case, Linear):
        grad, x, weight = args
        return lambda: (grad @ weight, grad.T @ x, grad.sum(0))
    return None


def torch_calls(case: Case, args: Sequence, options: dict) -> dict[str, Engine]:
    """PyTorch's call of a case, for images in both memory formats; none where it is not installed.

    args: of the case, arrays or tensors.
    """
    try:
        import torch
    except ImportError:
        return {}
    torch.set_grad_enabled(False)
    tensors = torch_tensors(torch, args)
    make = {
        Matmul: _torch_products,
        Linear: _torch_products,
        Conv: _torch_conv,
        Pool: _torch_pool,
        BatchNorm: _torch_batch_norm,
        Activation: _torch_activation,
        Dropout: _torch_dropout,
    }[type(case)]
    engines = {TORCH: make(torch, case, tensors, options)}
    if isinstance(case, IMAGES):
        last = [
            t.contiguous(memory_format=torch.channels_last) if isinstance(t, torch.Tensor) and t.ndim == 4 else t
            for t in tensors
        ]
        engines[TORCH_LAST] = make(torch, case, last, options, torch.channels_last)
    return engines


def torch_tensors(torch, args: Sequence, device: str = "cpu", dtype: str = "") -> list:
    """Copies of a case's arrays on a device; what is no array stays. dtype: what floats are rounded to."""

    def tensor(array):
        moved = torch.from_numpy(array.copy()).to(device)
        return moved.to(getattr(torch, dtype)) if dtype and array.dtype.kind == "f" else moved

    return [tensor(a) if isinstance(a, np.ndarray) else a for a in args]


def _torch_products(torch, case: Case, tensors: list, options: dict) -> Engine:
    if isinstance(case, Matmul):
        return partial(torch.matmul, *tensors)
    if not case.is_backward:
        return partial(torch.nn.functional.linear, *tensors)
    grad, x, weight = tensors
    return lambda: (grad @ weight, grad.T @ x, grad.sum(0))


def _torch_conv(torch, case: Any, tensors: list, options: dict, layout=None) -> Engine:
    if not case.is_backward:
        return partial(torch.nn.functional.conv2d, *tensors, **options)
    grad, x, weight = tensors
    stride, padding = [case.stride] * 2, [case.padding] * 2
    return partial(
        torch.ops.aten.convolution_backward,
        grad, x, weight, [case.outputs], stride, padding, [1, 1], False, [0, 0], case.groups, [True] * 3,
    )  # fmt: skip


def _torch_pool(torch, case: Any, tensors: list, options: dict, layout=None) -> Engine:
    functional, aten = torch.nn.functional, torch.ops.aten
    if not case.is_backward:
        return partial(getattr(functional, case.op), tensors[0], **options)
    grad = tensors[0]
    x = torch.zeros(options["input_shape"], dtype=grad.dtype, device=grad.device)
    x = x if layout is None else x.contiguous(memory_format=layout)
    if case.is_global:
        return lambda: aten._adaptive_avg_pool2d_backward(grad, x)
    window = [case.kernel] * 2, [case.stride] * 2, [case.padding] * 2
    if case.op.startswith("avg"):
        return lambda: aten.avg_pool2d_backward(grad, x, *window, case.ceil_mode, True, None)
    return lambda: aten.max_pool2d_with_indices_backward(grad, x, *window, [1, 1], case.ceil_mode, tensors[1])


def _torch_batch_norm(torch, case: Any, tensors: list, options: dict, layout=None) -> Engine:
    if not case.is_backward:
        return partial(torch.nn.functional.batch_norm, *tensors, training=case.training)
    grad, x, mean, invstd, weight = tensors
    if x.is_cuda:  # there it has the statistics of halves in float32
        mean, invstd = mean.float(), invstd.float()
    backward = torch.ops.aten.native_batch_norm_backward
    return lambda: backward(grad, x, weight, None, None, mean, invstd, True, EPS, [True] * 3)


def _torch_activation(torch, case: Case, tensors: list, options: dict) -> Engine:
    aten, name = torch.ops.aten, case.op.removesuffix("_backward")
    if not case.is_backward:
        return partial(getattr(torch.nn.functional if "relu" in name else torch, name), *tensors, *options.values())
    grad, y = tensors
    if name.endswith("softmax"):
        return lambda: getattr(aten, f"_{name}_backward_data")(grad, y, -1, y.dtype)
    more = {"relu": (0,), "leaky_relu": (0.01, True)}.get(name, ())
    function = aten.threshold_backward if name == "relu" else getattr(aten, f"{name}_backward")
    return lambda: function(grad, y, *more)


def _torch_dropout(torch, case: Case, tensors: list, options: dict) -> Engine:
    """Backward multiplies by the mask that PyTorch keeps, where ours draws it again."""
    if not case.is_backward:
        return partial(torch.nn.functional.dropout, *tensors, p=options["p"])
    (grad,) = tensors
    mask, scale = torch.rand(grad.shape, device=grad.device) >= options["p"], 1 / (1 - options["p"])
    return lambda: torch.ops.aten.native_dropout_backward(grad, mask, scale)


def _onnx_session(case: Case, args: tuple, options: dict, threads: int) -> Engine | None:
    """A session of one node with its weights as constants, input and output bound beforehand (its fastest form)."""
    node = None if case.is_backward else _onnx_node(case)
    if node is None:
        return None
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return None
    op, attributes, operands = node
    constants = [numpy_helper.from_array(args[i], f"c{i}") for i in operands]
    graph = helper.make_graph(
        [helper.make_node(op, ["x", *(c.name for c in constants)], ["y"], **attributes)],
        case.layer,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, args[0].shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
    model.ir_version = min(model.ir_version, 10)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    y: Any = session.run(None, {"x": args[0]})[0]
    binding = session.io_binding()
    x_value = onnxruntime.OrtValue.ortvalue_from_numpy(args[0])
    y_value = onnxruntime.OrtValue.ortvalue_from_numpy(y)
    binding.bind_ortvalue_input("x", x_value)
    binding.bind_ortvalue_output("y", y_value)

    def run():
        session.run_with_iobinding(binding)
        return y_value.numpy()

    return run


def _onnx_node(case: Any) -> tuple[str, dict, tuple[int, ...]] | None:
    """(operator, attributes, which operands are constants), or None where ONNX Runtime has no such function."""
    if isinstance(case, Matmul):
        return "MatMul", {}, (1,)
    if isinstance(case, Linear):
        return "Gemm", {"transB": 1}, (1, 2)
    if isinstance(case, Conv):
        window = {"strides": [case.stride] * 2, "pads": [case.padding] * 4, "group": case.groups}
        return "Conv", window, (1, 2)
    if isinstance(case, Pool):
        if case.is_global:
            return "GlobalAveragePool", {}, ()
        window = {
            "kernel_shape": [case.kernel] * 2,
            "strides": [case.stride] * 2,
            "pads": [case.padding] * 4,
            "ceil_mode": int(case.ceil_mode),
        }
        return ("MaxPool", window, ()) if case.op == "max_pool2d" else ("AveragePool", window, ())
    if isinstance(case, BatchNorm) and not case.training:
        return "BatchNormalization", {"epsilon": EPS}, (3, 4, 1, 2)
    if isinstance(case, Activation):
        name = {"relu": "Relu", "leaky_relu": "LeakyRelu", "sigmoid": "Sigmoid", "tanh": "Tanh"}
        name |= {"softmax": "Softmax", "log_softmax": "LogSoftmax"}
        return name[case.op], {}, ()
    return None
