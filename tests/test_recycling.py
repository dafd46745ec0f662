"""Memory of large results: handed out again once nobody holds it, never while somebody does."""

import gc
import threading
from collections import deque

import numpy as np
import pytest

import tilewise.kernels.cpu.batchnorm  # not under a fixture that changes FROM: it takes a constant from it
from tilewise.kernels.cpu import recycling, scratch

SINGLE = np.dtype(np.float32)
pytestmark = pytest.mark.skipif(not recycling.AVAILABLE, reason="the system has no MADV_FREE")


@pytest.fixture(autouse=True)
def nothing_idle(monkeypatch):
    monkeypatch.setattr(recycling, "FROM", 1 << 16)
    forget()
    yield
    forget()


def forget():
    recycling._kept.clear()
    recycling._lent.clear()


def places(blocks) -> list[int]:
    """Addresses, the longest idle first."""
    return [block.address for block in blocks]


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def test_memory_is_used_again_only_after_the_last_view():
    first, used = scratch.large((5, 1 << 10, 1 << 10), SINGLE)
    assert not used
    assert address(first) % scratch.ALIGNMENT == 0
    assert first.flags.carray
    first[:] = 1
    place, view = address(first), first.reshape(-1)[5::7].T
    del first
    gc.collect()
    second, used = scratch.large((5, 1 << 10, 1 << 10), SINGLE)
    assert not used
    second[:] = 2
    assert (view == 1).all()
    del view
    third, used = scratch.large((39, 1 << 16), np.dtype(np.float64))  # a little smaller
    assert used
    assert address(third) == place
    third[:] = 3
    assert (second == 2).all()


def test_a_block_is_not_wasted_on_much_smaller_results():
    large = scratch.empty((4 << 20,), SINGLE)
    place = address(large)
    del large
    assert address(scratch.empty((3 << 20,), SINGLE)) != place


def used_and_freed(sizes) -> list[int]:
    """Addresses of results of so many huge pages, which lived together and died in this order."""
    arrays = [scratch.empty((size * recycling.HUGE_PAGE,), np.dtype(np.uint8)) for size in sizes]
    where = [address(a) for a in arrays]
    while arrays:
        del arrays[0]
    return where


class Moving(deque):
    """A queue into which a result dies while it is walked through for the first time."""

    moved = False

    def __iter__(self):
        walk = super().__iter__()
        if not self.moved:
            self.moved = True
            self.append(self.popleft())
        return walk


def test_a_result_may_die_while_the_queue_is_searched(monkeypatch):
    where = used_and_freed([1])
    queue = Moving(recycling._kept)
    forget()
    monkeypatch.setattr(recycling, "_kept", queue)
    again = scratch.empty((recycling.HUGE_PAGE,), np.dtype(np.uint8))
    assert queue.moved
    assert address(again) == where[0]


class Contended(deque):
    """A queue from which another thread takes everything between the look at it and the taking."""

    def remove(self, value):
        self.clear()
        super().remove(value)

    def popleft(self):
        self.clear()
        return super().popleft()


def test_what_another_thread_took_is_not_taken_again(monkeypatch):
    where = used_and_freed([1])
    monkeypatch.setattr(recycling, "_kept", Contended(recycling._kept))
    result, used = scratch.large((recycling.HUGE_PAGE,), np.dtype(np.uint8))
    assert not used
    assert address(result) != where[0]


@pytest.mark.parametrize("limit", ["KEPT", "MOST_IDLE"])
def test_what_another_thread_took_is_not_given_back(monkeypatch, limit):
    used_and_freed([2])
    (block,) = recycling._kept
    monkeypatch.setattr(recycling, limit, block.size)
    monkeypatch.setattr(recycling, "_kept", Contended(recycling._kept))
    recycling._give_back(block)
    assert not recycling._lent


def test_little_is_kept(monkeypatch):
    monkeypatch.setattr(recycling, "MOST_IDLE", 3 * recycling.HUGE_PAGE)
    where = used_and_freed([1] * 5)
    assert places(recycling._kept) == where[2:]
    used_and_freed([4])
    assert places(recycling._kept) == where[2:]


def test_all_but_the_last_used_are_lent_to_the_system(monkeypatch):
    monkeypatch.setattr(recycling, "KEPT", 2 * recycling.HUGE_PAGE)
    where = used_and_freed([1] * 4)
    assert places(recycling._lent) == where[:2]
    assert places(recycling._kept) == where[2:]
    again = scratch.empty((recycling.HUGE_PAGE,), np.dtype(np.uint8))
    assert address(again) == where[3]  # used last, so what is not lent is taken first
    del again
    assert places(recycling._kept) == where[2:]


def test_the_longest_idle_is_given_back(monkeypatch):
    """Lent or not: a program whose results once filled all that may be idle does not clear pages ever after."""
    monkeypatch.setattr(recycling, "KEPT", recycling.HUGE_PAGE)
    monkeypatch.setattr(recycling, "MOST_IDLE", 8 * recycling.HUGE_PAGE)
    early = used_and_freed([2, 3, 3])
    late = used_and_freed([4])
    assert places(recycling._lent) == [early[2], *late]
    for _ in range(20):
        result, used = scratch.large((4 * recycling.HUGE_PAGE,), np.dtype(np.uint8))
        assert used
        assert address(result) == late[0]
        del result


@pytest.mark.parametrize("pages", [None, 2])
def test_results_of_many_threads_do_not_share_memory(monkeypatch, pages):
    if pages:  # blocks are lent and given back all the while
        monkeypatch.setattr(recycling, "KEPT", pages * recycling.HUGE_PAGE)
        monkeypatch.setattr(recycling, "MOST_IDLE", 2 * pages * recycling.HUGE_PAGE)
    failures = []

    def work(number):
        for i in range(200):
            a = scratch.empty((1 << 15,), SINGLE)
            a[:] = number + i
            b = scratch.empty((1 << 15,), SINGLE)
            b[:] = -1
            if not (a == number + i).all():
                failures.append(number)

    threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_torch_result_keeps_its_memory(rng, torch):
    x = torch.from_numpy(rng.standard_normal((4, 8, 32, 32)).astype(np.float32))
    state = torch.zeros(8), torch.ones(8)
    y = tilewise.batch_norm(x, *state, eps=0)
    others = [tilewise.batch_norm(x + 1, *state) for _ in range(3)]
    torch.testing.assert_close(y, x)
    del others
