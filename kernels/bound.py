"""An operation some of whose operands are given once, for many calls: weights that are packed beforehand."""

from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any

import numpy as np

from tilewise.kernels.operation import Operation, Plan


class Constants:
    """What is given once.

    arrays: by the operand's name, in the dtype computed in (float32 for float16); nobody else may change them. None, or
        a name that is missing, is an operand that is absent.
    packs: what a backend made of them, by its own keys: NumPy arrays, on a GPU DeviceArrays; signatures and operations
        share what they can.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray | None]):
        self.arrays = arrays
        self.packs: dict[Any, Any] = {}
        self.lock = Lock()

    @property
    def nbytes(self) -> int:
        kept = (*self.arrays.values(), *self.packs.values())
        return sum(a.nbytes for a in kept if a is not None)


class Bound(Operation):
    """`operation`, where a call gives only the operands named.

    For a new signature, a backend's `bind_<op>` gives the function of the call's operands alone; without one, its
    ordinary function gets the constants each time.
    """

    def __init__(self, operation: Operation, operands: tuple[str, ...], check: Callable, constants: Constants):
        all_names = operation.operands
        self.places = [all_names.index(name) for name in operands]
        in_place = tuple(i for i, place in enumerate(self.places) if place in operation.in_place)
        super().__init__(operation.family, operation.name, operands, check, in_place=in_place)
        self.constants = constants
        self.fixed = [constants.arrays.get(name) for name in all_names]

    def _new_plan(self, key, operands: tuple, options: tuple) -> Plan:
        with self.constants.lock:  # two threads would pack the same weights twice
            plan = self.plans.get(key)
            return super()._new_plan(key, operands, options) if plan is None else plan

    def _all_shapes(self, shapes: list) -> list:
        return _filled([None if a is None else a.shape for a in self.fixed], self.places, shapes)

    def _choose(self, choose: Callable, shapes: list, dtype, options: dict) -> tuple[str, dict[str, str]]:
        return choose(self._all_shapes(shapes), dtype, options, packed=True)

    def _implementation(self, module, dtype, shapes: list, options: dict) -> Callable:
        bind = getattr(module, f"bind_{self.name}", None)
        if bind is not None:
            return bind(self._all_shapes(shapes), dtype, self.constants.arrays, self.constants.packs, **options)
        # not self: a plan that held its operation would keep both alive until the garbage collector comes
        function, fixed, places = getattr(module, self.name), self.fixed, self.places
        return lambda *given, out=None: function(*_filled(fixed, places, given), **options, out=out)


def _filled(fixed: list, places: list[int], given: Sequence) -> list:
    """All operands, in the order of the backend's function."""
    filled = list(fixed)
    for place, value in zip(places, given, strict=True):
        filled[place] = value
    return filled
