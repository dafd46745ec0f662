"""Dropout: its generator against known answers, every backend to the bit, over dtypes, memory layouts and threads."""

import numpy as np
import pytest
from gradcheck import assert_gradient, numerical_gradient

import tilewise
from tilewise.kernels import dropout, dropout_backward
from tilewise.kernels.reference import dropout_mask as reference

# Random123's kat_vectors: (rounds, counter, key, answer)
ZEROS, ONES, PI = "0" * 8, "f" * 8, "243f6a88 85a308d3 13198a2e 03707344"
KNOWN = [
    (10, " ".join([ZEROS] * 4), " ".join([ZEROS] * 2), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, " ".join([ONES] * 4), " ".join([ONES] * 2), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, PI, "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    (7, " ".join([ZEROS] * 4), " ".join([ZEROS] * 2), "5f6fb709 0d893f64 4f121f81 4f730a48"),
]
DTYPES = [np.float16, np.float32, np.float64]
# around the block of 4, the vectors' step of 32 and the chunk of 16384
SIZES = (0, 1, 3, 5, 31, 32, 33, 64, 1009, 16383, 16385, 40_000)


@pytest.fixture(scope="module")
def on_cpu():
    """The CPU's device functions as functions of their own: (philox, _drop_run)."""
    from tilewise.kernels.cpu import dropout_mask as cpu
    from tilewise.kernels.cpu.jit import compiled

    def one_block(block, seed, call):
        return cpu.philox(block, seed, call)

    def run(x, y, block, threshold, scale, seed, call):
        cpu._drop_run(x, y, block, threshold, scale, seed, call)

    return [compiled(function, frozenset(), parallel=False) for function in (one_block, run)]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("rounds", "counter", "key", "answer"), KNOWN)
def test_known_answers(on_cpu, rounds, counter, key, answer):
    a, b, c, d = words(counter)
    k, m = words(key)
    assert reference.philox([[a, b, c, d]], (k, m), rounds)[0].tolist() == words(answer)
    if rounds == 10:
        signed = [np.uint64(low | high << 32).astype(np.int64) for low, high in ((a, b), (k, m), (c, d))]
        assert list(on_cpu[0](*signed)) == words(answer)


@pytest.mark.parametrize("block", [2**32 - 3, 2**33 + 5, 2**62])
def test_blocks_beyond_a_word(on_cpu, block):
    """Of arrays that no memory holds: a counter's second word, and the carry to it, in vectors and in the rest."""
    x, y = np.ones(75), np.zeros(75)
    on_cpu[1](x, y, block, 2**31, 2.0, 77, 5)
    counters = [((block + i) % 2**32, (block + i) >> 32, 5, 0) for i in range(19)]
    expected = 2.0 * (reference.philox(counters, (77, 0)).ravel()[:75] >= 2**31)
    np.testing.assert_array_equal(y, expected)


