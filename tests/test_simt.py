"""The emulator itself: every instruction against a model in NumPy, on every schedule."""

import inspect
from importlib import import_module

import numpy as np
import pytest
from simt import emulator as simt

if simt.why_not():
    pytest.skip(simt.why_not(), allow_module_level=True)

from numba import cuda
from simt.emulator import SCHEDULES, EmulatedFault, Emulator
from simt.small import small_kernel
from simt.translate import Unsupported, translate

from tilewise.kernels.cuda import memory, ptx
from tilewise.kernels.cuda.launch import ELEMENTS, INDICES, INT32, REAL, SUMS
from tilewise.kernels.device_arrays import HostPlace

HALF, SINGLE = np.dtype(np.float16), np.dtype(np.float32)
LANES = np.arange(32)
G, T = LANES // 4, LANES % 4


@pytest.fixture(params=[(s, e) for s in SCHEDULES for e in (False, True)], ids=lambda p: f"{p[0]}-{p[1]}")
def place(request) -> HostPlace:
    """A place on an emulator with each schedule in turn, copies late or at once."""
    schedule, eager = request.param
    return HostPlace(_with(Emulator(), schedule, eager))


_codes: dict = {}


def _with(emulator, schedule="forward", eager=False):
    emulator.schedule, emulator.eager_copies, emulator._codes = schedule, eager, _codes
    return emulator


_kernels: dict = {}


def made(function, **options):
    """The kernel of a function, compiled once for all tests."""
    key = function, tuple(options.items())
    if key not in _kernels:
        _kernels[key] = small_kernel(function, **options)
    return _kernels[key]


def run(place, function, *arrays, dtype=SINGLE, grid=1, shared=0, **options):
    """Launches a kernel on copies of the arrays; what they hold afterwards."""
    views = [place.copy_in(a) if isinstance(a, np.ndarray) else a for a in arrays]
    made(function, **options)(place, grid, *views, shared=shared, dtype=dtype)
    return [place.copy_out(v) for v, a in zip(views, arrays, strict=True) if isinstance(a, np.ndarray)]


# ---- tensor cores


def pairs(rows, columns):
    """A function from a matrix to words of two neighbouring halves."""
    return lambda m: (
        m[rows, columns].view(np.uint16).astype(np.int64)
        | (m[rows, columns + 1].view(np.uint16).astype(np.int64) << 16)
    )


def mma_f16_of_words(x: ELEMENTS, words: INDICES, c: SUMS, d: SUMS):
    t = cuda.threadIdx.x
    w, s = 6 * t, 4 * t
    a = (np.uint32(words[w]), np.uint32(words[w + 1]), np.uint32(words[w + 2]), np.uint32(words[w + 3]))
    sums = ptx.mma_f16(a, (np.uint32(words[w + 4]), np.uint32(words[w + 5])), (c[s], c[s + 1], c[s + 2], c[s + 3]))
    for i in range(4):
        d[s + i] = sums[i]


def fragment_of_results(m):
    return np.stack([m[G, 2 * T], m[G, 2 * T + 1], m[G + 8, 2 * T], m[G + 8, 2 * T + 1]], axis=1)


def test_mma_of_halves(place, rng):
    a, b = rng.standard_normal((16, 16)).astype(HALF), rng.standard_normal((16, 8)).astype(HALF)
    c = rng.standard_normal((16, 8)).astype(SINGLE)
    of_a = [pairs(G, 2 * T), pairs(G + 8, 2 * T), pairs(G, 2 * T + 8), pairs(G + 8, 2 * T + 8)]
    bt = np.ascontiguousarray(b.T)
    of_b = [pairs(G, 2 * T), pairs(G, 2 * T + 8)]
    words = np.stack([f(a) for f in of_a] + [f(bt) for f in of_b], axis=1)
    _, _, _, d = run(place, mma_f16_of_words, a, words, fragment_of_results(c), np.zeros((32, 4), SINGLE), dtype=HALF)
    expected = fragment_of_results(a.astype(np.float64) @ b.astype(np.float64) + c)
    np.testing.assert_allclose(d, expected, rtol=1e-5, atol=1e-5)


