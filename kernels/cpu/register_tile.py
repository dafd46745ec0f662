"""What the register tiles of convolutions are emitted with: accumulators, loops, the rows of an operand.

A tile keeps rows x vectors accumulators in registers over its whole sum, as `simd.micro_kernel` does; the kernels built
from it read their operands where they lie, without packing, and differ in how an operand is found:

- offset_kernel.py: the vectors of step k start at b[offsets[k]]: neighbouring pixels of one tap (conv_nchw.py).
- row_kernel.py: row i of the left operand starts at a[bases[i]], anywhere: one pixel's channels (conv_nhwc.py), one
  tap's pixels (conv_weight.py).
- panel_kernel.py: both lie as in a matrix, and the first tile packs the right one (conv_pointwise.py).
"""

from tilewise.kernels.cpu.simd import _I64


class Tile:
    """rows x vectors accumulators that pass through loops as phi nodes."""

    def __init__(self, emit, rows, vectors):
        self.emit, self.builder = emit, emit.builder
        self.rows, self.vectors = rows, vectors

    def start(self, c, c_step, accumulate):
        """C itself where accumulate is not 0, else zeros; ends in a new block."""
        builder, emit = self.builder, self.emit
        reading, clearing = builder.append_basic_block("read_tile"), builder.append_basic_block("clear_tile")
        begin = builder.append_basic_block("begin")
        builder.cbranch(builder.icmp_signed("!=", accumulate, _I64(0)), reading, clearing)
        builder.position_at_end(reading)
        old = [emit.load(c, self._place(c_step, i, j)) for i in range(self.rows) for j in range(self.vectors)]
        builder.branch(begin)
        builder.position_at_end(clearing)
        builder.branch(begin)
        builder.position_at_end(begin)
        values = []
        for value in old:
            phi = builder.phi(emit.vector)
            phi.add_incoming(value, reading)
            phi.add_incoming(emit.zero, clearing)
            values.append(phi)
        return values

    def _place(self, c_step, i, j):
        return self.builder.add(self.builder.mul(c_step, _I64(i)), _I64(j * self.emit.lanes))

    def phis(self, values, block):
        phis = [self.builder.phi(self.emit.vector) for _ in values]
        self.extend(phis, values, block)
        return phis

    @staticmethod
    def extend(phis, values, block):
        for phi, value in zip(phis, values, strict=True):
            phi.add_incoming(value, block)

    def step(self, values, row_values, vectors):
        """One step of the sum: values + (column of row_values) x (row of vectors)."""
        total = []
        for i, scalar in enumerate(row_values):
            row = self.emit.splat(self.builder.load(scalar))
            total += [self.emit.multiply_add(row, v, values[i * self.vectors + j]) for j, v in enumerate(vectors)]
        return total

    def finish(self, values, c, c_step):
        for i in range(self.rows):
            for j in range(self.vectors):
                self.emit.store(values[i * self.vectors + j], c, self._place(c_step, i, j))

    def loads(self, pointer):
        return [self.emit.load(pointer, _I64(j * self.emit.lanes)) for j in range(self.vectors)]


class Loop:
    """for (i = 0; i < end; i += step): `i`, and pointers that advance with it, between `begin` and `close`."""

    def __init__(self, builder, end, step, name):
        self.builder, self.end, self.step, self.name = builder, end, _I64(step), name

    def begin(self, *advancing):
        """advancing: pairs of a pointer and its step. Returns what they are in this round; end > 0 is assumed."""
        builder, entry = self.builder, self.builder.block
        self.top = builder.append_basic_block(self.name)
        builder.branch(self.top)
        builder.position_at_end(self.top)
        self.i = builder.phi(_I64)
        self.i.add_incoming(_I64(0), entry)
        self.moving = [(builder.phi(pointer.type), step) for pointer, step in advancing]
        for (phi, _), (pointer, _) in zip(self.moving, advancing, strict=True):
            phi.add_incoming(pointer, entry)
        return self.i, *(phi for phi, _ in self.moving)

    def close(self):
        builder = self.builder
        following = builder.add(self.i, self.step)
        self.i.add_incoming(following, builder.block)
        for phi, step in self.moving:
            phi.add_incoming(builder.gep(phi, [step]), builder.block)
        after = builder.append_basic_block(f"after_{self.name}")
        builder.cbranch(builder.icmp_signed("<", following, self.end), self.top, after)
        builder.position_at_end(after)


def row_pointers(tile, a, a_step, count):
    """Where the rows of a tile begin in the left operand; those that do not exist repeat the last."""
    builder, last, pointers = tile.builder, tile.builder.sub(count, _I64(1)), []
    for i in range(tile.rows):
        row = builder.select(builder.icmp_signed("<", _I64(i), last), _I64(i), last)
        pointers.append(builder.gep(a, [builder.mul(row, a_step)]))
    return pointers


class Bounds:
    """Keeps results between 0 and inf (bounds = 1, relu) or 0 and 6 (2, relu6); 0 lets all pass."""

    def __init__(self, emit, bounds):
        builder, infinite = emit.builder, float("inf")
        self.emit = emit
        low, high = builder.icmp_signed(">", bounds, _I64(0)), builder.icmp_signed(">", bounds, _I64(1))
        self.floor = emit.splat(builder.select(low, emit.scalar(0), emit.scalar(-infinite)))
        self.ceiling = emit.splat(builder.select(high, emit.scalar(6), emit.scalar(infinite)))

    def apply(self, value):
        """A NaN stays one."""
        return self.emit.minimum(self.ceiling, self.emit.maximum(self.floor, value))
