"""Vectors of float32 from float16 in memory and back, for passes (vector_pass.py) that convert in registers.

A float32 copy of an operand costs more than most passes. Here a pass takes float16 arrays as their 16-bit patterns and
widens what it loads and narrows what it stores, a vector in one instruction each; its arithmetic is float32's.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tilewise.kernels.cpu.half_convert import narrow_vector, widen_vector
from tilewise.kernels.cpu.vector_pass import Pass


def _is_half(pointer) -> bool:
    return pointer.type.pointee == ir.IntType(16)


class HalfPass(Pass):
    """A pass in float32 to which a pointer to 16-bit integers is one to float16."""

    def __init__(self, builder):
        super().__init__(builder, types.float32)
        self.bits = Pass(builder, types.uint16)
        self.bits.lanes = self.lanes  # half a vector: as many elements as a vector of float32
        self.bits.vector = ir.VectorType(self.bits.scalar, self.lanes)
        self.bits.zero = ir.Constant(self.bits.vector, None)

    def load(self, pointer, offset):
        if not _is_half(pointer):
            return super().load(pointer, offset)
        return widen_vector(self.builder, self.bits.load(pointer, offset), self.lanes)

    def masked_load(self, pointer, offset, mask):
        if not _is_half(pointer):
            return super().masked_load(pointer, offset, mask)
        return widen_vector(self.builder, self.bits.masked_load(pointer, offset, mask), self.lanes)

    def write(self, value, pointer, offset, mask=None, streamed=False):
        if not _is_half(pointer):
            super().write(value, pointer, offset, mask, streamed)
        else:
            self.bits.write(narrow_vector(self.builder, value, self.lanes), pointer, offset, mask, streamed)

    def to_alignment(self, pointer, count, always=False):
        emit = self.bits if _is_half(pointer) else super()
        return emit.to_alignment(pointer, count, always)


def emitted(signature, emission):
    """As vector_pass.emitted; where the first pointer is to 16-bit integers, they are float16."""

    def codegen(context, builder, signature, args):
        element = next(a.dtype for a in signature.args if isinstance(a, types.CPointer))
        emission(HalfPass(builder) if element == types.uint16 else Pass(builder, element), args)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def number(typingctx, pointer):
    """The number there; the bits of a float16 give its float32."""
    half = pointer.dtype == types.uint16

    def codegen(context, builder, signature, args):
        value = builder.load(args[0])
        return widen_vector(builder, value, 1) if half else value

    return (types.float32 if half else pointer.dtype)(pointer), codegen
