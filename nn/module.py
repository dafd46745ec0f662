"""Parameter and Module: what every layer is made of."""

import functools
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np


class Changes:
    """Whether anything may have changed: `latest` is another object after each change of an attribute of any module or
    parameter. Who derived something from attributes compares one object first, and all of them only where it differs.

    It is replaced after the change; take it before the attributes are read.
    """

    def __init__(self):
        self.latest = object()

    def note(self):
        self.latest = object()


changes = Changes()


class Parameter:
    """An array that is trained, and its gradient.

    data: the values; an optimiser changes them in place.
    grad: the gradient of the loss, of data's shape and dtype, added up over calls of backward; None before the first.
    requires_grad: False freezes it: backward leaves grad alone, so that optimisers pass it over.
    version: how often an optimiser has changed data. Who derives something from data compares it.
    """

    version: int = 0

    def __init__(self, data: np.ndarray, requires_grad: bool = True):
        self.data = data
        self.grad: np.ndarray | None = None
        self.requires_grad = requires_grad

    def __setattr__(self, name: str, value: Any):
        object.__setattr__(self, name, value)
        if name in ("data", "version"):
            changes.note()

    def accumulate(self, grad: np.ndarray | None):
        """Add to the gradient. The array is kept, so the caller must not use it again."""
        if grad is None or not self.requires_grad:
            return
        if self.grad is None:
            self.grad = grad
        else:
            self.grad += grad

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    @property
    def size(self) -> int:
        return self.data.size

    def __repr__(self):
        return f"Parameter({self.shape}, {self.dtype}{'' if self.requires_grad else ', frozen'})"


