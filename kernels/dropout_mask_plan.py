"""How dropout is given to a GPU backend's kernel (`run`): one launch, 16 bytes at a time.

engine_of: from a place to the backend's engine there.
"""

from tilewise.kernels.activation_plan import blocks_for, whole_vectors


def dropout(run, engine_of, x, *, threshold, scale, seed, call):
    y = x.place.empty(x.shape, x.dtype)
    if x.size:
        vectors = whole_vectors(x.size, x, y)
        blocks = blocks_for(vectors or x.size, engine_of(x.place))
        run(x.place, blocks, x, y, scale, threshold, seed, call, x.size, vectors)
    return y


def dropout_backward(run, engine_of, grad, *, threshold, scale, seed, call):
    """The same for the gradient: nothing of the mask was kept."""
    return dropout(run, engine_of, grad, threshold=threshold, scale=scale, seed=seed, call=call)
