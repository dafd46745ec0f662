"""Numba's inlining of device functions, without what makes it slow."""

import copy
from contextlib import contextmanager
from typing import Any

try:
    from numba.cuda.core import ir  # pyright: ignore[reportMissingImports]
except ImportError:  # another release of numba-cuda than the extras ask for
    ir: Any = None


def _copy_block(self, memo):
    """A block whose variables belong to the same scope as the original's.

    Numba drops the original, but copies with every block the scope, which has all variables of the function: a
    large part of the time that a large kernel takes to compile, and the same code.
    """
    memo[id(self.scope)] = self.scope
    block = memo[id(self)] = ir.Block(self.scope, self.loc)
    block.body = [copy.deepcopy(statement, memo) for statement in self.body]
    return block


@contextmanager
def quick_inlining():
    """Inside, blocks are copied so; in all threads, to which it makes no other difference."""
    if ir is None or hasattr(ir.Block, "__deepcopy__"):  # entered already, or Numba has its own
        yield
        return
    ir.Block.__deepcopy__ = _copy_block
    try:
        yield
    finally:
        del ir.Block.__deepcopy__
