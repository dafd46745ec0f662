"""PTX instructions that Numba lacks: cp.async, ldmatrix, mma.sync, cvt.rna.tf32.

Names and fragment layouts as in NVIDIA's "PTX ISA". The emulation of each is in tests/simt/ptx.cpp.
"""

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

_I32, _I64, _F32, _VOID = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.VoidType()
_GLOBAL_SPACE, _SHARED_SPACE = 1, 3


@intrinsic
def settled(typingctx, value):
    """The same int32 or pointer to global memory, of which the compiler does not know how it was computed.

    It then stays in its registers, where NVVM would compute it anew at each turn of a loop.
    """
    is_pointer = isinstance(value, types.CPointer)

    def codegen(context, builder, signature, args):
        word, in_global = args[0], None
        if is_pointer:  # by its address space: else what is loaded from it would be loads from anywhere
            in_global = ir.PointerType(word.type.pointee, _GLOBAL_SPACE)
            word = builder.ptrtoint(builder.addrspacecast(word, in_global), _I64)
        bits, constraint = (64, "l") if is_pointer else (32, "r")
        signature_ = ir.FunctionType(word.type, [word.type])
        kept = builder.call(ir.InlineAsm(signature_, f"mov.b{bits} $0, $1;", f"={constraint},{constraint}"), [word])
        if not is_pointer:
            return kept
        return builder.addrspacecast(builder.inttoptr(kept, in_global), args[0].type)

    return value(value), codegen


# ---- asynchronous copies (sm_80)


def _shared_address(builder, pointer):
    """The 32-bit address that instructions on shared memory take."""
    inside = builder.addrspacecast(pointer, ir.PointerType(pointer.type.pointee, _SHARED_SPACE))
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
    number = size.literal_value if isinstance(size, types.IntegerLiteral) else 0
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
    number = pending.literal_value if isinstance(pending, types.IntegerLiteral) else None
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
