"""Arrays that end where memory ends: reading or writing beyond them kills the process. For processes of their own."""

import ctypes
import math
import mmap

import numpy as np


def fenced(shape, dtype=np.float32):
    size = math.prod(shape) * np.dtype(dtype).itemsize
    page = mmap.PAGESIZE
    pages = size // page + 1
    memory = mmap.mmap(-1, (pages + 1) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start + pages * page), page, 0) == 0
    return np.frombuffer(memory, dtype, math.prod(shape), pages * page - size).reshape(shape)


def fenced_copy(x):
    result = fenced(x.shape, x.dtype)
    result[...] = x
    return result