def mma_tf32_of_numbers(x: ELEMENTS, c: ELEMENTS, d: ELEMENTS):
    w, s = 6 * cuda.threadIdx.x, 4 * cuda.threadIdx.x
    a = (ptx.to_tf32(x[w]), ptx.to_tf32(x[w + 1]), ptx.to_tf32(x[w + 2]), ptx.to_tf32(x[w + 3]))
    sums = ptx.mma_tf32(a, (ptx.to_tf32(x[w + 4]), ptx.to_tf32(x[w + 5])), (c[s], c[s + 1], c[s + 2], c[s + 3]))
    for i in range(4):
        d[s + i] = sums[i]


def tf32(x):
    """Rounded to ten bits, ties away from zero."""
    bits = (np.asarray(x, np.float32).view(np.uint32) + 0x1000) & 0xFFFFE000
    return bits.astype(np.uint32).view(np.float32)


def test_mma_of_tf32(place, rng):
    a, b, c = (rng.standard_normal(shape).astype(SINGLE) for shape in ((16, 8), (8, 8), (16, 8)))
    x = np.stack([a[G, T], a[G + 8, T], a[G, T + 4], a[G + 8, T + 4], b[T, G], b[T + 4, G]], axis=1)
    d = run(place, mma_tf32_of_numbers, x, fragment_of_results(c), np.zeros((32, 4), SINGLE))[2]
    exact = tf32(a).astype(np.float64) @ tf32(b).astype(np.float64) + c
    np.testing.assert_allclose(d, fragment_of_results(exact), rtol=1e-5, atol=1e-5)
    assert np.abs(exact - (a.astype(np.float64) @ b + c)).max() > 1e-4, "not rounded"


@pytest.mark.parametrize("sign", [1, -1])
def test_tensor_cores_cut_off_what_they_add(place, sign):
    """Products below the last bit of the largest summand are lost, however many; where it is small they are not."""
    a, b = np.full((16, 8), sign * 2.0**-12, SINGLE), np.full((8, 8), 2.0**-12, SINGLE)
    a[1] *= 3  # 3 * 2**-24 each: a half of it is cut off
    a[2] = 0
    a[2, 0] = sign * 2.0**-11
    x = np.stack([a[G, T], a[G + 8, T], a[G, T + 4], a[G + 8, T + 4], b[T, G], b[T + 4, G]], axis=1)
    c = np.full((16, 8), sign, SINGLE)
    c[3] = 0
    d = run(place, mma_tf32_of_numbers, x, fragment_of_results(c), np.zeros((32, 4), SINGLE))[2]
    expected = np.full((16, 8), sign, SINGLE)
    expected[1] += sign * 8 * 2.0**-23
    expected[2] += sign * 2.0**-23
    expected[3] = sign * 8 * 2.0**-24
    np.testing.assert_array_equal(d, fragment_of_results(expected))


def words_of_tf32(x: ELEMENTS, words: INDICES):
    words[cuda.threadIdx.x] = np.int64(ptx.to_tf32(x[cuda.threadIdx.x]))


def test_rounding_to_tf32(place):
    x = np.resize(np.array([1, 1 + 2**-11, -1 - 2**-11, 1 + 2**-11 - 2**-20, 0, -np.inf, np.nan, 3e38], SINGLE), 32)
    _, words = run(place, words_of_tf32, x, np.zeros(32, np.int64))
    expected = np.where(np.isnan(x), 0x7FFFFFFF, tf32(x).view(np.uint32))
    expected[np.isinf(x)] = x[np.isinf(x)].view(np.uint32)
    assert words.tolist() == expected.tolist()


def load_matrices(x: ELEMENTS, words: INDICES):
    """Rows in shared memory 24 apart; each lane gives the address of row lane."""
    t = cuda.threadIdx.x
    room = memory.shared(x, 32 * 24)
    for i in range(8):
        room[24 * t + i] = x[8 * t + i]
    cuda.syncthreads()
    four, turned = ptx.ldmatrix_x4(memory.at(room, 24 * t)), ptx.ldmatrix_x4_transposed(memory.at(room, 24 * t))
    two, turned_two = ptx.ldmatrix_x2(memory.at(room, 24 * t)), ptx.ldmatrix_x2_transposed(memory.at(room, 24 * t))
    for i in range(4):
        words[12 * t + i], words[12 * t + 4 + i] = np.int64(four[i]), np.int64(turned[i])
    for i in range(2):
        words[12 * t + 8 + i], words[12 * t + 10 + i] = np.int64(two[i]), np.int64(turned_two[i])


