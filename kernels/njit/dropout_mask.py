"""Dropout and its gradient inside @njit: native."""

import numpy as np

from tilewise.kernels import dropout_mask
from tilewise.kernels.njit.arguments import WrongShape, check_arrays, check_integer, check_number, check_unsupported
from tilewise.kernels.njit.linking import call_kernel, contiguous, shaped

_forward = dropout_mask.dropout


def _check(name: str, operand: str, x, p, seed, call, out):
    check_arrays(name, **{operand: x})
    check_number(name, p=p)
    check_integer(name, seed=seed, call=call)
    check_unsupported(name, out=out)


def dropout(x, p=0.5, seed=None, call=0, out=None):
    _check("dropout", "x", x, p, seed, call, out)

    def implementation(x, p=0.5, seed=None, call=0, out=None):
        share = float(p)
        if not 0 <= share <= 1:
            raise WrongShape("dropout: p must be from 0 to 1, got {}", share)
        if seed < 0 or call < 0:
            raise WrongShape("dropout: seed and call must be at least 0, got {} and {}", seed, call)
        # as kernels/dropout_mask.py has them
        threshold = np.int64(min(np.rint(share * 4294967296.0), 4294967295.0))
        scale = 1 / (1 - share) if share < 1 else 0.0
        source, y = contiguous(x), np.empty(x.shape, x.dtype)
        operands = shaped(source, (x.size,)), shaped(y, (x.size,))
        call_kernel("cpu.dropout_mask.drop", (*operands, threshold, scale, np.int64(seed), np.int64(call)))
        return y

    return implementation


def dropout_backward(grad, p=0.5, seed=None, call=0, out=None):
    _check("dropout_backward", "grad", grad, p, seed, call, out)
    return lambda grad, p=0.5, seed=None, call=0, out=None: _forward(grad, p, seed, call)
