"""What kernels say beyond Numba's Python: dtype-generic storage, 128-bit access, and PTX instructions.

Storage: kernels get pointers and are generic in what they point to. `widen` turns a loaded number into the type that is
computed in, `narrow` back; `shared`, `shared_sums`, `registers` and `register_sums` make room for numbers of either.

Instructions (names and fragment layouts as in NVIDIA's "PTX ISA"): cp.async, ldmatrix, mma.sync, cvt.rna.tf32.
"""

from itertools import count as _count

import numpy as np
from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from tilewise.kernels.cuda.launch import _NUMBA, sum_dtype

_I32, _I64, _F32, _HALF, _VOID = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.HalfType(), ir.VoidType()
_GLOBAL_SPACE, _SHARED_SPACE = 1, 3
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


@intrinsic
def settled(typingctx, value):
    """The same int32 or pointer to global memory, of which the compiler does not know how it was computed.

    It then stays in its registers, where NVVM would compute it anew at each turn of a loop.
    """
    is_pointer = isinstance(value, types.CPointer)

    def codegen(context, builder, signature, args):
        word, in_global = args[0], None
        if is_pointer:  # by its address space: else what is loaded from it would be loads from anywhere
            in_global = _pointer_type(word.type.pointee, _GLOBAL_SPACE)
            word = builder.ptrtoint(builder.addrspacecast(word, in_global), _I64)
        bits, constraint = (64, "l") if is_pointer else (32, "r")
        signature_ = ir.FunctionType(word.type, [word.type])
        kept = builder.call(ir.InlineAsm(signature_, f"mov.b{bits} $0, $1;", f"={constraint},{constraint}"), [word])
        if not is_pointer:
            return kept
        return builder.addrspacecast(builder.inttoptr(kept, in_global), args[0].type)

    return value(value), codegen


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


# ---- asynchronous copies (sm_80)


def _shared_address(builder, pointer):
    """The 32-bit address that instructions on shared memory take."""
    inside = builder.addrspacecast(pointer, _pointer_type(pointer.type.pointee, _SHARED_SPACE))
    return builder.ptrtoint(inside, _I32)


def _statement(builder, text, constraints, args):
    signature = ir.FunctionType(_VOID, [a.type for a in args])
    builder.call(ir.InlineAsm(signature, text, constraints, side_effect=True), args)


@intrinsic
def copy_async(typingctx, size, target, source, source_bytes):
    """cp.async: copies `size` (4, 8, 16) bytes from global to shared memory, of which all beyond source_bytes are 0.

    Both addresses must be multiples of `size`. The copy is there for the thread itself after `wait_copies`, for others
    after a barrier as well.
    """
    number = _literal(size)
    if number not in (4, 8, 16):
        return None
    cache = "cg" if number == 16 else "ca"  # 16 bytes may bypass L1

    def codegen(context, builder, signature, args):
        _, to, origin, valid = args
        values = [
            _shared_address(builder, to), builder.ptrtoint(origin, _I64),
            context.cast(builder, valid, source_bytes, types.int32),
        ]  # fmt: skip
        text = f"cp.async.{cache}.shared.global [$0], [$1], {number}, $2;"
        _statement(builder, text, "r,l,r,~{memory}", values)
        return context.get_dummy_value()

    return types.void(size, target, source, source_bytes), codegen


