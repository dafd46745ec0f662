"""Recurrent layers: RNN (Elman 1990) and LSTM (Hochreiter and Schmidhuber 1997), of one or more layers.

A layer's whole sequence is one call of its kernel, forward and backward (kernels/recurrent.py).
"""

from contextlib import nullcontext
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ..kernels import lstm, lstm_backward, rnn, rnn_backward, settings
from ..kernels.dispatch import using
from ..kernels.shapes import integer, probability
from .dropout import Dropout
from .init import Rng, generator, layer_dtype, uniform
from .module import Module, Parameter

RETURNS = ("all", "sequence", "last")
_States = tuple[np.ndarray, ...]
_Weights = tuple[np.ndarray, np.ndarray]  # weight_ih, weight_hh


def _on_the_cpu():
    """Where the kernels are: a block that pins a GPU has these layers on the CPU none the less."""
    pinned = settings.active()
    elsewhere = "gpu" in (pinned.device, settings.DEVICE_OF.get(pinned.backend or ""))
    return using(device="cpu") if elsewhere else nullcontext()


class _Recurrent(Module):
    """What RNN and LSTM share: parameters, shapes, the walk over layers. States are (num_layers, N, hidden_size)."""

    names: tuple[str, ...] = ("h",)  # of the states
    gates = 1  # blocks of hidden_size rows in each weight

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        returns: str,
        rng: Rng,
        dtype: DTypeLike,
    ):
        name = type(self).__name__
        self.input_size = integer(name, "input_size", input_size)
        self.hidden_size = integer(name, "hidden_size", hidden_size)
        self.num_layers = integer(name, "num_layers", num_layers)
        if returns not in RETURNS:
            raise ValueError(f"{name}: returns must be one of {', '.join(RETURNS)}, got {returns!r}")
        self.dropout = probability(name, "dropout", dropout)
        self.bias, self.batch_first, self.returns = bias, batch_first, returns
        rng, dtype, bound = generator(rng), layer_dtype(name, dtype), 1 / sqrt(self.hidden_size)
        rows = self.gates * self.hidden_size
        for layer in range(self.num_layers):
            inputs = self.hidden_size if layer else self.input_size
            shapes = {"weight_ih": (rows, inputs), "weight_hh": (rows, self.hidden_size)}
            if bias:
                shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
            for kind, shape in shapes.items():
                setattr(self, f"{kind}_l{layer}", Parameter(uniform(shape, rng, dtype, bound)))
        for layer in range(self.num_layers - 1 if dropout else 0):
            setattr(self, f"dropout_l{layer}", Dropout(dropout, rng=rng))

    def _run(self, x: np.ndarray, weights: _Weights, bias: np.ndarray | None, start: _States) -> tuple:
        """All steps of a layer: (h (T + 1, N, H) from the start on, the final states, what else _run_back needs)."""
        raise NotImplementedError

    def _run_back(self, grad, final: _States, weights: _Weights, x, hidden, extra: tuple, *, needs) -> tuple:
        """(the gradients of x, weight_ih, weight_hh and bias, those of the start), from those of the output and of the
        final states."""
        raise NotImplementedError

    def _parameter(self, kind: str, layer: int) -> Parameter:
        return getattr(self, f"{kind}_l{layer}")

    def _dropout(self, layer: int) -> Dropout | None:
        """What lies between this layer and the next one."""
        return getattr(self, f"dropout_l{layer}", None)

    def __call__(self, x: np.ndarray, state=None) -> Any:
        return super().__call__(x) if state is None else self.forward(x, state)

    def forward(self, x: np.ndarray, state=None) -> Any:
        sequence, start = self._checked(x, state)
        final = tuple(np.empty_like(s) for s in start)
        kept = []
        for layer in range(self.num_layers):
            with _on_the_cpu():
                hidden, last, extra = self._run(
                    sequence, self._weights(layer), self._biases(layer), tuple(s[layer] for s in start)
                )
            kept.append((sequence, hidden, extra))
            for values, value in zip(final, last, strict=True):
                values[layer] = value
            sequence = hidden[1:]
            if (dropout := self._dropout(layer)) is not None:
                sequence = dropout(sequence)
        self.keep(kept)
        if self.returns == "last":
            return sequence[-1]
        output = sequence.swapaxes(0, 1) if self.batch_first else sequence
        return output if self.returns == "sequence" else (output, self._outside(final))

    def _weights(self, layer: int) -> _Weights:
        return self._parameter("weight_ih", layer).data, self._parameter("weight_hh", layer).data

    def _biases(self, layer: int) -> np.ndarray | None:
        """Their sum, which is all that the kernels know of them."""
        if not self.bias:
            return None
        return self._parameter("bias_ih", layer).data + self._parameter("bias_hh", layer).data

    def _checked(self, x: np.ndarray, state) -> tuple[np.ndarray, _States]:
        """(x as (T, N, input_size), the initial states)"""
        name = type(self).__name__
        if x.ndim != 3 or x.shape[2] != self.input_size:
            axes = "N, steps" if self.batch_first else "steps, N"
            raise ValueError(f"{name}: x must have shape ({axes}, {self.input_size}), got {x.shape}")
        sequence = x.swapaxes(0, 1) if self.batch_first else x
        if not len(sequence):
            raise ValueError(f"{name}: x has no steps (shape {x.shape})")
        shape = (self.num_layers, sequence.shape[1], self.hidden_size)
        if state is None:
            return sequence, tuple(np.zeros(shape, x.dtype) for _ in self.names)
        return sequence, self._inside("state", state, shape, x.dtype)

    def _inside(self, what: str, state, shape: tuple[int, ...], dtype: np.dtype) -> _States:
        """A state as the caller has it (one array, or a tuple of several), as a tuple."""
        function = type(self).__name__
        states = (state,) if len(self.names) == 1 else state
        if not isinstance(states, (tuple, list)) or len(states) != len(self.names):
            raise TypeError(f"{function}: {what} must be a tuple ({', '.join(self.names)}), got {type(state).__name__}")
        for name, array in zip(self.names, states, strict=True):
            if array.shape != shape:
                raise ValueError(f"{function}: {what} {name} must have shape {shape}, got {array.shape}")
            if array.dtype != dtype:
                raise TypeError(f"{function}: {what} {name} is {array.dtype} but x is {dtype}; the dtypes must match")
        return tuple(states)

    def _outside(self, states: _States):
        return states[0] if len(states) == 1 else states

    def _flops(self, x: np.ndarray, y: np.ndarray) -> int:
        """Of the gates, whose two biases are added to one beforehand."""
        rows = self.gates * self.hidden_size
        inputs = [self.input_size, *[self.hidden_size] * (self.num_layers - 1)]
        each = sum(2 * (features + self.hidden_size) + self.bias for features in inputs)
        return x.shape[0] * x.shape[1] * rows * each

    def backward(self, grad: np.ndarray, grad_state=None) -> Any:
        """Add to the parameters' gradients, and go back from the last forward.

        Args:
            grad: the gradient of the output, of its shape.
            grad_state: with returns="all", the gradient of the final state, in its form; None for zeros.

        Returns:
            The gradient of x; with returns="all" a pair of it and of the initial state's.
        """
        grad_x, start = self._back(grad, grad_state, True)
        return (grad_x, self._outside(start)) if self.returns == "all" else grad_x

    def backward_parameters(self, grad: np.ndarray):
        self._back(grad, None, False)

    def _back(self, grad: np.ndarray, grad_state, needs_x: bool) -> tuple[Any, _States]:
        (kept,) = self.kept()
        hidden = kept[-1][1][1:]
        grad = self._time_major(grad, hidden)
        shape = (self.num_layers, *hidden.shape[1:])
        if grad_state is None:
            final = tuple(np.zeros(shape, hidden.dtype) for _ in self.names)
        else:
            final = self._inside("grad_state", grad_state, shape, hidden.dtype)
        start = tuple(np.empty_like(f) for f in final)
        for layer in reversed(range(self.num_layers)):
            if (dropout := self._dropout(layer)) is not None:
                grad = dropout.backward(grad)
            needs = self._needs(layer, needs_x or layer > 0)
            with _on_the_cpu():
                grad, *gradients, begun = self._run_back(
                    grad, tuple(f[layer] for f in final), self._weights(layer), *kept[layer], needs=needs
                )
            self._accumulate(layer, *gradients)
            for values, value in zip(start, begun, strict=True):
                values[layer] = value
        return (grad.swapaxes(0, 1) if needs_x and self.batch_first else grad), start

    def _time_major(self, grad: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """The gradient of all hidden states of the uppermost layer, (T, N, H)."""
        shape = hidden.shape[1:] if self.returns == "last" else hidden.shape
        if self.returns != "last" and self.batch_first:
            shape = (shape[1], shape[0], shape[2])
        if grad.shape != shape:
            raise ValueError(f"{type(self).__name__}.backward: grad must have shape {shape}, got {grad.shape}")
        if self.returns != "last":
            return grad.swapaxes(0, 1) if self.batch_first else grad
        full = np.zeros(hidden.shape, grad.dtype)
        full[-1] = grad
        return full

    def _needs(self, layer: int, needs_x: bool) -> tuple[str, ...]:
        """The gradients that somebody wants of this layer, as the kernels name them."""
        biases = ("bias_ih", "bias_hh") if self.bias else ()
        needs = [kind for kind in ("weight_ih", "weight_hh") if self._parameter(kind, layer).requires_grad]
        needs += ["bias"] if any(self._parameter(kind, layer).requires_grad for kind in biases) else []
        return (*(("x",) if needs_x else ()), *needs)

    def _accumulate(self, layer: int, grad_ih, grad_hh, grad_bias):
        self._parameter("weight_ih", layer).accumulate(grad_ih)
        self._parameter("weight_hh", layer).accumulate(grad_hh)
        for kind in (
            ("bias_ih", "bias_hh") if self.bias else ()
        ):  # each its own copy: a gradient may be changed in place
            self._parameter(kind, layer).accumulate(None if grad_bias is None else grad_bias.copy())

    def describe(self) -> str:
        options = {"num_layers": 1, "nonlinearity": "tanh", "bias": True, "batch_first": False, "returns": "all"}
        shown = [f", {n}={getattr(self, n)!r}" for n, usual in options.items() if getattr(self, n, usual) != usual]
        return f"{self.input_size}, {self.hidden_size}{''.join(shown)}"


_ARGUMENTS = """Args:
        input_size, hidden_size: the features of x and of h.
        num_layers: how many; each takes the sequence of the one before.
        {extra}bias: whether there are any.
        batch_first: x and the output are (N, steps, features), not (steps, N, features). States are not changed by it.
        dropout: the probability with which an element is dropped between one layer and the next, in training.
        returns: "all": (output, final state), as in PyTorch, where output is h of the last layer at all steps, and the
            state (num_layers, N, hidden_size){state}; forward takes an initial one: layer(x, state). "sequence": the
            output alone, and "last": h of the last layer after the last step, (N, hidden_size), as Sequential wants it.
        rng: a numpy.random.Generator or a seed, for the initial values, uniform in +-1 / sqrt(hidden_size), and the
            dropout.
        dtype: of the parameters; x must have it too.
    """


class RNN(_Recurrent):
    __doc__ = f"""h_t = tanh(x_t weight_ih^T + bias_ih + h_(t-1) weight_hh^T + bias_hh), from h_0 = 0.

    {_ARGUMENTS.format(extra='nonlinearity: "tanh" or "relu".' + chr(10) + "        ", state="")}"""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        *,
        returns: str = "all",
        rng: Rng = None,
        dtype: DTypeLike = np.float32,
    ):
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f'RNN: nonlinearity must be "tanh" or "relu", got {nonlinearity!r}')
        self.nonlinearity = nonlinearity
        super().__init__(input_size, hidden_size, num_layers, bias, batch_first, dropout, returns, rng, dtype)

    def _run(self, x, weights, bias, start):
        hidden = rnn(x, *weights, bias, start[0], nonlinearity=self.nonlinearity)
        return hidden, (hidden[-1],), ()

    def _run_back(self, grad, final, weights, x, hidden, extra, *, needs):
        options = {"nonlinearity": self.nonlinearity, "needs": needs}
        *gradients, begun = rnn_backward(grad, final[0], x, *weights, hidden, **options)
        return *gradients, (begun,)