def test_ldmatrix(place, rng):
    x = rng.standard_normal((4, 8, 8)).astype(HALF)
    _, words = run(place, load_matrices, x, np.zeros((32, 12), np.int64), dtype=HALF)
    plain = np.stack([pairs(G, 2 * T)(m) for m in x], axis=1)
    turned = np.stack([pairs(G, 2 * T)(np.ascontiguousarray(m.T)) for m in x], axis=1)
    np.testing.assert_array_equal(words, np.concatenate([plain, turned, plain[:, :2], turned[:, :2]], axis=1))


# ---- warps


def shuffles(x: ELEMENTS, y: ELEMENTS, n: INT32):
    t = cuda.threadIdx.x
    y[t] = cuda.shfl_sync(0xFFFFFFFF, x[t], n)
    y[32 + t] = cuda.shfl_up_sync(0xFFFFFFFF, x[t], n)
    y[64 + t] = cuda.shfl_down_sync(0xFFFFFFFF, x[t], n)
    y[96 + t] = cuda.shfl_xor_sync(0xFFFFFFFF, x[t], n)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32"])
@pytest.mark.parametrize("n", [0, 1, 5, 16, 31])
def test_shuffles(place, n, dtype):
    x = (100 + LANES).astype(dtype)
    _, y = run(place, shuffles, x, np.zeros((4, 32), dtype), n, dtype=np.dtype(dtype), dtypes=(dtype,))
    up, down = np.where(n > LANES, LANES, LANES - n), np.where(LANES + n > 31, LANES, LANES + n)
    np.testing.assert_array_equal(y - 100, [np.full(32, n), up, down, LANES ^ n])


def votes(x: ELEMENTS, y: INDICES):
    t = cuda.threadIdx.x
    yes = 1 if x[t] > 0 else 0
    y[5 * t] = cuda.all_sync(0xFFFFFFFF, yes)
    y[5 * t + 1] = cuda.any_sync(0xFFFFFFFF, yes)
    y[5 * t + 2] = cuda.eq_sync(0xFFFFFFFF, yes)
    y[5 * t + 3] = cuda.ballot_sync(0xFFFFFFFF, yes)
    y[5 * t + 4] = cuda.syncthreads_count(yes) + 100 * cuda.syncthreads_and(yes) + 1000 * cuda.syncthreads_or(yes)


@pytest.mark.parametrize("which", ["all", "none", "some"])
def test_votes(place, which):
    x = {"all": np.ones(32), "none": np.zeros(32), "some": LANES % 3 == 0}[which].astype(SINGLE)
    _, y = run(place, votes, x, np.zeros((32, 5), np.int64))
    yes = x > 0
    ballot = int((yes * (1 << LANES)).sum())
    counted = yes.sum() + 100 * yes.all() + 1000 * yes.any()
    assert [(v[0] & 1, v[1] & 1, v[2] & 1, v[3] & 0xFFFFFFFF, v[4]) for v in y.tolist()] == [
        (yes.all(), yes.any(), yes.all() or not yes.any(), ballot, counted)
    ] * 32


def halves_then_all(x: ELEMENTS, y: ELEMENTS):
    """The lower half shuffles three times among itself, then the whole warp once."""
    t = cuda.threadIdx.x
    value = x[t]
    if t < 16:
        for _ in range(3):
            value += cuda.shfl_xor_sync(0xFFFF, value, 1)
    y[t] = cuda.shfl_xor_sync(0xFFFFFFFF, value, 16)


def test_lanes_with_different_masks_do_not_wait_for_each_other(place):
    _, y = run(place, halves_then_all, np.ones(32, SINGLE), np.zeros(32, SINGLE))
    assert y.tolist() == [1.0] * 16 + [8.0] * 16


# ---- cp.async


def copies(x: ELEMENTS, y: ELEMENTS, valid: INT32):
    """Each thread copies 4, 8 and 16 bytes, `valid` of them from x, and then takes another thread's."""
    t = cuda.threadIdx.x
    room = memory.shared(x, 32 * 7)
    ptx.copy_async(16, memory.at(room, 4 * t), memory.at(x, 4 * t), min(valid, 16))
    ptx.copy_async(8, memory.at(room, 128 + 2 * t), memory.at(x, 128 + 2 * t), min(valid, 8))
    ptx.commit_copies()
    ptx.copy_async(4, memory.at(room, 192 + t), memory.at(x, 192 + t), min(valid, 4))
    ptx.commit_copies()
    ptx.wait_copies(1)
    cuda.syncthreads()
    for i in range(6):
        y[i * 32 + 31 - t] = room[i * 32 + 31 - t]
    ptx.wait_copies(0)
    cuda.syncthreads()
    y[192 + 31 - t] = room[192 + 31 - t]


