"""The activations of an epilogue, of whole rows, in explicit vectors; the formulas are those of epilogue.py.

Loops that LLVM vectorises by itself cost more to compile than the rest of many a kernel: there were five of them, each
unrolled, with a scalar loop behind. These are one vector wide, and the last vector has a mask.

Whoever calls this is compiled without reassociation, which would cancel the additions that round to an integer.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tilewise.kernels.cpu.simd import _I64
from tilewise.kernels.cpu.vector_pass import Pass

# The activations that conv2d, linear and batch_norm apply to their result, as their kernels know them.
ACTIVATION_CODES = {None: 0, "relu": 1, "relu6": 2, "leaky_relu": 3, "sigmoid": 4, "tanh": 5}
BOUNDED = 2  # codes up to here at most keep a result between two numbers (register_tile.Bounds), in a vector or two
LEAKY_SLOPE = 0.01

# For exp, see epilogue.py: (what rounds to an integer, 1 / ln 2, the head and the tail of ln 2), and the coefficients
# of e^r from r^2 on; then the arguments at which the exponential is already 0 and already infinite.
SINGLE = (
    (1.5 * 2**23 + 127, 1.4426950408889634, 0.693359375, -2.12194440054690583e-4),
    (0.49999993, 0.16666521, 0.04166839, 0.00836873, 0.00138146),
)
DOUBLE = (
    (1.5 * 2.0**52 + 1023, 1.4426950408889634, 6.93147180369123816490e-01, 1.90821492927058770002e-10),
    (
        1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 720, 1 / 5040, 1 / 40320, 1 / 362880, 1 / 3628800, 1 / 39916800,
        1 / 479001600, 1 / 6227020800,
    ),
)  # fmt: skip
SINGLE_RANGE, DOUBLE_RANGE = (-88.0, 89.0), (-709.0, 710.0)


class _Elementary(Pass):
    """Activations of one vector, and the exponential behind them."""

    def __init__(self, builder, element):
        super().__init__(builder, element)
        self.single = self.itemsize == 4

    def number(self, value):
        return ir.Constant(self.vector, [value] * self.lanes)

    def where(self, sign, a, b, then, otherwise):
        return self.builder.select(self.builder.fcmp_ordered(sign, a, b), then, otherwise)

    def clamped(self, x, lowest, highest):
        """A NaN stays one."""
        low, high = self.number(lowest), self.number(highest)
        x = self.where("<", x, low, low, x)
        return self.where(">", x, high, high, x)

    def expm1_parts(self, x):
        """(e^r - 1, 2^n)."""
        add, sub, mul = self.builder.fadd, self.builder.fsub, self.builder.fmul
        (biased, per_ln2, head, tail), coefficients = [
            [self.number(value) for value in numbers] for numbers in (SINGLE if self.single else DOUBLE)
        ]
        shifted = add(mul(x, per_ln2), biased)
        n = sub(shifted, biased)
        r = sub(sub(x, mul(n, head)), mul(n, tail))
        if self.single:
            c2, c3, c4, c5, c6 = coefficients
            square = mul(r, r)
            q = add(mul(add(mul(c6, square), add(mul(c5, r), c4)), square), add(mul(c3, r), c2))
            return add(mul(q, square), r), self._low_bits_as_exponent(shifted)
        q = coefficients[-1]
        for coefficient in coefficients[-2::-1]:
            q = add(mul(q, r), coefficient)
        return add(mul(mul(q, r), r), r), self._low_bits_as_exponent(shifted)

    def _low_bits_as_exponent(self, x):
        integer, shift = (ir.IntType(32), 23) if self.single else (ir.IntType(64), 52)
        bits = ir.VectorType(integer, self.lanes)
        shifts = ir.Constant(bits, [shift] * self.lanes)
        return self.builder.bitcast(self.builder.shl(self.builder.bitcast(x, bits), shifts), self.vector)

    def relu(self, x):
        return self.where("<", x, self.zero, self.zero, x)

    def relu6(self, x):
        six = self.number(6.0)
        return self.where(">", x, six, six, self.relu(x))

    def leaky_relu(self, x):
        return self.where(">", x, self.zero, x, self.builder.fmul(x, self.number(LEAKY_SLOPE)))

    def sigmoid(self, x):
        builder, one = self.builder, self.number(1.0)
        q, scale = self.expm1_parts(self.clamped(builder.fneg(x), *(SINGLE_RANGE if self.single else DOUBLE_RANGE)))
        return builder.fdiv(one, builder.fadd(one, builder.fmul(builder.fadd(q, one), scale)))

    def tanh(self, x):
        builder, one, two = self.builder, self.number(1.0), self.number(2.0)
        q, scale = self.expm1_parts(builder.fmul(two, self.clamped(x, -20.0, 20.0)))
        expm1 = builder.fadd(builder.fmul(q, scale), builder.fsub(scale, one))
        return builder.fdiv(expm1, builder.fadd(two, expm1))


@intrinsic
def activate_run(typingctx, x, count, code):
    """x[:count] = the activation of x[:count]; nothing where the code is none of ACTIVATION_CODES, or x of integers."""
    signature = types.void(x, types.intp, types.intp)

    def codegen(context, builder, signature, args):
        x, count, code = args
        if not isinstance(signature.args[0].dtype, types.Float):
            return context.get_dummy_value()
        emit = _Elementary(builder, signature.args[0].dtype)
        for name, known in ACTIVATION_CODES.items():
            if name is None:
                continue
            function = getattr(emit, name)

            def move(at, mask=None, function=function):
                emit.write(function(emit.read(x, at, mask)), x, at, mask)
                return []

            with builder.if_then(builder.icmp_signed("==", code, _I64(known))):
                at, _ = emit.loop(_I64(0), count, emit.lanes, [], lambda i, _, move=move: move(i))
                emit.rest(at, count, [], lambda _, mask, at=at, move=move: move(at, mask))
        return context.get_dummy_value()

    return signature, codegen
