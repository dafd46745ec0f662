"""How the operands of a product come to shared memory: see product.py for the protocol and its drawing."""

from numba.cuda.types import int32

from tilewise.kernels.cuda.launch import device
from tilewise.kernels.cuda.memory import at, lanes, load_vector, narrow, register_sums, store_vector, widen, zero
from tilewise.kernels.cuda.product import PAD, Loader, Tile
from tilewise.kernels.cuda.ptx import copy_async, settled


def strided_loader(tile: Tile, size: int) -> Loader:
    """A matrix in either order: operands (pointer, rows, stride of rows, stride of k).

    Where the stride of k is 1, k is fastest among the threads, else rows are. What a thread finds beyond the last row
    is any number: it meets only sums that belong to no element.
    """
    threads, step, pitch = tile.threads, tile.depth, size + PAD
    count = size * step // threads
    assert max(threads, size) % min(threads, size) == 0
    assert count <= 32

    @device
    def start(operands, first, thread):
        pointer, rows, row_stride, k_stride = operands
        room = int32(min(rows - first, size))
        if k_stride == 1:
            row, k = thread // step, thread % step
            inside = settled(_mask(count, room - row, threads // step))
        else:
            row, k, inside = thread % size, thread // size, int32(-1)
        at_row = row if k_stride == 1 else min(row, room - 1)
        mine = at(pointer, (first + at_row) * row_stride + k * k_stride)
        return settled(mine), inside, int32(k), int32(k * pitch + row)

    @device
    def fetch(target, kept, operands, place, k, end):
        mine, inside, first_k, _ = place
        _, _, row_stride, k_stride = operands
        k_step = 0 if k_stride == 1 else threads // size
        apart = threads // step * row_stride if k_stride == 1 else k_step * k_stride
        begin = k * k_stride
        if k + step <= end:
            for i in range(count):
                if inside >> i & 1:
                    kept[i] = mine[begin + i * apart]
        else:
            inside &= _mask(count, int32(end - k) - first_k, k_step)
            for i in range(count):
                kept[i] = mine[begin + i * apart] if inside >> i & 1 else narrow(zero(kept), kept)

    @device
    def keep(target, kept, operands, place):
        apart = threads // step if operands[3] == 1 else threads // size * pitch
        for i in range(count):
            target[place[3] + i * apart] = widen(kept[i])

    return Loader(start, fetch, keep, count)


def vector_loader(tile: Tile, size: int, k_fastest: bool | None = None) -> Loader:
    """As strided_loader, 16 bytes at a time.

    The pointer, the stride that is not 1, and the length of what is contiguous are multiples of 16 bytes. Where it is
    known when the kernel is made whether the stride of k is the one that is 1 (k_fastest), it takes fewer registers.
    """
    threads, step, pitch = tile.threads, tile.depth, size + PAD
    count = size * step // threads
    known = k_fastest is not None
    constant = bool(k_fastest)

    @device
    def start(operands, first, thread):
        pointer, rows, row_stride, k_stride = operands
        width = lanes(pointer)
        room = int32(min(rows - first, size))
        if constant if known else k_stride == 1:
            row, k = thread // (step // width), thread % (step // width) * width
            mine = at(pointer, (first + row) * row_stride + k)
            inside = settled(_mask(count // width, room - row, threads * width // step))
        else:
            row, k = thread % (size // width) * width, thread // (size // width)
            mine = at(pointer, first + min(row, room - width) + k * k_stride)
            inside = int32(-1)
        return settled(mine), inside, int32(k), int32(k * pitch + row)

    @device
    def fetch(target, kept, operands, place, k, end):
        mine, inside, first_k, _ = place
        _, _, row_stride, k_stride = operands
        width = lanes(operands[0])
        by_k = constant if known else k_stride == 1
        k_step = 0 if by_k else threads * width // size
        begin = k if by_k else k * k_stride
        apart = threads * width // step * row_stride if by_k else k_step * k_stride
        if k + step <= end:
            for i in range(count // width):
                if inside >> i & 1:
                    load_vector(at(kept, i * width), mine, begin + i * apart)
        else:
            inside &= _mask(count // width, int32(end - k) - first_k, k_step)
            for i in range(count // width):
                if inside >> i & 1:
                    load_vector(at(kept, i * width), mine, begin + i * apart)
                else:
                    for j in range(width):
                        kept[i * width + j] = narrow(zero(kept), kept)

    @device
    def keep(target, kept, operands, place):
        width = lanes(operands[0])
        wide = register_sums(kept, count)
        for i in range(count):
            wide[i] = widen(kept[i])
        if constant if known else operands[3] == 1:
            for i in range(count // width):
                for j in range(width):
                    target[place[3] + i * (threads * width // step) + j * pitch] = wide[i * width + j]
        else:
            for i in range(count // width):
                for j in range(0, width, lanes(wide)):
                    store_vector(target, place[3] + i * (threads * width // size) * pitch + j, at(wide, i * width + j))

    return Loader(start, fetch, keep, count)


def copying_loader(tile: Tile, size: int) -> Loader:
    """As vector_loader, of float32 whose rows are contiguous: by cp.async, without a register in between.

    A k's rows are side by side in memory as in the tile; where k is contiguous they would have to be transposed.
    """
    step, pitch, width = tile.depth, size + PAD, 4
    line = size // width  # vectors of a k
    apart = tile.threads // line
    each = step // apart
    assert apart * each == step

    @device
    def start(operands, first, thread):
        pointer, rows, _, k_stride = operands
        row, k = thread % line * width, thread // line
        room = int32(min(rows - first, size))
        mine = at(pointer, first + min(row, room - width) + k * k_stride)
        return settled(mine), int32(k), int32(k * pitch + row)

    @device
    def fetch(target, kept, operands, place, k, end):
        mine, first_k, to = place
        room = int32(min(end - k, step)) - first_k
        for i in range(each):
            source = at(mine, (k + i * apart) * operands[3])
            copy_async(16, at(target, to + i * apart * pitch), source, 16 if i * apart < room else 0)

    @device
    def keep(target, kept, operands, place):
        """They are there."""

    return Loader(start, fetch, keep, 0, asynchronous=True)


@device
def _mask(count, room, apart):
    """A bit for each i < count: whether i * apart < room. One register holds what is inside of a matrix."""
    mask = 0
    for i in range(count):
        mask |= (i * apart < room) << i
    return int32(mask)
