"""Numbers in memory, whatever their dtype: kernels get pointers, and are generic in what they point to.

`widen` turns a loaded number into the type that is computed in, `narrow` back; `shared`, `shared_sums`, `registers` and
`register_sums` make room for numbers of either; `load_vector` and `store_vector` move 16 bytes at a time.
"""

from itertools import count as _count

import numpy as np
from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from tilewise.kernels.cuda.launch import _NUMBA, sum_dtype

_I32, _F32, _HALF = ir.IntType(32), ir.FloatType(), ir.HalfType()
_SHARED_SPACE = 3
VECTOR_BYTES = 16
_numbers = _count()  # tells shared arrays apart


def _dtype(numba_type) -> np.dtype:
    return np.dtype(str(numba_type))


def _sum_type(numba_type):
    return _NUMBA[sum_dtype(_dtype(numba_type))]


def _pointer_type(llvm_type, space=0):
    return ir.PointerType(llvm_type, space)


# ---- numbers


@intrinsic
def widen(typingctx, value):
    """The number in the type that is computed in: float16 as float32, narrow integers as int32."""
    wide = _sum_type(value)

    def codegen(context, builder, signature, args):
        if value == types.float16:
            return builder.fpext(_as_half(builder, args[0]), _F32)
        return context.cast(builder, args[0], value, wide)

    return wide(value), codegen


@intrinsic
def comparable(typingctx, value):
    """The number in a type that the device compares: float16 as float32, all others as they are, unsigned ones too."""
    wide = types.float32 if value == types.float16 else value

    def codegen(context, builder, signature, args):
        return builder.fpext(_as_half(builder, args[0]), _F32) if value == types.float16 else args[0]

    return wide(value), codegen


@intrinsic
def narrow(typingctx, value, pointer):
    """The number in the type that the pointer points to, rounded to nearest."""
    element = pointer.dtype

    def codegen(context, builder, signature, args):
        if element == types.float16 and value == types.float32:
            half = builder.fptrunc(args[0], _HALF)
            stored = context.get_value_type(types.float16)
            return builder.bitcast(half, stored) if isinstance(stored, ir.IntType) else half
        return context.cast(builder, args[0], value, element)

    return element(value, pointer), codegen


def _as_half(builder, value):
    return builder.bitcast(value, _HALF) if isinstance(value.type, ir.IntType) else value


@intrinsic
def zero(typingctx, pointer):
    """0 in the type that sums of such numbers are computed in."""
    wide = _sum_type(pointer.dtype)
    return wide(pointer), lambda context, builder, signature, args: ir.Constant(context.get_value_type(wide), 0)


@intrinsic
def itemsize(typingctx, pointer):
    """Bytes of a number, a constant."""
    size = _dtype(pointer.dtype).itemsize
    return types.int32(pointer), lambda context, builder, signature, args: ir.Constant(_I32, size)


# ---- room


def _literal(numba_type) -> int | None:
    return numba_type.literal_value if isinstance(numba_type, types.IntegerLiteral) else None


def _shared_array(context, builder, element, size):
    """A generic pointer to `size` numbers of static shared memory."""
    storage = ir.ArrayType(context.get_data_type(element), size)
    array = ir.GlobalVariable(builder.module, storage, f"shared_memory_{next(_numbers)}", addrspace=_SHARED_SPACE)
    array.linkage, array.align = "internal", VECTOR_BYTES
    array.initializer = ir.Constant(storage, ir.Undefined)
    first = builder.gep(array, [_I32(0), _I32(0)])
    return builder.addrspacecast(first, _pointer_type(storage.element))


def _make_room(doc, summed, is_shared):
    def room(typingctx, like, count):
        size = _literal(count)
        if size is None:
            return None
        element = _sum_type(like.dtype) if summed else like.dtype

        def codegen(context, builder, signature, args):
            if is_shared:
                return _shared_array(context, builder, element, size)
            with builder.goto_entry_block():
                array = builder.alloca(ir.ArrayType(context.get_data_type(element), size))
                array.align = VECTOR_BYTES
            return builder.gep(array, [_I32(0), _I32(0)])

        return types.CPointer(element)(like, count), codegen

    room.__doc__ = doc
    return intrinsic(room)


shared = _make_room("`count` numbers of the pointer's type in static shared memory, aligned to 16 bytes.", False, True)
shared_sums = _make_room("The same in the type that such numbers are summed in.", True, True)
registers = _make_room("`count` numbers of the thread's own; in registers if every index is a constant.", False, False)
register_sums = _make_room("The same in the type that such numbers are summed in.", True, False)


