"""The tile of results that a block of an implicit product computes: a matrix of outputs x pixels (or of outputs x taps).

Operands are staged in shared memory, STEP rows of the sum at a time, twice: while one pair is multiplied, the next is
loaded into registers. A thread owns 8 x 8 results, two groups of four along each side, half a tile apart, so that its
operands come by 128-bit loads and neighbouring threads' addresses lie side by side:

                 right 0..3 ....... half + 0..3 ....           for each row of the sum: 16 numbers loaded,
    left 0..3     [4 x 4]             [4 x 4]                   64 multiplied and added
    half + 0..3   [4 x 4]             [4 x 4]
"""

from tilewise.kernels.cuda.launch import device
from tilewise.kernels.cuda.ptx import at, lanes, load_vector, store_vector, zero

STEP = 8  # rows of the sum at a time
SIDE = 8  # results of a thread along each side
AREA = SIDE * SIDE


@device
def clear(totals, like):
    for k in range(AREA):
        totals[k] = zero(like)


@device
def load_four(target, source, index):
    """target[0 .. 3] = source[index ...], from a multiple of 16 bytes; numbers of 4 or 8 bytes."""
    width = lanes(source)
    for k in range(0, 4, width):
        load_vector(at(target, k), source, index + k)


@device
def store_four(target, index, source):
    """target[index ...] = source[0 .. 3], to a multiple of 16 bytes; numbers of 4 or 8 bytes."""
    width = lanes(target)
    for k in range(0, 4, width):
        store_vector(target, index + k, at(source, k))


@device
def multiply(totals, lefts, left, left_row, left_half, rights, right, right_row, right_half, a, b):
    """totals += the product of STEP rows: lefts[k * left_row + left ...] by rights[k * right_row + right ...].

    a, b: registers for 8 numbers of each.
    """
    for k in range(STEP):
        load_four(a, lefts, left + k * left_row)
        load_four(at(a, 4), lefts, left + k * left_row + left_half)
        load_four(b, rights, right + k * right_row)
        load_four(at(b, 4), rights, right + k * right_row + right_half)
        for i in range(SIDE):
            for j in range(SIDE):
                totals[i * SIDE + j] += a[i] * b[j]
