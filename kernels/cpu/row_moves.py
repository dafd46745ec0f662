"""Whole rows moved by vectors: copied with or without a stride, cleared, and finished on their way to the result.

The loops are emitted on pointers: a slice of an array in a Numba loop costs two atomic reference counts, more than a
short row. Whole vectors move without a mask; only the last one pays for it.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tilewise.kernels.cpu.register_tile import Bounds, Loop
from tilewise.kernels.cpu.simd import _I1, _I32, _I64, _Emitter, _literal
from tilewise.kernels.cpu.vector_move import _gather

ASKED = 8192  # bytes: three rows of 224 pixels and 3 channels


def _loop(builder, emit, last, body, start=None):
    """for (i = start; i + lanes <= last; i += lanes) body(i); returns the first i that is left over."""
    start = _I64(0) if start is None else start
    entry = builder.block
    loop, done = builder.append_basic_block("vectors"), builder.append_basic_block("rest")
    step = _I64(emit.lanes)
    builder.cbranch(builder.icmp_signed("<=", builder.add(start, step), last), loop, done)
    builder.position_at_end(loop)
    i = builder.phi(_I64)
    i.add_incoming(start, entry)
    body(i)
    following = builder.add(i, step)
    i.add_incoming(following, builder.block)
    again = builder.icmp_signed("<=", builder.add(following, step), last)
    end_of_loop = builder.block
    builder.cbranch(again, loop, done)
    builder.position_at_end(done)
    rest = builder.phi(_I64)
    rest.add_incoming(start, entry)
    rest.add_incoming(following, end_of_loop)
    return rest


@intrinsic(prefer_literal=True)
def copy_row(typingctx, stride, target, source, count):
    """target[i] = source[i * stride] for i < count, in whole vectors: up to one vector more is read and written.

    stride: a literal, 1 or 2 (two loads and a shuffle). What lies ASKED bytes behind is asked for: rows of an image
    follow one another, and the copy would wait for memory. 3.5 to 3.3 ms for MobileNet's first layer in NHWC (Zen 3).
    """
    kind = _literal(stride)
    signature = types.void(stride, target, source, types.intp)

    def codegen(context, builder, signature, args):
        _, target, source, count = args
        emit = _Emitter(builder, signature.args[1].dtype)
        even = ir.Constant(ir.VectorType(_I32, emit.lanes), [2 * i for i in range(emit.lanes)])
        later = builder.gep(source, [_I64(ASKED // emit.itemsize)])

        def move(i):
            emit.prefetch(builder.gep(later, [builder.mul(i, _I64(kind))]), 3)
            value = _load_line(emit, source, i, even) if kind == 2 else emit.load(source, i)
            emit.store(value, target, i)

        _loop(builder, emit, builder.add(count, _I64(emit.lanes - 1)), move)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def copy_lines(typingctx, stride, target, pitch, left, source, source_step, count, lines):
    """target[i * pitch + left + j] = source[i * source_step + j * stride] for i < lines, j < count; lines > 0.

    And zeros in the rest of each line of `pitch` elements, of which there may be a vector's length at most before and
    behind. In whole vectors: up to one vector more is read (two with stride 2), and written behind the last line.
    stride: a literal, 1 or 2. All lines in one call, for a call and its bounds cost more than a line of 28 elements.
    The lines after the next are asked for: the processor follows every second line badly. 0.4 of MobileNet's first
    layer's 4.3 ms (Zen 3).
    """
    kind = _literal(stride)
    intp = types.intp
    signature = types.void(stride, target, intp, intp, source, intp, intp, intp)

    def codegen(context, builder, signature, args):
        _, target, pitch, left, source, source_step, count, lines = args
        emit = _Emitter(builder, signature.args[1].dtype)
        even = ir.Constant(ir.VectorType(_I32, emit.lanes), [2 * i for i in range(emit.lanes)])
        last = builder.add(count, _I64(emit.lanes - 1))
        padded_before = builder.icmp_signed(">", left, _I64(0))
        padded_behind = builder.icmp_signed(">", pitch, builder.add(left, count))
        loop = Loop(builder, lines, 1, "line")
        _, target, source = loop.begin((target, pitch), (source, source_step))
        inside, later = builder.gep(target, [left]), builder.gep(source, [builder.mul(source_step, _I64(2))])

        def move(j):
            emit.prefetch(builder.gep(later, [builder.mul(j, _I64(kind))]), 3)
            value = _load_line(emit, source, j, even) if kind == 2 else emit.load(source, j)
            emit.store(value, inside, j)

        # each store may run over into what the next one writes
        with builder.if_then(padded_before):
            emit.store(emit.zero, target, _I64(0))
        _loop(builder, emit, last, move)
        with builder.if_then(padded_behind):
            emit.store(emit.zero, inside, count)
        loop.close()
        return context.get_dummy_value()

    return signature, codegen


def _load_line(emit, source, j, even):
    """Every second element from 2 j on, a vector of them."""
    place = emit.builder.mul(j, _I64(2))
    parts = emit.load(source, place), emit.load(source, emit.builder.add(place, _I64(emit.lanes)))
    return emit.builder.shuffle_vector(*parts, even)


@intrinsic
def gather_row(typingctx, target, source, count, stride):
    """target[i] = source[i * stride] for i < count; reads nothing else, but may write up to one vector more."""
    signature = types.void(target, source, types.intp, types.intp)

    def codegen(context, builder, signature, args):
        target, source, count, stride = args
        emit = _Emitter(builder, signature.args[0].dtype)

        def move(i):
            mask = emit.mask(_I64(0), builder.sub(count, i))
            place = builder.gep(source, [builder.mul(i, stride)])
            emit.store(_gather(emit, place, stride, mask), target, i)

        _loop(builder, emit, builder.add(count, _I64(emit.lanes - 1)), move)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def clear_row(typingctx, target, count):
    """target[i] = 0 for i < count, and for up to a vector behind."""
    signature = types.void(target, types.intp)

    def codegen(context, builder, signature, args):
        target, count = args
        emit = _Emitter(builder, signature.args[0].dtype)
        rounded = builder.add(count, _I64(emit.lanes - 1))
        _loop(builder, emit, rounded, lambda i: emit.store(emit.zero, target, i))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def finish_row(typingctx, step, target, source, count, shift, bounds, extra, has_extra):
    """target[step * i] = f(source[i] + shift + extra[i]) for i < count, f keeping to `Bounds`.

    step: a literal, 1 or 2; with 2, what lies between is not touched. extra is read, step apart too, where has_extra
    is not 0 only. A NaN stays a NaN.
    """
    apart = _literal(step)
    signature = types.void(step, target, source, types.intp, shift, types.intp, extra, types.intp)

    def codegen(context, builder, signature, args):
        _, target, source, count, shift, bounds, extra, has_extra = args
        emit = _Emitter(builder, signature.args[1].dtype)
        n, half = emit.lanes, emit.lanes // 2
        shifts = emit.splat(shift)
        limits = Bounds(emit, bounds)
        add = emit.splat(builder.icmp_signed("!=", has_extra, _I64(0)), scalar=_I1)
        # with step 2, each half of a vector spreads over the even lanes of another one
        spread = [list(range(n))] if apart == 1 else [[h * half + i // 2 for i in range(n)] for h in range(2)]
        even = ir.Constant(ir.VectorType(_I1, n), [int(i % apart == 0) for i in range(n)])

        def finish(i, whole):
            # what lies behind the last row may not be ours to read
            inside = None if whole else emit.mask(_I64(0), builder.sub(count, i))
            values = emit.load(source, i) if whole else emit.masked_load(source, i, inside)
            total = emit.add(values, shifts)
            for h, order in enumerate(spread):
                place = builder.add(builder.mul(i, _I64(apart)), _I64(h * n))
                mask = even
                if not whole:
                    left = builder.sub(builder.mul(builder.sub(count, i), _I64(apart)), _I64(h * n))
                    mask = builder.and_(even, emit.mask(_I64(0), left))
                value = total
                if apart > 1:
                    value = builder.shuffle_vector(total, total, ir.Constant(ir.VectorType(_I32, n), order))
                value = limits.apply(emit.add(value, emit.masked_load(extra, place, builder.and_(add, mask))))
                if whole and apart == 1:
                    emit.store(value, target, place)
                else:
                    emit.masked_store(value, target, place, mask)

        rest = _loop(builder, emit, count, lambda i: finish(i, True))
        with builder.if_then(builder.icmp_signed("<", rest, count)):
            finish(rest, False)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def add_row(typingctx, target, source, count):
    """target[i] += source[i] for i < count; only the last vector under a mask."""
    signature = types.void(target, source, types.intp)

    def codegen(context, builder, signature, args):
        target, source, count = args
        emit = _Emitter(builder, signature.args[0].dtype)
        rest = _loop(
            builder, emit, count, lambda i: emit.store(emit.add(emit.load(target, i), emit.load(source, i)), target, i)
        )
        with builder.if_then(builder.icmp_signed("<", rest, count)):
            mask = emit.mask(_I64(0), builder.sub(count, rest))
            total = emit.add(emit.masked_load(target, rest, mask), emit.masked_load(source, rest, mask))
            emit.masked_store(total, target, rest, mask)
        return context.get_dummy_value()

    return signature, codegen
