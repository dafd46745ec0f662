"""Dropout: which elements are dropped is a function of a seed, a call's number and each element's place alone."""

from contextvars import ContextVar

from tilewise.kernels.arrays import common_dtype
from tilewise.kernels.operation import Operation, Problem
from tilewise.kernels.shapes import integer, probability

_WORD = 2**32


def dropout(x, p=0.5, *, seed, call=0, out=None):
    """0 with probability p, else x / (1 - p) (Srivastava et al. 2014, in the inverted form: inference is the identity).

    Element i in C order is dropped where its random number is below p * 2^32. Numbers are 32 bits from a counter-based
    generator, Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"): word
    i % 4 of the block at the counter (i // 4, call) and the key `seed`, each of 64 bits, the lower 32 first. So the
    choice is the same in every dtype, whatever x's strides, on any device and any number of threads, and needs no
    memory. A dropped NaN or infinity is NaN, as in PyTorch.

    Args:
        x: an array of float16, float32 or float64, on a GPU also bfloat16, of any shape and strides.
        p: the probability, from 0 to 1; a multiple of 2^-32 is exact. 1 drops everything.
        seed: the generator's key, from 0 to 2^64 - 1.
        call: from 0 to 2^64 - 1: each step of a training, and each layer of one seed, takes another.
        out: an array for the result, of x's shape and dtype; may be x.

    Returns:
        An array of x's kind, shape and dtype.

    Raises:
        TypeError: x is not an array, or not of these dtypes; p is not a number; seed or call is not an int.
        ValueError: p, seed or call is out of its range; `out` has another shape or dtype, or overlaps x.
    """
    return _DROPOUT.draw(x, p, seed, call, out)


def dropout_backward(grad, p=0.5, *, seed, call=0, out=None):
    """The gradient of the loss with respect to x, from that with respect to y: the same choice, the same scale.

    The arguments are those of the forward, which are all that it needs. Raises as `dropout`.
    """
    return _DROPOUT_BACKWARD.draw(grad, p, seed, call, out)


def _bits(function: str, name: str, value) -> int:
    """A number of 64 bits as one with a sign, which is what kernels take."""
    number = integer(function, name, value, minimum=0)
    if number >> 64:
        raise ValueError(f"{function}: {name} must be below 2**64, got {value}")
    return number - (number >> 63 << 64)


# The seed and the call's number of the call that runs in this context.
_drawn: ContextVar[tuple[int, int]] = ContextVar("tilewise_dropout_seed_and_call")


class _Drawing(Operation):
    """An operation whose seed and call change from call to call, and so belong to no plan."""

    replayable = False

    def draw(self, x, p, seed, call, out):
        token = _drawn.set((_bits(self.name, "seed", seed), _bits(self.name, "call", call)))
        try:
            return self.call((x,), (p,), out)
        finally:
            _drawn.reset(token)

    def _implementation(self, module, dtype, shapes: list, options: dict):
        prepare = getattr(module, "prepare_dropout", None)
        function = prepare(shapes, dtype, **options) if prepare else None

        def run(x, out=None):
            seed, call = _drawn.get()
            if function is not None:
                return function(x, seed, call, out)
            result = module.dropout(x, seed=seed, call=call, **options)
            if out is None:
                return result
            out[...] = result
            return out

        return run


def _operation(name: str, operand: str) -> _Drawing:
    def check(x, p) -> Problem:
        dtype = common_dtype(name, {operand: x})
        p = probability(name, "p", p)
        # 2^32 does not fit a word: of p = 1 the scale drops what the threshold lets pass
        options = {"threshold": min(round(p * _WORD), _WORD - 1), "scale": 1 / (1 - p) if p < 1 else 0.0}
        return Problem(options, flops=x.size, bytes=2 * x.size * dtype.itemsize, out=(x.shape, dtype))

    return _Drawing("dropout_mask", name, (operand,), check, in_place=(0,), elementwise=True)


_DROPOUT, _DROPOUT_BACKWARD = _operation("dropout", "x"), _operation("dropout_backward", "grad")
