"""The inner loop of 3x3 depthwise convolutions that keep the image's size, as vector code: every input is loaded once.

A loop slides along one axis of the image. At each place it loads the three vectors across, adds each to the three
outputs it belongs to, and stores the output that is whole:

    place k:   y[k - 1] = a + w[2] . x[k]      a, b: the sums so far of two outputs, in registers
               a = b + w[1] . x[k]
               b = bias + w[0] . x[k]

NCHW: down the rows; the vectors across are a row's own and the ones an element to the left and to the right, whose
lanes outside of the image are zero by their masks. Three loads serve nine products, and nothing is copied.

NHWC: sliding along a row's pixels would touch memory in steps of a pixel, 2 KB and more, which the processor does not
follow: 0.5 ms where tiles take 0.25 (8 images of 14x14 pixels and 512 channels, Zen 4). So a tile of pixels is computed
for one vector of channels after the other, as in depthwise_vector.py, but also at the image's borders: the columns
beyond are masked, the rows beyond are read from zeros.
"""

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tilewise.kernels.cpu.depthwise_strip import AHEAD
from tilewise.kernels.cpu.simd import _I64, _Emitter, _literal, emit_prefetch

SIZE = 3
# Elements of y from where it is written to where it will be.
WRITE_AHEAD = 512


@intrinsic
def slide_plane(typingctx, x, first, width, numbers, weights, bias, y, rows):
    """y[i * width + c] = bias[0] + sum over taps of weight * x, for i < rows and a vector of columns c from `first` on.

    x, y: pointers to the vector's place in the planes' first rows, `width` long. numbers: int64, which weight tap
    (r, s) has, rows of taps first. Where a row is shorter than a vector, what is beyond it is neither read nor written.
    """
    signature = types.void(x, types.intp, types.intp, numbers, weights, bias, y, types.intp)

    def codegen(context, builder, signature, args):
        x, first, width, numbers, weights, bias, y, rows = args
        emit = _Emitter(builder, signature.args[0].dtype)
        lines = []
        for s in range(SIZE):
            off = builder.add(first, _I64(s - 1))  # the column that lane 0 reads
            mask = emit.mask(builder.neg(off), builder.sub(width, off))
            lines.append((builder.gep(x, [_I64(s - 1)]), mask))
        factors = [
            emit.splat(builder.load(builder.gep(weights, [builder.load(builder.gep(numbers, [_I64(t)]))])))
            for t in range(SIZE**2)
        ]
        shift = emit.splat(builder.load(bias))
        stored = emit.mask(_I64(0), builder.sub(width, first))
        _slide(emit, lines, factors, shift, y, width, rows, stored)
        return context.get_dummy_value()

    return signature, codegen


