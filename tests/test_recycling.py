"""Memory of large results: handed out again once nobody holds it, never while somebody does."""

import gc
import threading

import numpy as np
import pytest

import tilewise
from tilewise.kernels.cpu import recycling, scratch

SINGLE = np.dtype(np.float32)
pytestmark = pytest.mark.skipif(not recycling.AVAILABLE, reason="the system has no MADV_FREE")


@pytest.fixture(autouse=True)
def nothing_idle(monkeypatch):
    monkeypatch.setattr(recycling, "FROM", 1 << 16)
    recycling._idle.clear()
    yield
    recycling._idle.clear()


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


def test_little_is_kept(monkeypatch):
    monkeypatch.setattr(recycling, "MOST_IDLE", 3 * recycling.HUGE_PAGE)
    arrays = [scratch.empty((recycling.HUGE_PAGE,), np.dtype(np.uint8)) for _ in range(5)]
    places = [address(a) for a in arrays]
    while arrays:
        del arrays[0]
    assert [block.address for block in recycling._idle] == places[2:]
    del arrays
    whole = scratch.empty((4 * recycling.HUGE_PAGE,), np.dtype(np.uint8))
    del whole
    assert [block.address for block in recycling._idle] == places[2:]


def test_all_but_the_last_used_are_lent_to_the_system(monkeypatch):
    monkeypatch.setattr(recycling, "KEPT", 2 * recycling.HUGE_PAGE)
    arrays = [scratch.empty((recycling.HUGE_PAGE,), np.dtype(np.uint8)) for _ in range(4)]
    places = [address(a) for a in arrays]
    while arrays:
        del arrays[0]
    assert {block.address: block.lent for block in recycling._idle} == dict(
        zip(places, [True, True, False, False], strict=True)
    )
    again = scratch.empty((recycling.HUGE_PAGE,), np.dtype(np.uint8))
    assert address(again) == places[3]  # used last, so what is not lent is taken first
    del again
    assert [block.lent for block in recycling._idle].count(False) == 2


def test_results_of_many_threads_do_not_share_memory():
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
