"""An operation some of whose operands are given once, for many calls: weights that are packed beforehand."""

from collections.abc import Callable
from threading import Lock
from typing import Any

import numpy as np

from tilewise.kernels.dispatch import Operation, Plan


class Bound(Operation):
    """`Operation`, where a call gives only the operands named; the constants come behind the first of them.

    constants: arrays, or None, in the dtype computed in (float32 for float16); nobody else may change them.
    packs: what a backend made of them, by the backend's own keys. Signatures share what they can.

    For a new signature, a backend's `bind_<op>` gives the function of the call's operands alone; without one, its
    ordinary function gets the constants each time.
    """

    def __init__(self, family: str, name: str, operands: tuple[str, ...], check: Callable, constants: tuple, **options):
        super().__init__(family, name, operands, check, **options)
        self.constants = constants
        self.packs: dict[Any, np.ndarray] = {}
        self.lock = Lock()

    def _new_plan(self, key, operands: tuple, options: tuple) -> Plan:
        with self.lock:  # two threads would pack the same weights twice
            plan = self.plans.get(key)
            return super()._new_plan(key, operands, options) if plan is None else plan

    def _all_shapes(self, shapes: list) -> list:
        return [shapes[0], *(None if a is None else a.shape for a in self.constants), *shapes[1:]]

    def _choose(self, choose: Callable, shapes: list, dtype, options: dict) -> tuple[str, dict[str, str]]:
        return choose(self._all_shapes(shapes), dtype, options, packed=True)

    def _implementation(self, module, dtype, shapes: list, options: dict) -> Callable:
        bind = getattr(module, f"bind_{self.name}", None)
        if bind is not None:
            return bind(self._all_shapes(shapes), dtype, *self.constants, self.packs, **options)
        function, constants = getattr(module, self.name), self.constants
        return lambda x, *others, out=None: function(x, *constants, *others, **options, out=out)
