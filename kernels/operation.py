"""What a public function is made of: an operation, with a plan for every signature that it was called with.

Every public function is thin: it hands its operands and options to an `Operation`. The first call with a new signature
(settings, options, shapes and dtypes) is checked in full and becomes a `Plan`; later calls with that signature find the
plan in a dictionary and go straight to the backend that dispatch.py chose.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any
from weakref import WeakSet

import numpy as np

from tilewise.kernels import arrays as arrays_module
from tilewise.kernels import device_call, gpu_choice
from tilewise.kernels import settings as settings_module
from tilewise.kernels.device_arrays import DeviceArray, is_on_device
from tilewise.kernels.device_replay import library_of
from tilewise.kernels.dispatch import Decision, Explained, choose_for, implementation_module

# bound once, for the hot path
_current_settings = settings_module.current.get
_ndarray = np.ndarray
_HALF, _SINGLE = np.dtype(np.float16), np.dtype(np.float32)

# Beyond this many signatures an operation forgets its plans, so that a program with ever new shapes stays small.
MAX_PLANS = 4096


@dataclass(slots=True)
class Problem:
    """What an operation's check found: the call in normal form.

    options: the backend's keyword arguments, every pair spelled out.
    flops, bytes: nominal work (padded taps included; each operand and result moved once).
    unbatched: which operands lack their batch axis; if any does, every result with a batch axis loses it again.
    out: (shape, dtype) that an `out=` array must have.
    values: called with the operands, raises for wrong values among them. For host arrays that go to a GPU: its kernels
        cannot raise without waiting for them.
    """

    options: dict[str, Any]
    flops: int = 0
    bytes: int = 0
    unbatched: tuple[int, ...] = ()
    unbatched_results: tuple[int, ...] = (0,)
    out: tuple[tuple[int, ...], np.dtype] | None = None
    values: Callable | None = None


@dataclass(slots=True)
class Plan:
    """One signature's way through a backend."""

    run: Callable
    canonical: bool  # operands must be C-contiguous, aligned and writeable
    direct: bool  # no batch axis to add
    problem: Problem
    backend: str


class _Kind:
    """A call's options: one object for all equal ones of equal types, which a dictionary finds by its identity.

    1, 1.0 and True are equal as dictionary keys, so types belong to a signature. `lru_cache` compares them in C: half a
    microsecond less than a tuple of types.

    tuples: which of the options are tuples. Of those it compares the values alone.
    """

    __slots__ = ("tuples",)

    def __init__(self, tuples: tuple[int, ...]):
        self.tuples = tuples


@lru_cache(maxsize=1 << 14, typed=True)
def _kind(*options) -> _Kind:
    return _Kind(tuple(i for i, option in enumerate(options) if isinstance(option, tuple)))


def _nested_kind(kind: _Kind, options: tuple) -> tuple:
    """Of options with tuples among them: the kinds of those, too."""
    kinds: list = [kind]
    for i in kind.tuples:
        inner = _kind(*options[i])
        kinds.append(_nested_kind(inner, options[i]) if inner.tuples else inner)
    return tuple(kinds)


_UNHASHABLE = _Kind(())
_operations: WeakSet["Operation"] = WeakSet()  # a prepared convolution has one of its own, which goes with it


