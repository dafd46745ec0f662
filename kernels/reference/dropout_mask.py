"""Dropout in NumPy, and its random numbers: Philox4x32-10 as Salmon et al. (2011) write it down."""

import numpy as np

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85  # what a round adds to the two words of the key
_LOW, _HALF = np.uint64(2**32 - 1), np.uint64(32)


def philox(counter, key: tuple[int, int], rounds: int = 10) -> np.ndarray:
    """Philox4x32: (n, 4) uint32 numbers for n counters of four 32-bit words, (n, 4), and one key of two."""
    a, b, c, d = np.asarray(counter, np.uint64).T
    for i in range(rounds):
        first, second = _MULTIPLIERS[0] * a, _MULTIPLIERS[1] * c
        keys = [np.uint64((word + i * weyl) % 2**32) for word, weyl in zip(key, _WEYL, strict=True)]
        a, b, c, d = (second >> _HALF) ^ b ^ keys[0], second & _LOW, (first >> _HALF) ^ d ^ keys[1], first & _LOW
    return np.stack([a, b, c, d], axis=-1).astype(np.uint32)


def numbers(count: int, seed: int, call: int) -> np.ndarray:
    """The number of each of `count` elements: word i % 4 of the block i // 4.

    Block j is Philox at the counter (j, j >> 32, call, call >> 32) and the key (seed, seed >> 32), 32 bits of each. A
    seed or call may be negative, which stands for its 64 bits.
    """
    counter = np.empty((-(-count // 4), 4), np.uint64)
    blocks = np.arange(len(counter), dtype=np.uint64)
    counter[:, 0], counter[:, 1] = blocks & _LOW, blocks >> _HALF
    counter[:, 2:] = call % 2**32, (call >> 32) % 2**32
    return philox(counter, (seed % 2**32, (seed >> 32) % 2**32)).reshape(-1)[:count]


def dropout(x, *, threshold, scale, seed, call):
    kept = numbers(x.size, seed, call).reshape(x.shape) >= threshold
    with np.errstate(invalid="ignore"):  # a dropped infinity is NaN
        return x * np.where(kept, x.dtype.type(scale), x.dtype.type(0))


def dropout_backward(grad, *, threshold, scale, seed, call):
    """The same for the gradient: nothing of the mask was kept."""
    return dropout(grad, threshold=threshold, scale=scale, seed=seed, call=call)