@intrinsic
def commit_copies(typingctx):
    """cp.async.commit_group: the copies begun since the last one are a group."""

    def codegen(context, builder, signature, args):
        _statement(builder, "cp.async.commit_group;", "~{memory}", [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def wait_copies(typingctx, pending):
    """cp.async.wait_group: until at most `pending` of the thread's groups are under way."""
    number = _literal(pending)
    if number is None:
        return None

    def codegen(context, builder, signature, args):
        _statement(builder, f"cp.async.wait_group {number};", "~{memory}", [])
        return context.get_dummy_value()

    return types.void(pending), codegen


# ---- tensor cores


def _instruction(builder, text, outputs, output_type, inputs, kinds, side_effect):
    """Inline PTX with `outputs` results; returns them."""
    constraint = {_I32: "r", _F32: "f"}[output_type]
    constraints = ",".join([f"={constraint}"] * outputs + kinds) + (",~{memory}" if side_effect else "")
    result = ir.LiteralStructType([output_type] * outputs)
    signature = ir.FunctionType(result, [value.type for value in inputs])
    values = builder.call(ir.InlineAsm(signature, text, constraints, side_effect=side_effect), inputs)
    return [builder.extract_value(values, i) for i in range(outputs)]


def _make_ldmatrix(matrices, transposed):
    def ldmatrix(typingctx, pointer):
        result = types.UniTuple(types.uint32, matrices)

        def codegen(context, builder, signature, args):
            form = f"x{matrices}{'.trans' if transposed else ''}"
            outputs = ", ".join(f"${i}" for i in range(matrices))
            text = f"ldmatrix.sync.aligned.m8n8.{form}.shared.b16 {{{outputs}}}, [${matrices}];"
            address = _shared_address(builder, args[0])
            return context.make_tuple(
                builder, result, _instruction(builder, text, matrices, _I32, [address], ["r"], True)
            )

        return result(pointer), codegen

    ldmatrix.__doc__ = f"""{matrices} matrices of 8 x 8 16-bit numbers from shared memory into fragments of mma{
        ", transposed" if transposed else ""
    }.

    Lane l gives the address, a multiple of 16, of row l % 8 of matrix l // 8. Word m of lane l holds the numbers
    (l // 4, 2 * (l % 4)) and the next of matrix m.
    """
    return intrinsic(ldmatrix)


ldmatrix_x4, ldmatrix_x4_transposed = _make_ldmatrix(4, False), _make_ldmatrix(4, True)
ldmatrix_x2, ldmatrix_x2_transposed = _make_ldmatrix(2, False), _make_ldmatrix(2, True)


def _make_mma(shape_and_types, layout):
    def mma(typingctx, a, b, c):
        result = types.UniTuple(types.float32, 4)

        def codegen(context, builder, signature, args):
            inputs = [builder.extract_value(t, i) for t, n in zip(args, (4, 2, 4), strict=True) for i in range(n)]
            d, a_, b_, c_ = ([f"${i}" for i in range(*span)] for span in ((0, 4), (4, 8), (8, 10), (10, 14)))
            operands = ", ".join("{" + ", ".join(group) + "}" for group in (d, a_, b_, c_))
            text = f"mma.sync.aligned.{shape_and_types} {operands};"
            kinds = ["r"] * 6 + ["f"] * 4
            return context.make_tuple(builder, result, _instruction(builder, text, 4, _F32, inputs, kinds, False))

        return result(a, b, c), codegen

    mma.__doc__ = f"""D = A B + C in float32 for a warp, mma.{shape_and_types}: words a (4), b (2), numbers c (4).

    With g = lane // 4 and t = lane % 4: c and d hold (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1). {layout}
    """
    return intrinsic(mma)


mma_f16 = _make_mma(
    "m16n8k16.row.col.f32.f16.f16.f32",
    "Words of two: a = (g, 2t ..), (g + 8, 2t ..), (g, 2t + 8 ..), (g + 8, 2t + 8 ..); b = (2t .., g), (2t + 8 .., g).",
)
mma_tf32 = _make_mma(
    "m16n8k8.row.col.f32.tf32.tf32.f32",
    "a = (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b = (t, g), (t + 4, g).",
)


@intrinsic
def to_tf32(typingctx, value):
    """cvt.rna.tf32.f32: rounded to TF32's 10 bits, as a word for `mma_tf32`."""

    def codegen(context, builder, signature, args):
        assembly = ir.InlineAsm(ir.FunctionType(_I32, [_F32]), "cvt.rna.tf32.f32 $0, $1;", "=r,f")
        return builder.call(assembly, args)

    return types.uint32(types.float32), codegen