class Unmatched(NamedTuple):
    """The names that load_state_dict(strict=False) passed over."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def described(value: Any) -> str:
    """An argument in a note on an error: "of shape (2, 3)", "of shapes (2, 3), (4,)", else "of type list". Whatever it
    is given, it does not raise: that would hide the error."""
    try:
        if isinstance(value, tuple) and value:
            return f"of shapes {', '.join(str(getattr(part, 'shape', type(part).__name__)) for part in value[:4])}"
        shape = getattr(value, "shape", None)
        return f"of type {type(value).__name__}" if shape is None else f"of shape {shape}"
    except Exception:
        return f"of type {type(value).__name__}"


def _located(backward: Callable) -> Callable:
    """A method that goes back, whose errors tell which layer refused which gradient: what __call__ is to forward."""

    @functools.wraps(backward)
    def call(self, *arguments, **options):
        try:
            return backward(self, *arguments, **options)
        except (TypeError, ValueError) as error:
            given: tuple[Any, ...] = (*arguments, *options.values())
            self._locate(error, f"going back with grad {described(given[0])}" if given else "going back")
            raise

    return call


class Module:
    """A layer, or a network of layers: `forward(x)`, then `backward(grad)`.

    In training mode forward keeps what backward needs; one backward uses it up. In evaluation mode nothing is kept, and
    several threads may call forward at once. Parameters and child modules are found among the instance's attributes, in
    the order in which they were set; a list of modules is not searched (use Sequential).

    A subclass defines `forward` and `backward`; `self.keep(...)` and `self.kept()` carry values between them.
    """

    training: bool = True
    buffers: tuple[str, ...] = ()  # attributes that belong to the state but are not trained, such as running means
    optional_buffers: tuple[str, ...] = ()  # of them those that a state may lack, as PyTorch's older files do
    counters: tuple[str, ...] = ()  # numbers and flags that only a checkpoint of training holds: dropout's calls
    transient: tuple[str, ...] = ("_kept",)  # attributes that copies and pickles go without
    _kept: tuple | None = None

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        for name in {"backward", "backward_parameters"} & vars(cls).keys():
            setattr(cls, name, _located(vars(cls)[name]))

    def __setattr__(self, name: str, value: Any):
        object.__setattr__(self, name, value)
        if name not in self.transient:
            changes.note()

    def __delattr__(self, name: str):
        object.__delattr__(self, name)
        changes.note()

    def forward(self, x: np.ndarray) -> np.ndarray:
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def backward(self, grad: np.ndarray) -> np.ndarray:
        """Add to the parameters' gradients, and return the gradient of the last forward's input.

        Args:
            grad: the gradient of the loss with respect to forward's result, of its shape and dtype.

        Raises:
            RuntimeError: no forward in training mode went before.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define backward")

    def _flops(self, x: np.ndarray, y: np.ndarray) -> int:
        """What `summary` counts for a forward from x to y of this module alone, without those inside."""
        return 0

    def backward_parameters(self, grad: np.ndarray):
        """Backward for a network's first layer: adds to the parameters' gradients only, which saves work."""
        self.backward(grad)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        try:
            return self.forward(x)
        except (TypeError, ValueError) as error:
            self._locate(error, f"called with x {described(x)}")
            raise

    def _locate(self, error: Exception, call: str):
        """Note on an error which layer refused which call. Every module on the way out replaces the note by its own, so
        that in the end the layer has the name that the outermost one knows it by."""
        refused, call, old = getattr(error, "refused", (self, call, None))
        names = {id(module): name for name, module in self.modules()}  # a dataclass has no hash
        # a block may compute by modules that it makes for the purpose
        refused = refused if id(refused) in names else self
        name = names[id(refused)]
        note = f"in layer {name} ({type(refused).__name__}), {call}" if name else None
        error.__notes__ = [n for n in (*getattr(error, "__notes__", ()), note) if n not in (old, None)]
        error.refused = refused, call, note  # pyright: ignore[reportAttributeAccessIssue]

    def keep(self, *values):
        """Called by forward: what backward will need. Does nothing in evaluation mode."""
        if self.training:
            self._kept = values

    def kept(self) -> tuple:
        """Called by backward: what forward kept, once. Twice for one forward would be a layer used at two places."""
        if self._kept is None:
            name = type(self).__name__
            raise RuntimeError(
                f"{name}.backward: nothing to go back from; call forward in training mode first (each backward uses up "
                f"one forward; a network that needs the layer twice needs two of them)"
            )
        values, self._kept = self._kept, None
        return values

    def children(self) -> Iterator[tuple[str, "Module"]]:
        """(name, module) of the modules directly inside this one."""
        return ((name, value) for name, value in vars(self).items() if isinstance(value, Module))

    def modules(self, prefix: str = "") -> Iterator[tuple[str, "Module"]]:
        """(dotted name, module) of this module, named "", and of all inside it, depth first."""
        yield prefix, self
        for name, child in self.children():
            yield from child.modules(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self) -> list[tuple[str, Parameter]]:
        """(dotted name, parameter), each parameter once, in PyTorch's order."""
        found: dict[int, tuple[str, Parameter]] = {}
        for prefix, module in self.modules():
            for name, value in vars(module).items():
                if isinstance(value, Parameter):
                    found.setdefault(id(value), (f"{prefix}.{name}" if prefix else name, value))
        return list(found.values())

    def parameters(self) -> list[Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def get_submodule(self, name: str) -> "Module":
        """The module of this dotted name ("layer1.0.conv1"); "" is this one. AttributeError where there is none."""
        module = self
        for part in name.split(".") if name else ():
            children = dict(module.children())
            if part not in children:
                kind = type(module).__name__
                raise AttributeError(f"{kind} has no module {part!r} ({name!r}); it has {', '.join(children)}")
            module = children[part]
        return module

    def set_submodule(self, name: str, module: "Module"):
        """Another module in the place of the one of this dotted name, such as a head for other classes."""
        if not isinstance(module, Module):
            raise TypeError(f"set_submodule: {name!r} must be a Module, got {type(module).__name__}")
        if not name:
            raise ValueError("set_submodule: name must not be empty")
        self.get_submodule(name)
        parent, _, last = name.rpartition(".")
        setattr(self.get_submodule(parent), last, module)

    def requires_grad_(self, requires_grad: bool = True):
        """Whether all parameters inside are trained; frozen ones forget their gradients. Returns the module."""
        for parameter in self.parameters():
            parameter.requires_grad = requires_grad
            if not requires_grad:
                parameter.grad = None  # so that an optimiser passes it over from now on
        return self

    def freeze(self, *patterns: str):
        """Keep parameters as they are: backward and optimisers pass them over. Returns the module.

        Batch norm inside a frozen module also keeps and uses its running statistics in training mode.

        Args:
            patterns: dotted names of modules, which stand for all inside them, or of parameters; "*" is any text, dots
                too: freeze("layer1", "layer2.*.bn1", "*.bias"). None: everything.

        Raises:
            ValueError: a pattern fits no name. Nothing is changed then.
        """
        return self._set_frozen(patterns, True)

    def unfreeze(self, *patterns: str):
        """The reverse of `freeze`, with the same arguments."""
        return self._set_frozen(patterns, False)

    def _set_frozen(self, patterns: tuple[str, ...], frozen: bool):
        chosen: list[Module | Parameter] = [] if patterns else [self]
        named = [(name, thing) for name, thing in (*self.modules(), *self.named_parameters()) if name]
        for pattern in patterns:
            found = [thing for name, thing in named if fnmatchcase(name, pattern)]
            if not found:
                names = ", ".join(name for name, _ in self.children())
                raise ValueError(f"freeze: {pattern!r} fits no module or parameter; the modules are {names}")
            chosen += found
        for thing in chosen:
            if isinstance(thing, Parameter):
                thing.requires_grad, thing.grad = not frozen, None if frozen else thing.grad
                continue
            thing.requires_grad_(not frozen)
            for _, module in thing.modules():
                module.hold_buffers(frozen)
        return self

    def hold_buffers(self, frozen: bool):
        """Called by freeze and unfreeze: whether buffers that training changes keep their values."""

    def zero_grad(self):
        """Forget all gradients."""
        for parameter in self.parameters():
            parameter.grad = None

    def train(self, mode: bool = True):
        """Training mode (or, with False, evaluation mode) for this module and all inside it; returns the module."""
        for _, module in self.modules():
            module.training = mode
            if mode:
                module.release()
        return self

    def eval(self):
        """Evaluation mode: dropout is off, batch norm uses its running statistics, nothing is kept for backward.

        Networks (Sequential, Residual, Concat, and those of `nn.models`) then fold batch norms into the convolutions
        before them, whose weights the next forward prepares once, and compute activations and residual sums in the same
        pass. Changed parameters and replaced modules are noticed; see `Conv2d` for what needs `release()`.
        """
        return self.train(False)

    def release(self):
        """Forget what evaluation derived from the parameters inside; train() and load_state_dict() call it."""

    def _state(self) -> dict[str, np.ndarray]:
        """The arrays themselves by dotted name, in PyTorch's order: a module's parameters, buffers, then children."""
        state = {}
        for prefix, module in self.modules():
            state |= {f"{prefix}.{name}" if prefix else name: array for name, array in module.own_state().items()}
        return state

    def own_state(self) -> dict[str, np.ndarray]:
        """The arrays themselves of this module's own parameters and buffers, without its children's."""
        own = {name: value.data for name, value in vars(self).items() if isinstance(value, Parameter)}
        return own | {name: getattr(self, name) for name in self.buffers}

    def state_dict(self) -> dict[str, np.ndarray]:
        """A copy of every parameter and buffer by its dotted name, as in PyTorch ("0.weight", "1.running_mean")."""
        return {name: array.copy() for name, array in self._state().items()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Unmatched:
        """Set parameters and buffers, in place, from arrays or detached CPU torch tensors; converted to this dtype.

        Args:
            state: name -> array, as state_dict gives it here or in PyTorch; from a file, `tilewise.nn.load`.
            strict: whether every name must be on both sides. Without it shapes must agree all the same.

        Returns:
            (missing_keys, unexpected_keys); both empty where strict.

        Raises:
            ValueError: a name is missing or unexpected and `strict`; a shape differs. All of them are named.
            TypeError: an array's kind of number does not fit.

        Whatever is raised, nothing has been changed.
        """
        own = self._state()
        optional = {f"{p}.{n}" if p else n for p, module in self.modules() for n in module.optional_buffers}
        missing = [name for name in own if name not in state and name not in optional]
        unmatched = Unmatched(missing, [name for name in state if name not in own])
        values = {name: np.asarray(state[name]) for name in own if name in state}
        wrong = [
            f"{name} has shape {value.shape}, expected {own[name].shape}"
            for name, value in values.items()
            if value.shape != own[name].shape
        ]
        if strict and any(unmatched):
            wrong[:0] = [
                f"names do not match {type(self).__name__}'s: missing {unmatched.missing_keys}, unexpected "
                f"{unmatched.unexpected_keys}; strict=False passes them over"
            ]
        if wrong:
            raise ValueError(f"load_state_dict: {'; '.join(wrong)}")
        for name, value in values.items():
            if not np.can_cast(value.dtype, own[name].dtype, "same_kind"):
                raise TypeError(f"load_state_dict: {name} is {value.dtype}, which does not fit {own[name].dtype}")
            if not own[name].flags.writeable:
                raise ValueError(f"load_state_dict: the module's own {name} is read-only")
        for name, value in values.items():
            own[name][...] = value
        for _, module in self.modules():
            module.release()
        return unmatched

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without what forward kept, which may be large."""
        return {name: value for name, value in vars(self).items() if name not in self.transient}

    def describe(self) -> str:
        """The constructor's arguments, as the repr shows them."""
        return ""

    def __repr__(self):
        lines = [f"  ({name}): " + repr(child).replace("\n", "\n  ") for name, child in self.children()]
        inside = "\n".join(["", *lines, ""]) if lines else self.describe()
        return f"{type(self).__name__}({inside})"
