"""How activations are given to a GPU backend's kernels: 16 bytes at a time where the arrays begin at a multiple of 16.

run(place, blocks, *arrays, slope, count, vectors, code): the backend's kernel. engine_of: from a place to its engine.
"""

from tilewise.kernels.channel_plan import THREADS, ceil_div

# Their numbers in the kernels (cuda/epilogue.py, cupy/src/activation.cuh).
NONE, RELU, LEAKY_RELU, SIGMOID, TANH, STEP, SIGN, RELU6 = range(8)
# The activations that conv2d, linear and batch_norm apply to their result.
ACTIVATION_CODES = {
    None: NONE, "relu": RELU, "relu6": RELU6, "leaky_relu": LEAKY_RELU, "sigmoid": SIGMOID, "tanh": TANH
}  # fmt: skip
LEAKY_SLOPE = 0.01

# Vectors a thread takes at most: enough bytes under way to hide the memory's latency, few enough blocks to start.
_EACH = 4
_ROUNDS = 64  # blocks of a multiprocessor at most: about eight rounds of what it runs at once


def whole_vectors(count: int, *arrays) -> int:
    """How many vectors of 16 bytes the arrays (or None) have; none where one does not begin at a multiple of 16."""
    if any(a is not None and a.pointer % 16 for a in arrays):
        return 0
    return count * arrays[0].dtype.itemsize // 16


def blocks_for(count: int, engine) -> int:
    return max(1, min(ceil_div(count, THREADS * _EACH), _ROUNDS * engine.multiprocessors))


def _start(run, engine_of, arrays: tuple, slope: float, code: int):
    count, place = arrays[0].size, arrays[0].place
    if count:
        vectors = whole_vectors(count, *arrays)
        run(place, blocks_for(vectors or count, engine_of(place)), *arrays, slope, count, vectors, code)


def forward(run, engine_of, code: int, x):
    y = x.place.empty(x.shape, x.dtype)
    _start(run, engine_of, (x, y), 0.0, code)
    return y


def backward(run, engine_of, code: int, grad, y):
    result = y.place.empty(y.shape, y.dtype)
    _start(run, engine_of, (grad, y, result), 0.0, code)
    return result


def sloped_forward(run, engine_of, code: int, x, *, negative_slope):
    y = x.place.empty(x.shape, x.dtype)
    _start(run, engine_of, (x, y), negative_slope, code)
    return y


def sloped_backward(run, engine_of, code: int, grad, y, *, negative_slope):
    result = y.place.empty(y.shape, y.dtype)
    _start(run, engine_of, (grad, y, result), negative_slope, code)
    return result