class Operation:
    """A public function's way to its backends.

    family: the file name that holds it in every backend.
    name: the function's name there.
    operands: the names of the array arguments, for messages; a None operand is an absent optional one.
    check: check(*operands, *options) -> Problem; raises for a wrong call. Sees NumPy arrays, allocates nothing.
    mutates: operands (by position) that the function updates in place when `mutates_when(problem)`.
    any_strides: the CPU kernel takes strided operands itself, so they are not made contiguous here.
    in_place: operands (by position) that `out` may be identical with.
    elementwise: no result depends on how its kernels take the elements together. Others get their operands from a
        multiple of 16 bytes on, on a GPU, so that the order of their sums does not depend on where an array begins.
    """

    replayable = True  # whether its signature tells all that its kernels are given (device_replay.py)

    def __init__(
        self,
        family: str,
        name: str,
        operands: tuple[str, ...],
        check: Callable[..., Problem],
        mutates: tuple[int, ...] = (),
        mutates_when: Callable[[Problem], bool] = lambda problem: True,
        any_strides: bool = False,
        in_place: tuple[int, ...] = (),
        elementwise: bool = False,
    ):
        self.family = family
        self.name = name
        self.operands = operands
        self.check = check
        self.mutates = mutates
        self.mutates_when = mutates_when
        self.any_strides = any_strides
        self.in_place = in_place
        self.alignment = 1 if elementwise else 16
        self.plans: dict[tuple, Plan] = {}
        self.recorded: dict[tuple, Any] = {}  # device_replay.py's
        _operations.add(self)

    def call(self, operands: tuple, options: tuple = (), out=None) -> Any:
        # This is the hot path of every call, half a microsecond: no loop where up to three operands need none, no
        # Python function called before the plan is run.
        kind = None
        if options:
            try:
                kind = _kind(*options)
                if kind.tuples:
                    kind = _nested_kind(kind, options)
            except TypeError:  # an unhashable option, such as a list for a pair
                kind = _UNHASHABLE
        settings = _current_settings()  # None stands for the environment's
        if len(operands) == 1:
            (x,) = operands
            if type(x) is not _ndarray:
                return self._call_foreign(operands, options, out, kind)
            contiguous = x.flags.carray
            key = (settings, kind, x.shape, x.dtype)
        elif len(operands) == 2 and type(operands[0]) is type(operands[1]) is _ndarray:
            x, y = operands
            contiguous = x.flags.carray and y.flags.carray
            key = (settings, kind, x.shape, x.dtype, y.shape, y.dtype)
        elif len(operands) == 3 and type(operands[0]) is type(operands[1]) is type(operands[2]) is _ndarray:
            x, y, z = operands
            contiguous = x.flags.carray and y.flags.carray and z.flags.carray
            key = (settings, kind, x.shape, x.dtype, y.shape, y.dtype, z.shape, z.dtype)
        else:
            contiguous, signature = True, [settings, kind]
            for x in operands:
                if type(x) is _ndarray:
                    signature += x.shape, x.dtype
                    contiguous = contiguous and x.flags.carray
                elif x is None:
                    signature.append(None)
                else:
                    return self._call_foreign(operands, options, out, kind)
            key = tuple(signature)
        plan = self.plans.get(key)
        if plan is None:
            plan = self._new_plan(key, operands, options)
        if out is None and plan.direct and (contiguous or not plan.canonical):
            return plan.run(*operands)
        if not contiguous and plan.canonical:
            return self._call_strided(plan, operands, out)
        if plan.problem.unbatched:
            return self._call_unbatched(plan, operands, out)
        return self._call_into(plan, operands, out) if out is not None else plan.run(*operands)

    def _new_plan(self, key: tuple, operands: tuple, options: tuple) -> Plan:
        plan = self._plan(settings_module.active(), operands, options)
        if key[1] is not _UNHASHABLE:
            if len(self.plans) >= MAX_PLANS:
                self.plans.clear()
                self.recorded.clear()
            self.plans[key] = plan
        return plan

    def _plan(self, settings, operands: tuple, options: tuple) -> Plan:
        if operands[0] is None:  # never optional
            raise TypeError(f"{self.name}: {self.operands[0]} must be an array, got None")
        problem = self.check(*operands, *options)
        on_device = isinstance(operands[0], DeviceArray)
        first = operands[0]
        call = gpu_choice.Call(
            self.name, self.family, first.dtype.name, problem.options.get("layout", ""), problem.flops, problem.bytes,
            settings.tf32,
        )  # fmt: skip
        ordinal = first.place.ordinal if on_device else None
        backend, rejected = choose_for(settings, call, ordinal, first.dtype.itemsize)
        module = implementation_module(backend, self.family)
        if not hasattr(module, self.name):
            raise NotImplementedError(f"{self.name}: backend {backend!r} does not have it")
        on_gpu = settings_module.DEVICE_OF[backend] == "gpu"
        if arrays_module.is_bfloat16(operands[0].dtype) and not getattr(module, "HAS_BFLOAT16", False):
            other = "" if on_gpu else ', or a GPU, where one has it: using(device="gpu")'
            raise NotImplementedError(
                f"{self.name}: {self.operands[0]} is bfloat16, which the backend {backend!r} does not have; use "
                f"float32{other}"
            )
        shapes = _batched_shapes(operands, problem.unbatched)
        where = {"ordinal": ordinal or 0} if on_gpu else {}  # host arrays go to the first GPU
        half = operands[0].dtype == _HALF and not on_gpu  # GPUs load and store it themselves
        dtype = _SINGLE if half else operands[0].dtype  # what is computed in
        choose = getattr(module, f"choose_{self.name}", None)
        algorithm = problem.options.get("algorithm", self.name)
        if choose is not None:
            algorithm, others = self._choose(partial(choose, **where), shapes, dtype, problem.options)
            rejected = rejected | others
            if "algorithm" in problem.options:
                problem.options["algorithm"] = algorithm
        elif "algorithm" in problem.options:
            algorithm = backend
        if settings.explaining:
            device = settings_module.DEVICE_OF[backend]
            describe = getattr(module, f"describe_{self.name}", None)  # tells what the algorithm's name does not
            note = "float16 is computed in float32" if half else ""
            if describe is not None and not half:
                note = describe(self._all_shapes(shapes), dtype, problem.options, **where)
            work = problem.flops, problem.bytes
            raise Explained(Decision(self.name, device, backend, algorithm, *work, rejected, note))

        prepared = partial(self._implementation, module, dtype)
        changed = self.mutates if self.mutates and self.mutates_when(problem) else ()
        if on_gpu and not on_device:
            run = partial(
                device_call.run_from_host, backend, prepared(shapes, problem.options), changed, problem.values
            )
        elif half:
            in_registers = getattr(module, f"prepare_{self.name}_half", None)  # kernels that convert themselves
            run = in_registers and in_registers(shapes, **problem.options)
            if run is None:
                dtypes = [None if a is None else a.dtype for a in operands]
                prepare_half = implementation_module(backend, "half").prepare
                run = prepare_half(self.name, prepared, dtypes, shapes, problem.options, changed)
        else:
            run = prepared(shapes, problem.options)
        return Plan(run, backend == "cpu" and not self.any_strides, not problem.unbatched, problem, backend)

    def _choose(self, choose: Callable, shapes: list, dtype, options: dict) -> tuple[str, dict[str, str]]:
        return choose(shapes, dtype, options)

    def _all_shapes(self, shapes: list) -> list:
        """Also those of operands that a call does not give."""
        return shapes

    def _implementation(self, module, dtype, shapes: list, options: dict) -> Callable:
        """The backend's function for this signature."""
        function, prepare = getattr(module, self.name), getattr(module, f"prepare_{self.name}", None)
        if prepare is None:
            return partial(function, **options) if options else function
        return prepare(shapes, dtype, **options)

    def _call_foreign(self, operands: tuple, options: tuple, out, kind) -> Any:
        """The way for what is not exactly a NumPy array: torch tensors, subclasses, and everything that is an error."""
        library = library_of(type(operands[0]))
        if library is not None and kind is not _UNHASHABLE and self.replayable:
            result = device_call.call_again(self, library, operands, options, out, kind)
            if result is not NotImplemented:
                return result
        if any(is_on_device(operand) for operand in operands):
            return device_call.call(self, operands, options, out, kind)
        views, wraps = [], []
        for name, operand in zip(self.operands, operands, strict=True):
            if operand is None:
                if len(operands) <= 2:  # only longer calls have optional operands; `call` takes that for granted
                    raise TypeError(f"{self.name}: {name} must be an array, got None")
                views.append(None)
                continue
            view, wrap = arrays_module.host_view(self.name, name, operand)
            views.append(view)
            wraps.append((name, wrap))
        if any(wrap is not wraps[0][1] for _, wrap in wraps):
            kinds = ", ".join(f"{n} {type(o).__name__}" for n, o in zip(self.operands, operands, strict=True))
            raise TypeError(f"{self.name}: the arrays must be of one kind, got {kinds}")
        wrap = wraps[0][1] if wraps else arrays_module.identity
        if not wraps:
            raise TypeError(f"{self.name}: {self.operands[0]} must be an array, got None")
        if out is None:
            result = self.call(tuple(views), options)
            return tuple(r if r is None else wrap(r) for r in result) if isinstance(result, tuple) else wrap(result)
        target, out_wrap = arrays_module.host_view(self.name, "out", out)
        if out_wrap is not wrap:
            raise TypeError(f"{self.name}: out must be of the operands' kind, got {type(out).__name__}")
        self.call(tuple(views), options, target)
        return out

    def device_plan(self, views: tuple, options: tuple, kind) -> Plan:
        """The plan for these arrays on a GPU. kind: of the options."""
        signature = (None if v is None else (v.shape, v.dtype, v.place.ordinal) for v in views)
        key = (_current_settings(), kind, DeviceArray, *signature)
        return self.plans.get(key) or self._new_plan(key, views, options)

    def _call_strided(self, plan: Plan, operands: tuple, out):
        canonical = tuple(a if a is None or a.flags.carray else arrays_module.canonical(a) for a in operands)
        changed = ()
        if self.mutates and self.mutates_when(plan.problem):
            changed = tuple(i for i in self.mutates if canonical[i] is not operands[i])
        if plan.problem.unbatched:
            result = self._call_unbatched(plan, canonical, out, operands)
        else:
            result = plan.run(*canonical) if out is None else self._call_into(plan, canonical, out, operands)
        for i in changed:
            operands[i][...] = canonical[i]
        return result

    def _call_unbatched(self, plan: Plan, operands: tuple, out, originals: tuple | None = None):
        lifted = tuple(a[None] if i in plan.problem.unbatched else a for i, a in enumerate(operands))
        if out is not None:
            target = out if type(out) is _ndarray else self._host_out(out)
            self._check_out(plan.problem, originals or operands, target)
            self._write(plan, lifted, target[None])
            return out
        result = plan.run(*lifted)
        if isinstance(result, tuple):
            squeezed = plan.problem.unbatched_results
            return tuple(r[0] if i in squeezed and r is not None else r for i, r in enumerate(result))
        return result[0]

    def _call_into(self, plan: Plan, operands: tuple, out, originals: tuple | None = None):
        target = out if type(out) is _ndarray else self._host_out(out)
        self._check_out(plan.problem, originals or operands, target)
        self._write(plan, operands, target)
        return out

    def _host_out(self, out) -> np.ndarray:
        target, wrap = arrays_module.host_view(self.name, "out", out)
        if wrap is not arrays_module.identity:
            raise TypeError(f"{self.name}: out must be a NumPy array, as the operands are")
        return target

    def _write(self, plan: Plan, operands: tuple, out: np.ndarray):
        if out.flags.carray:
            plan.run(*operands, out=out)
        else:
            out[...] = plan.run(*operands)

    def _check_out(self, problem: Problem, operands: tuple, out: np.ndarray):
        assert problem.out is not None
        shape, dtype = problem.out
        if out.shape != shape or out.dtype != dtype:
            raise ValueError(
                f"{self.name}: out must have shape {shape} and dtype {dtype}, "
                f"got shape {out.shape} and dtype {out.dtype}"
            )
        flags = out.flags
        if not flags.writeable:
            raise ValueError(f"{self.name}: out is read-only")
        owner = flags.owndata
        for i, operand in enumerate(operands):
            # Two arrays that own their memory share none of it: half a microsecond less than to ask.
            if operand is None or (owner and operand is not out and operand.flags.owndata):
                continue
            if np.shares_memory(out, operand):
                self._check_overlap(i, operand, out)

    def _check_overlap(self, i: int, operand: np.ndarray, out: np.ndarray):
        name = self.operands[i]
        if i not in self.in_place:
            raise ValueError(f"{self.name}: out overlaps {name}")
        if not _is_same_view(out, operand):
            raise ValueError(f"{self.name}: out overlaps {name} without being the same array")


def _is_same_view(a: np.ndarray, b: np.ndarray) -> bool:
    first, second = a.__array_interface__, b.__array_interface__
    return first["data"][0] == second["data"][0] and (a.shape, a.strides, a.dtype) == (b.shape, b.strides, b.dtype)


def _batched_shapes(operands: tuple, unbatched: tuple[int, ...]) -> list[tuple[int, ...] | None]:
    """The operands' shapes in normal form."""
    shapes = [None if a is None else a.shape for a in operands]
    return [(1, *shape) if i in unbatched and shape is not None else shape for i, shape in enumerate(shapes)]


def forget_plans():
    """Plan every call anew: for whoever changes what plans are made from, such as the threshold for splitting work."""
    for operation in _operations:
        operation.plans.clear()
        operation.recorded.clear()
