"""Memory of large results, used again once their arrays are gone.

malloc gives blocks of 32 MB and more back to the system at once, so every such result starts on pages that are not
there: the system clears them first, and the clearing costs more than most kernels. On one thread, in ms, evaluation of
batch norm into 103 and 205 MB: 17 and 40 on fresh pages, 10.5 and 25 on used ones, 7 and 15 where used ones are written
past the caches. (On fresh pages that takes 28 and 55: what was just cleared is in the caches, and must leave them.)

    result -> all arrays on it are gone -> kept -> the next result of about that size
                                            | more than KEPT bytes are
                                            v
                                           lent to the system (MADV_FREE), but taken again where no kept one fits
                                            | more than MOST_IDLE bytes are kept or lent
                                            v
                                           given back, the longest idle first

The pages of what is lent belong to whoever needs them: under memory pressure the system takes them without writing them
anywhere, and the block's next use then costs what a fresh one would. Lending interrupts the other threads' cores, whose
tables of pages change: 0.2 to 0.35 ms a call on two threads, a quarter of a depthwise convolution. So the blocks used
last are not lent, about as much as malloc keeps as well. What is given back must be the longest idle: a program that
once had a gigabyte of results would otherwise start each later one of more than KEPT on fresh pages.
"""

import mmap
import os
import sys
from collections import deque

import numpy as np

# Bytes of a result from which on aligned memory, used before, is worth asking for: below it, a call would feel the
# microseconds that this costs. (Alignment alone saves a tenth of batch norm in training.) Below 32 MB malloc keeps some
# of what is freed, but not much: two weights of 8 MB that a call widened from float16 were cleared again in each one,
# 5 ms.
FROM = 1 << 22
HUGE_PAGE = 1 << 21  # blocks are whole ones: the system lays only those out so that all of their pages are huge
KEPT = 1 << 26
SLACK = 8  # a smaller result may leave an eighth of a block unused, or a huge page
AVAILABLE = sys.platform == "linux" and hasattr(mmap, "MADV_FREE") and hasattr(mmap, "MADV_HUGEPAGE")


def _most_idle() -> int:
    """Bytes that are kept at most: a gigabyte, or a sixteenth of the machine's memory."""
    if not AVAILABLE:
        return 0
    return min(1 << 30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 16)


MOST_IDLE = _most_idle()


class _Block:
    """Pages of our own; compared by identity, so that one can be taken out of a queue."""

    __slots__ = ("address", "memory", "size")

    def __init__(self, size: int):
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.size = size
        self.address = np.frombuffer(self.memory, np.uint8).ctypes.data


# The longest idle first; whatever was lent has been idle for longer than what is kept. Their operations are atomic:
# results die in any thread, at any allocation of Python's.
_lent: deque[_Block] = deque()
_kept: deque[_Block] = deque()


class _Lease:
    """What an array on a block holds on to; when the last view of it goes, so does this."""

    __slots__ = ("__array_interface__", "_block", "address", "used")

    def __init__(self, block: _Block, shape: tuple[int, ...], dtype: np.dtype, used: bool):
        self._block, self.address, self.used = block, block.address, used
        self.__array_interface__ = {
            "version": 3, "shape": shape, "typestr": dtype.str, "data": (block.address, False)
        }  # fmt: skip

    def __del__(self):
        _give_back(self._block)


def _give_back(block: _Block):
    if block.size > MOST_IDLE:
        return
    _kept.append(block)
    while _size(_kept) > KEPT:
        oldest = _oldest(_kept)
        if oldest:
            oldest.memory.madvise(mmap.MADV_FREE)
            _lent.append(oldest)
    while _size(_kept) + _size(_lent) > MOST_IDLE:
        _ = _oldest(_lent) or _oldest(_kept)


def _size(blocks: deque[_Block]) -> int:
    return sum(block.size for block in _snapshot(blocks))


def _snapshot(blocks: deque[_Block]) -> tuple[_Block, ...]:
    """What is in it now; a result that dies meanwhile, also by the collector in this thread, is no error."""
    while True:
        try:
            return tuple(blocks)
        except RuntimeError:  # "deque mutated during iteration"
            continue


def _oldest(blocks: deque[_Block]) -> _Block | None:
    """Taken out; None where another thread took the last."""
    try:
        return blocks.popleft()
    except IndexError:
        return None


def _take(size: int) -> _Block | None:
    """The idle block that was used last and fits."""
    for blocks in (_kept, _lent):
        for block in reversed(_snapshot(blocks)):
            if size <= block.size <= size + max(size // SLACK, HUGE_PAGE):
                try:
                    blocks.remove(block)
                except ValueError:  # another thread took it
                    continue
                return block
    return None


def empty(shape: tuple[int, ...], dtype: np.dtype, size: int) -> tuple[np.ndarray, bool]:
    """(an uninitialised array of `size` bytes, at least FROM; whether its memory has been used before)."""
    block = _take(size)
    used = block is not None
    if block is None:
        block = _Block(-(-size // HUGE_PAGE) * HUGE_PAGE)
    return np.asarray(_Lease(block, shape, dtype, used)), used


def is_used(array: np.ndarray) -> bool:
    """Whether it begins where an array of `empty`'s does, on memory that had been used before."""
    owner = array.base.base if isinstance(array.base, np.ndarray) else array.base
    return isinstance(owner, _Lease) and owner.used and array.ctypes.data == owner.address
