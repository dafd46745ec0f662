"""How optimisers' updates are given to a GPU backend's kernels (`run`): one launch a parameter, 16 bytes at a time.

engine_of: from a place to the backend's engine there.
"""

from tilewise.kernels.activation_plan import blocks_for, whole_vectors


def _update(run, engine_of, arrays: tuple, *numbers):
    param = arrays[0]
    if not param.size:
        return
    vectors = whole_vectors(param.size, *arrays)
    run(param.place, blocks_for(vectors or param.size, engine_of(param.place)), *arrays, param.size, vectors, *numbers)


def sgd_step(run, engine_of, param, grad, velocity, *, nesterov, lr, momentum, weight_decay):
    flags = velocity is not None, nesterov
    _update(run, engine_of, (param, grad, velocity), *flags, lr, momentum, weight_decay)


def adagrad_step(run, engine_of, param, grad, square, *, lr, eps, weight_decay):
    _update(run, engine_of, (param, grad, square, None), 0, lr, 1.0, 1.0, eps, 0.0, weight_decay)


def rmsprop_step(run, engine_of, param, grad, square, velocity, *, lr, alpha, eps, momentum, weight_decay):
    numbers = velocity is not None, lr, alpha, 1 - alpha, eps, momentum, weight_decay
    _update(run, engine_of, (param, grad, square, velocity), *numbers)


def adam_step(run, engine_of, param, grad, mean, square, *, first, second, eps, weight_decay, rate, scale, kept):
    numbers = first, 1 - first, second, 1 - second, eps, weight_decay, rate, scale, kept
    _update(run, engine_of, (param, grad, mean, square), *numbers)