@pytest.mark.parametrize("valid", [16, 8, 4, 0])
def test_asynchronous_copies_and_their_zeros(place, valid):
    x = np.arange(1, 225, dtype=SINGLE)
    _, y = run(place, copies, x, np.zeros(224, SINGLE), valid, least=(8, 0))
    expected = x.copy()
    for begin, end, width in ((0, 128, 4), (128, 192, 2), (192, 224, 1)):
        expected[begin:end].reshape(-1, width)[:, min(valid // 4, width) :] = 0
    np.testing.assert_array_equal(y, expected)


# ---- blocks and memory


def sum_of_block(x: ELEMENTS, y: ELEMENTS, factor: REAL):
    t, b = cuda.threadIdx.x, cuda.blockIdx.x + cuda.gridDim.x * (cuda.blockIdx.y + cuda.gridDim.y * cuda.blockIdx.z)
    room = memory.dynamic_shared(x)
    room[t] = x[cuda.blockDim.x * b + t]
    half = 32
    while half:
        cuda.syncthreads()
        if t < half:
            room[t] += room[t + half]
        half //= 2
    if t == 0:
        y[b] = factor * room[0]


def test_grid_of_blocks_with_dynamic_shared_memory(place, rng):
    x = rng.integers(0, 9, (12, 64)).astype(SINGLE)
    _, y = run(place, sum_of_block, x, np.zeros(12, SINGLE), 0.5, grid=(2, 3, 2), shared=256, threads=64)
    np.testing.assert_array_equal(y, x.sum(1) / 2)


@pytest.mark.parametrize(("capability", "most"), [((7, 5), 64), ((8, 0), 163), ((8, 6), 99), ((9, 0), 227)])
def test_more_shared_memory_than_a_gpu_has_is_an_error(monkeypatch, capability, most):
    emulator = _with(Emulator())
    monkeypatch.setattr(emulator, "capability", capability)
    x, y = np.ones(64, SINGLE), np.zeros(1, SINGLE)
    run(HostPlace(emulator), sum_of_block, x, y, 1.0, shared=most << 10, threads=64)
    with pytest.raises(EmulatedFault, match=f"at most {most << 10}"):
        run(HostPlace(emulator), sum_of_block, x, y, 1.0, shared=(most << 10) + 16, threads=64)


def exits_early(x: ELEMENTS, y: ELEMENTS, n: INT32):
    t = cuda.threadIdx.x
    if t >= n:
        return
    cuda.syncthreads()
    y[t] = x[t] + cuda.ballot_sync(0xFFFFFFFF, True)


def test_threads_that_have_ended_are_not_waited_for(place):
    _, y = run(place, exits_early, np.ones(32, SINGLE), np.zeros(32, SINGLE), 3)
    assert y.tolist() == [8.0] * 3 + [0.0] * 29


def test_unknown_instructions_are_named():
    with pytest.raises(Unsupported, match=r"llvm\.nvvm\.fence"):
        translate('call void @"llvm.nvvm.fence"()\n')
    with pytest.raises(Unsupported, match="__nv_j0f"):
        translate('call float @"__nv_j0f"(float %x)\n')
    with pytest.raises(Unsupported, match=r"red\.global\.add"):
        translate('  call void asm sideeffect "red.global.add.f32 [$0], $1;", "l,f"(i64 %a, float %b)\n')


def test_another_numba_cuda_is_refused(monkeypatch):
    import numba_cuda

    monkeypatch.setattr(numba_cuda, "__version__", "0.99.0")
    assert "numba-cuda 0.30's internals, and 0.99.0 is installed" in simt.why_not()


@pytest.mark.parametrize("backend", ["cuda", "cupy"])
def test_an_emulator_is_called_as_the_driver_is(backend):
    """Else a call that a GPU's driver refuses would pass here."""
    driver = import_module(f"tilewise.kernels.{backend}.driver").Driver

    def parameters(method):
        return [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]

    for name in ("allocate", "write", "read", "start", "synchronize"):
        assert parameters(getattr(Emulator, name)) == parameters(getattr(driver, name)), name