class LSTM(_Recurrent):
    __doc__ = f"""c_t = f * c_(t-1) + i * g and h_t = o * tanh(c_t), from h_0 = c_0 = 0.

    (i, f, g, o) = x_t weight_ih^T + bias_ih + h_(t-1) weight_hh^T + bias_hh, each of hidden_size features, then tanh
    for g and the sigmoid for the others.

    {_ARGUMENTS.format(extra="", state=", a pair (h, c) of such")}"""

    names = ("h", "c")
    gates = 4

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        *,
        returns: str = "all",
        rng: Rng = None,
        dtype: DTypeLike = np.float32,
    ):
        super().__init__(input_size, hidden_size, num_layers, bias, batch_first, dropout, returns, rng, dtype)

    def _run(self, x, weights, bias, start):
        if not self.training:
            hidden, cells = lstm(x, *weights, bias, start[0], start[1])
            return hidden, (hidden[-1], cells), ()
        hidden, cells, gates = lstm(x, *weights, bias, start[0], start[1], return_gates=True)
        return hidden, (hidden[-1], cells[-1]), (cells, gates)

    def _run_back(self, grad, final, weights, x, hidden, extra, *, needs):
        *gradients, h, c = lstm_backward(grad, final[0], final[1], x, *weights, hidden, extra[0], extra[1], needs=needs)
        return *gradients, (h, c)