def test_an_element_takes_its_word_of_its_block(backend):
    """Seed and call are 64 bits each, the lower ones first."""
    seed, call = 0x0123456789ABCDEF, 0xFEDCBA9876543210
    counters = [(i // 4, 0, call % 2**32, call >> 32) for i in range(50)]
    blocks = reference.philox(counters, (seed % 2**32, seed >> 32))
    numbers = [int(blocks[i, i % 4]) for i in range(50)]
    kept = dropout(np.ones((5, 10)), 0.3, seed=seed, call=call) != 0
    assert kept.ravel().tolist() == [number >= round(0.3 * 2**32) for number in numbers]


def test_p_is_rounded_to_a_multiple_of_a_number(backend):
    numbers = reference.numbers(50, 8, 0)
    for more, dropped in ((0.4, False), (0.6, True)):
        p = (int(numbers[7]) + more) / 2**32
        assert (dropout(np.ones(50), p, seed=8)[7] == 0) == dropped


@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_has_the_references_bits(rng, split_everything, dtype):
    for size in SIZES:
        x = rng.standard_normal(size).astype(dtype)
        for p, seed, call in ((0.25, 0, 0), (0.9, 2**64 - 1, 2**63), (1 / 3, 123456789012, 2**40 + 7)):
            results = []
            for name in ("reference", "cpu"):
                with tilewise.using(backend=name):
                    y = dropout(x, p, seed=seed, call=call)
                    assert y.dtype == dtype
                    results.append(y.tobytes())
            assert results[0] == results[1], (size, p)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_drops_a_share_p_and_divides_the_rest(backend, p):
    x = np.full((300, 400), 3, np.float32)
    y = dropout(x, p, seed=1)
    deviation = (p * (1 - p) / x.size) ** 0.5
    assert abs((y == 0).mean() - p) < 5 * deviation
    np.testing.assert_allclose(y[y != 0], 3 / (1 - p), rtol=1e-6)
    other = dropout(x, p, seed=1, call=1) == 0  # as often together as by chance
    assert abs((other & (y == 0)).mean() - p * p) < 5 * (p * p * (1 - p * p) / x.size) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_choice_depends_on_place_alone(rng, backend, dtype):
    x = (1 + rng.random((6, 7, 10))).astype(dtype)
    y = dropout(x, 0.4, seed=3, call=2)
    np.testing.assert_array_equal(y == 0, dropout(np.ones(420), 0.4, seed=3, call=2).reshape(x.shape) == 0)
    frozen, wide = x.copy(), np.zeros((6, 10, 14), dtype)
    frozen.flags.writeable = False
    strided = wide[:, :, ::2].swapaxes(1, 2)
    strided[...] = x
    for view in (np.asfortranarray(x), x[::-1].copy()[::-1], strided, frozen):
        np.testing.assert_array_equal(dropout(view, 0.4, seed=3, call=2), y)
    np.testing.assert_array_equal(x[y == 0] > 0, True)  # x is as it was
    assert (dropout(x, 0.4, seed=4, call=2) != y).any()
    assert (dropout(x, 0.4, seed=3, call=3) != y).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_thread_count(rng, dtype):
    x, results = rng.standard_normal(3_000_001).astype(dtype), set()
    for threads in (1, 2, 3):
        with tilewise.using(backend="cpu", threads=threads):
            results.add(dropout(x, 0.5, seed=1).tobytes())
    assert len(results) == 1


def test_extremes(backend):
    x = np.ones(100_000, np.float32)
    np.testing.assert_array_equal(dropout(x, 0, seed=1), x)
    np.testing.assert_array_equal(dropout(x, 1, seed=1), 0)
    np.testing.assert_array_equal(dropout(x, 1 - 1e-12, seed=1), 0)
    special = np.array([np.nan, np.inf, -np.inf, -1.0] * 8)
    y = dropout(special, 0.5, seed=2)  # without a warning
    kept = dropout(np.ones(32), 0.5, seed=2) != 0
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(y, special * np.where(kept, 2.0, 0.0))


def test_backward_is_the_forwards_gradient(rng, backend):
    x, cotangent = rng.standard_normal((2, 5, 9))
    expected = numerical_gradient(lambda x: dropout(x, 0.3, seed=6, call=1), x, cotangent)
    assert_gradient(dropout_backward(cotangent, 0.3, seed=6, call=1), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_out(rng, backend, dtype):
    x = rng.standard_normal((40, 50)).astype(dtype)
    y, out = dropout(x, seed=1), np.empty((40, 100), dtype)[:, ::2]
    assert dropout(x, seed=1, out=out) is out
    np.testing.assert_array_equal(out, y)
    assert dropout(x, seed=1, out=x) is x
    np.testing.assert_array_equal(x, y)


def test_tensors_in_tensors_out(torch):
    x = torch.ones(3, 8)
    y = dropout(x, seed=1)
    assert type(y) is torch.Tensor
    np.testing.assert_array_equal(y.numpy(), dropout(x.numpy(), seed=1))


def test_seed_and_call_belong_to_no_plan_and_no_specialisation():
    from tilewise.kernels import dropout_mask
    from tilewise.kernels.cpu import dropout_mask as cpu

    with tilewise.using(backend="cpu", threads=1):
        for dtype in (np.float32, np.float64):
            dropout(np.ones(21, dtype), seed=1)
        plans = len(dropout_mask._DROPOUT.plans)
        for i in range(5):
            dropout(np.ones(21, np.float32), seed=2**64 - 1 - i, call=2**63 + i)
        assert len(dropout_mask._DROPOUT.plans) == plans
    assert len(cpu.drop.serial.signatures) == 2


ONE = np.ones(3)
WRONG = [
    (lambda: dropout([1.0], seed=0), TypeError, "dropout: x must be a NumPy array or a CPU torch tensor, got list"),
    (lambda: dropout(None, seed=0), TypeError, "dropout: x must be an array, got None"),
    (lambda: dropout(np.ones(3, int), seed=0), TypeError, "dropout: x is int64, which is not supported"),
    (lambda: dropout_backward(None, seed=0), TypeError, "dropout_backward: grad must be an array, got None"),
    (lambda: dropout(ONE, 1.5, seed=0), ValueError, r"dropout: p must be from 0 to 1, got 1\.5"),
    (lambda: dropout(ONE, float("nan"), seed=0), ValueError, "dropout: p must be from 0 to 1, got nan"),
    (lambda: dropout(ONE, "0.5", seed=0), TypeError, "dropout: p must be a number, got '0.5'"),
    (lambda: dropout(ONE, True, seed=0), TypeError, "dropout: p must be a number, got True"),
    (lambda: dropout(ONE, ONE / 2, seed=0), TypeError, r"dropout: p must be a number, got array\(\[0\.5"),
    (lambda: dropout(ONE, seed=-1), ValueError, "dropout: seed must be at least 0, got -1"),
    (lambda: dropout(ONE, seed=2**64), ValueError, r"dropout: seed must be below 2\*\*64, got 18446744073709551616"),
    (lambda: dropout(ONE, seed=0.5), TypeError, "dropout: seed must be an int, got 0.5"),
    (lambda: dropout(ONE, seed=0, call=-1), ValueError, "dropout: call must be at least 0, got -1"),
    (lambda: dropout_backward(ONE, seed=None), TypeError, "dropout_backward: seed must be an int, got None"),
    (lambda: dropout(ONE, seed=0, out=np.ones(4)), ValueError, r"dropout: out must have shape \(3,\)"),
    (lambda: dropout(ONE[:2], seed=0, out=ONE[1:]), ValueError, "out overlaps x without being the same array"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[case[2] for case in WRONG])
def test_wrong_calls(backend, call, error, message):
    with pytest.raises(error, match=message):
        call()
