"""A network of tilewise.nn as the same network in PyTorch and in ONNX, with the same numbers in it."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tilewise import nn
from tilewise.nn.containers import Container, Residual
from tilewise.nn.models.blocks import NamedResidual


def torch_network(module: nn.Module) -> Any:
    """The torch.nn module, as torchvision would write it: activations and sums in place."""
    import torch

    class Sum(torch.nn.Module):
        def __init__(self, main, shortcut, activation):
            super().__init__()
            self.main, self.shortcut, self.activation = main, shortcut, activation

        def forward(self, x):
            y = self.main(x)
            y += x if self.shortcut is None else self.shortcut(x)
            return y if self.activation is None else self.activation(y)

    class Join(torch.nn.ModuleList):
        def forward(self, x):
            return torch.cat([branch(x) for branch in self], 1)

    class Last(torch.nn.Module):
        def __init__(self, lstm):
            super().__init__()
            self.lstm = lstm

        def forward(self, x):
            return self.lstm(x)[0][-1]

    def translated(module: Any) -> Any:
        if isinstance(module, (NamedResidual, Residual)):
            return Sum(*(part and translated(part) for part in _residual(module)))
        if isinstance(module, Container):
            kind = Join if isinstance(module, nn.Concat) else torch.nn.Sequential
            children = [translated(child) for child in module]
            return kind(children) if kind is Join else kind(*children)
        layer = _torch_layer(torch.nn, module)
        state = {name: torch.from_numpy(np.asarray(value)) for name, value in module.state_dict().items()}
        layer.load_state_dict(state)
        return Last(layer) if isinstance(module, nn.LSTM) else layer

    return translated(module)


def _residual(module: Any) -> tuple:
    """(main, shortcut, activation) of both kinds of residual block."""
    block = module._residual() if isinstance(module, NamedResidual) else module
    return block.main, block.shortcut, block.activation


def _torch_layer(torch_nn, module: Any) -> Any:
    kind = type(module).__name__
    if isinstance(module, nn.Conv2d):
        window = module.kernel_size, module.stride, _symmetric(module.padding), module.dilation, module.groups
        return torch_nn.Conv2d(module.in_channels, module.out_channels, *window, bias=module.bias is not None)
    if isinstance(module, nn.BatchNorm2d):
        return torch_nn.BatchNorm2d(module.num_features, module.eps, module.momentum)
    if isinstance(module, nn.Linear):
        return torch_nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    if isinstance(module, nn.MaxPool2d):
        window = module.kernel_size, module.stride, _symmetric(module.padding), module.dilation
        return torch_nn.MaxPool2d(*window, ceil_mode=module.ceil_mode)
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return torch_nn.AdaptiveAvgPool2d(module.output_size)
    if isinstance(module, (nn.ReLU, nn.ReLU6)):
        return getattr(torch_nn, kind)(inplace=True)
    if isinstance(module, nn.LSTM):
        return torch_nn.LSTM(module.input_size, module.hidden_size, module.num_layers, module.bias)
    if isinstance(module, nn.Dropout):
        return torch_nn.Dropout(module.p)
    if isinstance(module, nn.Flatten):
        return torch_nn.Flatten(module.start_dim, module.end_dim)
    raise NotImplementedError(f"{kind} has no translation")


def _symmetric(padding: Any) -> tuple[int, int]:
    (top, bottom), (left, right) = padding
    assert (top, left) == (bottom, right)
    return top, left


def onnx_session(module: nn.Module, x: np.ndarray, threads: int) -> Callable[[], np.ndarray]:
    """The network in ONNX Runtime with its defaults, which fuse what they can; input and output bound beforehand."""
    import onnxruntime
    from onnx import TensorProto, helper

    nodes, constants = _Graph().of(module)
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
    model.ir_version = min(model.ir_version, 10)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    name = nodes[-1].output[0]
    y: Any = session.run(None, {"x": x})[0]
    binding, result = session.io_binding(), onnxruntime.OrtValue.ortvalue_from_numpy(y)
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    binding.bind_ortvalue_output(name, result)

    def run():
        session.run_with_iobinding(binding)
        return result.numpy()

    return run


class _Graph:
    """Nodes and constants of an ONNX graph, gathered module by module."""

    def __init__(self):
        self.nodes, self.constants = [], []

    def of(self, module: nn.Module) -> tuple[list, list]:
        self._add(module, "x")
        return self.nodes, self.constants

    def _node(self, op: str, inputs: list[str], **attributes) -> str:
        from onnx import helper

        name = f"y{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def _constant(self, array: np.ndarray) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(array, f"c{len(self.constants)}"))
        return self.constants[-1].name

    def _add(self, module: Any, x: str) -> str:
        """The name of what the module makes of x."""
        if isinstance(module, (NamedResidual, Residual)):
            main, shortcut, activation = _residual(module)
            y = self._node("Add", [self._add(main, x), x if shortcut is None else self._add(shortcut, x)])
            return y if activation is None else self._add(activation, y)
        if isinstance(module, nn.Concat):
            return self._node("Concat", [self._add(branch, x) for branch in module], axis=1)
        if isinstance(module, Container):
            for child in module:
                x = self._add(child, x)
            return x
        return self._layer(module, x)

    def _layer(self, module: Any, x: str) -> str:
        if isinstance(module, nn.Dropout) or getattr(module, "output_size", (1, 1)) != (1, 1):
            return x  # the only adaptive pool here that is not global is VGG's, whose 7x7 pixels are 7x7 already
        if isinstance(module, nn.Conv2d):
            (top, left), arrays = _symmetric(module.padding), [module.weight, module.bias]
            return self._node(
                "Conv", [x, *(self._constant(p.data) for p in arrays if p is not None)], strides=module.stride,
                pads=[top, left, top, left], dilations=module.dilation, group=module.groups,
            )  # fmt: skip
        if isinstance(module, nn.BatchNorm2d):
            arrays = module.weight.data, module.bias.data, module.running_mean, module.running_var  # pyright: ignore
            return self._node("BatchNormalization", [x, *map(self._constant, arrays)], epsilon=module.eps)
        if isinstance(module, nn.Linear):
            arrays = module.weight.data, module.bias.data  # pyright: ignore[reportOptionalMemberAccess]
            return self._node("Gemm", [x, *map(self._constant, arrays)], transB=1)
        if isinstance(module, nn.MaxPool2d):
            (top, left), ceil = _symmetric(module.padding), int(module.ceil_mode)
            window = {"kernel_shape": module.kernel_size, "strides": module.stride, "pads": [top, left, top, left]}
            return self._node("MaxPool", [x], **window, ceil_mode=ceil)
        if isinstance(module, nn.ReLU6):
            return self._node("Clip", [x, *(self._constant(np.array(v, np.float32)) for v in (0, 6))])
        ops = {nn.ReLU: "Relu", nn.AdaptiveAvgPool2d: "GlobalAveragePool", nn.Flatten: "Flatten"}
        return self._node(ops[type(module)], [x])