def _slide(emit, lines, factors, shift, y, step, count, stored):
    """lines: three of (pointer, mask), places `step` apart in them and in y. factors: tap (a, b) at 3 a + b, a along
    the way, b across."""
    builder = emit.builder

    def load(k):
        place = builder.mul(k, step)
        return [emit.masked_load(pointer, place, mask) for pointer, mask in lines]

    def add(a, values, total):
        for b, value in enumerate(values):
            total = emit.multiply_add(factors[a * SIZE + b], value, total)
        return total

    def store(value, k):
        place = builder.mul(k, step)
        emit_prefetch(builder, builder.gep(y, [builder.add(place, _I64(WRITE_AHEAD))]), write=True)
        emit.masked_store(value, y, place, stored)

    values = load(_I64(0))
    first = _I64(1), add(1, values, shift), add(0, values, shift)
    entry = builder.block
    loop, done = builder.append_basic_block("slide"), builder.append_basic_block("slid")
    builder.cbranch(builder.icmp_signed(">", count, _I64(1)), loop, done)
    builder.position_at_end(loop)
    now = [builder.phi(value.type) for value in first]
    k, older, newer = now
    values = load(k)
    emit_prefetch(builder, builder.gep(lines[1][0], [builder.add(builder.mul(k, step), _I64(AHEAD // emit.itemsize))]))
    store(add(2, values, older), builder.sub(k, _I64(1)))
    after = builder.add(k, _I64(1)), add(1, values, newer), add(0, values, shift)
    latch = builder.block
    builder.cbranch(builder.icmp_signed("<", after[0], count), loop, done)
    builder.position_at_end(done)
    last = builder.phi(emit.vector)
    for phi, value, following in zip((*now, last), (*first, first[1]), (*after, after[1]), strict=True):
        phi.add_incoming(value, entry)
        phi.add_incoming(following, latch)
    store(last, builder.sub(count, _I64(1)))


@intrinsic(prefer_literal=True)
def slide_products(typingctx, taps, sums, x, grad, first, width, numbers, rows):
    """sums[t] += sum over i of grad[i, c] * x[i + r - 1, c + s - 1] for tap t = (r, s), lane by lane; sums[9] += grad.

    For i < rows, at least 2, and a vector of columns c from `first` on; x, grad: pointers to its place in the planes'
    first rows, `width` long. sums: a vector for each number of a tap. taps: a literal, 9, or 0 for the sum of grad
    alone, by the same additions.
    """
    with_taps = _literal(taps) > 0
    signature = types.void(taps, sums, x, grad, types.intp, types.intp, numbers, types.intp)

    def codegen(context, builder, signature, args):
        sums, x, grad, first, width, numbers, rows = args[1:]
        emit = _Emitter(builder, signature.args[1].dtype)
        used = emit.mask(_I64(0), builder.sub(width, first))
        lines = []
        for s in range(SIZE if with_taps else 0):
            off = builder.add(first, _I64(s - 1))
            inside = emit.mask(builder.neg(off), builder.sub(width, off))
            # beyond the used lanes there is image to the left, which must not meet grad's zeros: it may be infinite
            lines.append((builder.gep(x, [_I64(s - 1)]), builder.and_(inside, used)))
        places = [builder.load(builder.gep(numbers, [_I64(t)])) for t in range(SIZE**2 if with_taps else 0)]
        places = [builder.mul(place, _I64(emit.lanes)) for place in [*places, _I64(SIZE**2)]]
        before = [emit.load(sums, place) for place in places]
        results = _sum_products(emit, lines, (grad, used), width, rows, before)
        for place, value in zip(places, results, strict=True):
            emit.store(value, sums, place)
        return context.get_dummy_value()

    return signature, codegen


def _sum_products(emit, lines, grad, step, count, totals):
    """totals: of the nine taps, if there are lines, and of grad itself."""
    builder, (grad, used) = emit.builder, grad

    def add(k, grads, totals):
        """grads: of the places around k, by tap along the way; None where there is none."""
        totals = list(totals)
        place = builder.mul(k, step)
        values = [emit.masked_load(pointer, place, mask) for pointer, mask in lines]
        for a, factor in enumerate(grads):
            for b, value in enumerate(values if factor is not None else ()):
                totals[a * SIZE + b] = emit.multiply_add(factor, value, totals[a * SIZE + b])
        return [*totals[:-1], emit.add(totals[-1], grads[1])]

    def load(k):
        return emit.masked_load(grad, builder.mul(k, step), used)

    here, after = load(_I64(0)), load(_I64(1))
    first = [_I64(1), here, after, *add(_I64(0), (after, here, None), totals)]
    last = builder.sub(count, _I64(1))
    entry = builder.block
    loop, done = builder.append_basic_block("products"), builder.append_basic_block("summed")
    builder.cbranch(builder.icmp_signed("<", _I64(1), last), loop, done)
    builder.position_at_end(loop)
    now = [builder.phi(value.type) for value in first]
    k, before, here, *sums = now
    next_k = builder.add(k, _I64(1))
    after = load(next_k)
    for pointer in (lines[1][0], grad) if lines else (grad,):
        far = builder.add(builder.mul(k, step), _I64(AHEAD // emit.itemsize))
        emit_prefetch(builder, builder.gep(pointer, [far]))
    following = [next_k, here, after, *add(k, (after, here, before), sums)]
    builder.cbranch(builder.icmp_signed("<", next_k, last), loop, done)
    builder.position_at_end(done)
    final = [builder.phi(value.type) for value in first]
    for both in (now, final):
        for phi, value, again in zip(both, first, following, strict=True):
            phi.add_incoming(value, entry)
            phi.add_incoming(again, loop)
    k, before, here, *sums = final
    return add(k, (None, here, before), sums)


@intrinsic(prefer_literal=True)
def tile_pixels(
    typingctx,
    rows,
    columns,
    alike,
    x,
    row,
    pixel,
    above,
    below,
    left,
    right,
    zeros,
    weights,
    bias,
    y,
    y_row,
    y_pixel,
    count,
):  # fmt: skip
    """y[i, j, c] = bias[c] + sum over taps of weight * x, for i < rows, j < columns and c < count.

    rows, columns: literals, of the tile. x, y: pointers to its first pixel, with how far apart rows and pixels are in
    each; alike: a literal, 1 if equally far, which saves registers; 2 if whole vectors also go past the caches, to
    aligned places. above, below, left, right: whether there is image on that side; where there is no row, `zeros` is
    read, columns + 2 pixels. weights: in blocks of vectors, a vector for each tap.
    """
    shape = _literal(rows), _literal(columns), _literal(alike)
    index = types.intp
    signature = types.void(
        rows, columns, alike, x, index, index, index, index, index, index, zeros, weights, bias, y, index, index, index
    )  # fmt: skip

    def codegen(context, builder, signature, args):
        _Tile(builder, signature.args[3].dtype, shape, args[3:]).emit()
        return context.get_dummy_value()

    return signature, codegen


class _Tile:
    """The code of one `tile_pixels`."""

    def __init__(self, builder, element, shape, args):
        self.builder, self.vector = builder, _Emitter(builder, element)
        self.rows, self.columns, alike = shape
        self.past = alike == 2
        x, row, pixel, above, below, self.left, self.right, zeros, self.weights, self.bias, *places, self.count = args
        y, y_row, y_pixel = places
        if alike:
            y_row, y_pixel = row, pixel
        self.steps = [builder.mul(pixel, _I64(k)) for k in range(self.columns + 2)]
        self.inputs, self.outputs = [], []
        for r in range(-1, self.rows + 1):
            line = builder.gep(x, [builder.sub(builder.mul(row, _I64(r)), pixel)])
            if r in (-1, self.rows):
                there = builder.icmp_signed("!=", above if r < 0 else below, _I64(0))
                line = builder.select(there, line, zeros)
            self.inputs.append(line)
        for r in range(self.rows):
            self.outputs.append(builder.gep(y, [builder.mul(y_row, _I64(r))]))
        self.y_steps = [builder.mul(y_pixel, _I64(k)) for k in range(self.columns)]

    def emit(self):
        builder, lanes = self.builder, self.vector.lanes
        whole = builder.and_(self.count, _I64(-lanes))
        edges = [self.vector.mask(_I64(0), builder.mul(flag, _I64(lanes))) for flag in (self.left, self.right)]
        with cgutils.for_range_slice(builder, _I64(0), whole, _I64(lanes)) as (i, _):
            self._vector(i, None, edges)
        with builder.if_then(builder.icmp_signed("<", whole, self.count)):
            mask = self.vector.mask(_I64(0), builder.sub(self.count, whole))
            self._vector(whole, mask, [builder.and_(mask, edge) for edge in edges])

    def _load(self, pointer, offset, mask):
        return self.vector.load(pointer, offset) if mask is None else self.vector.masked_load(pointer, offset, mask)

    def _vector(self, i, mask, edges):
        """One vector of each pixel of the tile."""
        builder, vector = self.builder, self.vector
        at = builder.mul(i, _I64(SIZE**2))
        factors = [vector.load(self.weights, builder.add(at, _I64(t * vector.lanes))) for t in range(SIZE**2)]
        shift = self._load(self.bias, i, mask)
        sums = [[shift] * self.columns for _ in range(self.rows)]
        for r, line in enumerate(self.inputs):
            line = builder.gep(line, [i])
            for k, step in enumerate(self.steps):
                value = self._load(line, step, edges[0] if k == 0 else edges[1] if k > self.columns else mask)
                for p, a in ((p, r - p) for p in range(self.rows) if 0 <= r - p < SIZE):
                    for q, b in ((q, k - q) for q in range(self.columns) if 0 <= k - q < SIZE):
                        sums[p][q] = vector.multiply_add(factors[a * SIZE + b], value, sums[p][q])
        for line, values in zip(self.outputs, sums, strict=True):
            line = builder.gep(line, [i])
            for step, value in zip(self.y_steps, values, strict=True):
                if mask is not None:
                    vector.masked_store(value, line, step, mask)
                elif self.past:
                    vector.store_past(value, line, step)
                else:
                    vector.store(value, line, step)