@intrinsic
def shared_indices(typingctx, count):
    """`count` int64 in static shared memory."""
    size = _literal(count)
    if size is None:
        return None

    def codegen(context, builder, signature, args):
        return _shared_array(context, builder, types.int64, size)

    return types.CPointer(types.int64)(count), codegen


@intrinsic
def dynamic_shared(typingctx, like):
    """The launch's dynamic shared memory, as numbers of the pointer's type."""
    result = types.CPointer(like.dtype)

    def codegen(context, builder, signature, args):
        storage, name = ir.ArrayType(ir.IntType(8), 0), "dynamic_shared_memory"
        array = builder.module.globals.get(name)
        if array is None:
            array = ir.GlobalVariable(builder.module, storage, name, addrspace=_SHARED_SPACE)
            array.align = VECTOR_BYTES
        generic = builder.addrspacecast(array, _pointer_type(storage))
        return builder.bitcast(generic, _pointer_type(context.get_data_type(like.dtype)))

    return result(like), codegen


@intrinsic
def at(typingctx, pointer, index):
    """The pointer, `index` numbers further."""

    def codegen(context, builder, signature, args):
        return _further(context, builder, *args, index)

    return pointer(pointer, index), codegen


# ---- 128-bit access


@intrinsic
def lanes(typingctx, pointer):
    """Numbers of 16 bytes, a constant."""
    count = VECTOR_BYTES // _dtype(pointer.dtype).itemsize
    return types.int32(pointer), lambda context, builder, signature, args: ir.Constant(_I32, count)


@intrinsic
def load_vector(typingctx, target, pointer, index):
    """target[0], ... = the 16 bytes from pointer[index] on, whose address must be a multiple of 16.

    target: `registers` or shared memory of the pointer's type.
    """

    def codegen(context, builder, signature, args):
        source = _further(context, builder, args[1], args[2], index)
        _move_vector(context, builder, target.dtype, args[0], source, to_memory=False)
        return context.get_dummy_value()

    return types.void(target, pointer, index), codegen


@intrinsic
def store_vector(typingctx, pointer, index, source):
    """pointer[index], ... = the 16 bytes at source; the address must be a multiple of 16."""

    def codegen(context, builder, signature, args):
        place = _further(context, builder, args[0], args[1], index)
        _move_vector(context, builder, pointer.dtype, place, args[2], to_memory=True)
        return context.get_dummy_value()

    return types.void(pointer, index, source), codegen


def _further(context, builder, pointer, index, index_type):
    return builder.gep(pointer, [context.cast(builder, index, index_type, types.int64)])


def _move_vector(context, builder, element, target, source, to_memory):
    """16 bytes as four words on the side of the memory, and word by word on the side of the registers.

    PTX has vectors of four at most: eight halves NVVM would load one by one, and as a whole vector in registers it
    cannot take them apart.
    """
    size = _dtype(element).itemsize
    lane = context.get_data_type(element) if size >= 4 else _I32
    count = VECTOR_BYTES // max(size, 4)
    memory, own = (target, source) if to_memory else (source, target)
    memory = builder.bitcast(memory, _pointer_type(ir.VectorType(lane, count)))
    own = builder.bitcast(own, _pointer_type(lane))
    words = [builder.gep(own, [_I32(i)]) for i in range(count)]
    if to_memory:
        vector = ir.Constant(memory.type.pointee, ir.Undefined)
        for i, word in enumerate(words):
            vector = builder.insert_element(vector, builder.load(word), _I32(i))
        builder.store(vector, memory).align = VECTOR_BYTES
    else:
        vector = builder.load(memory)
        vector.align = VECTOR_BYTES
        for i, word in enumerate(words):
            builder.store(builder.extract_element(vector, _I32(i)), word)


# ---- atomics


@intrinsic
def atomic_max(typingctx, pointer, index, value):
    """pointer[index] = max(pointer[index], value) of integers, whatever the order of the threads that do it."""
    if not isinstance(pointer.dtype, types.Integer) or not pointer.dtype.signed:
        return None

    def codegen(context, builder, signature, args):
        operand = context.cast(builder, args[2], value, pointer.dtype)
        builder.atomic_rmw("max", _further(context, builder, args[0], args[1], index), operand, "monotonic")
        return context.get_dummy_value()

    return types.void(pointer, index, value), codegen
