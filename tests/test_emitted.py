"""Emitted functions mean what the same source means to Python."""

import linecache

import numpy as np
import pytest
from numba import njit, prange

from tilewise.kernels.cpu import jit
from tilewise.kernels.cpu.emitted import emitted
from tilewise.kernels.cpu.emitted_syntax import Emission
from tilewise.kernels.cpu.jit import device
from tilewise.kernels.cpu.scratch import integers
from tilewise.kernels.cpu.simd import lanes

WIDE = 4


@emitted
def arithmetic(a, b, numbers):
    """Rounded down as in Python, for every pair of signs."""
    numbers[0], numbers[1] = a // b, a % b
    numbers[2], numbers[3] = a // 8, a % 8
    numbers[4], numbers[5] = a // 3, a % 3
    numbers[6] = min(a, b, 2) - max(a, -b)
    numbers[7] = (a << 2) + (a >> 1) + (a & 6) + (a | 1)
    numbers[8] = -a


@emitted
def collatz(n):
    steps = 0
    while n != 1:
        n = n // 2 if n % 2 == 0 else 3 * n + 1
        steps += 1
    return steps


@emitted
def first_pair(numbers, total):
    """Nested loops, continue, break and return; two results."""
    tried = 0
    for i in range(numbers.size - 1, -1, -1):
        if numbers[i] < 0:
            continue
        for j in range(0, i, 2):
            if numbers[j] > 1000:
                break
            tried += 1
            if numbers[i] + numbers[j] == total:
                return i, j * 100 + tried
    return -1, tried


@emitted
def guarded(numbers, i):
    """The element is not read where the index is outside."""
    inside = 0 <= i < numbers.size and numbers[i] > 0
    return 1 if inside or not i > -5 else 0


@emitted
def sign(number):
    if number < 0:
        return -1
    else:
        return 1 if number > 0 else 0


@emitted
def is_even(number):
    return number % 2 == 0


@emitted
def even_and_small(number):
    found = is_even(number) and number < 10
    return 5 if found or not is_even(number + 1) else 3


@emitted
def swapped(a, b):
    for _ in range(3):
        a, b = b, a + b
    return a, b


@emitted
def table_sum(table, weights):
    total = weights.dtype.type(0)
    for i in range(table.shape[0]):
        for j in range(table.shape[1]):
            total += table[i, j] * weights[j]
    return total


@emitted
def squares(count):
    """An array that is made here and handed on."""
    result, spare = integers(count), integers(count)
    for i in range(count):
        spare[i] = i
        result[i] = spare[i] * i
    return result


@emitted
def last_of_squares(count):
    made = squares(count)
    rest = made[count - 2 :]
    return rest[1] + rest.size


@emitted
def narrow(bytes_, at):
    value = bytes_[at]
    total = 0
    for _ in range(3):
        total += (value + value) * 100
    bytes_[at] = total
    return total


@emitted
def pruned(array):
    """A branch that constants rule out may hold what has no meaning."""
    if WIDE > 8:
        return no_such_name  # noqa: F821  # pyright: ignore
    width = lanes(array)
    return width * WIDE


def call(function, *arguments):
    inputs = ", ".join(f"a{i}" for i in range(len(arguments)))
    names = {"function": function}
    exec(f"def caller({inputs}): return function({inputs})", names)
    return njit(error_model="numpy")(names["caller"])(*arguments)


def python(function):
    return function.emitted.function


@pytest.mark.parametrize(("a", "b"), [(17, 5), (-17, 5), (17, -5), (-17, -5), (-16, 8), (0, 3), (2**40 + 3, 7)])
def test_integers_are_pythons(a, b):
    here, there = np.zeros(9, np.int64), np.zeros(9, np.int64)
    call(arithmetic, a, b, here)
    python(arithmetic)(a, b, there)
    assert here.tolist() == there.tolist()


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (collatz, (27,)),
        (first_pair, (np.array([3, -1, 4, 1, 5, 9, 2, 6]), 11)),
        (first_pair, (np.array([3, -1, 2000, 1, 5, 9, 2, 6]), 99)),
        (first_pair, (np.array([3, 1, 4, -1, 5, 9]), 7)),
        (sign, (-3,)),
        (sign, (0,)),
        (guarded, (np.array([0, 1]), 1)),
        (guarded, (np.array([0, 1]), 2)),
        (guarded, (np.array([0, 1]), 1 << 60)),
        (guarded, (np.array([0, 1]), -6)),
        (is_even, (4,)),
        (is_even, (5,)),
        (swapped, (2, 5)),
        (table_sum, (np.arange(12.0).reshape(3, 4), np.array([1.0, -2.0, 0.5, 3.0]))),
        (table_sum, (np.arange(12, dtype=np.float32).reshape(3, 4), np.ones(4, np.float32))),
    ],
)
def test_results_are_pythons(function, arguments):
    assert call(function, *arguments) == python(function)(*arguments)


def test_a_bool_that_is_returned_is_one_for_other_emitted_functions():
    assert [call(even_and_small, number) for number in (4, 5, 11, 12)] == [5, 3, 3, 5]


def test_arrays_made_here_live_as_long_as_they_are_used():
    for count in (2, 1000):
        assert call(squares, count).tolist() == [i * i for i in range(count)]
        assert call(last_of_squares, count) == (count - 1) ** 2 + 2


def test_an_allocation_that_fails_is_an_error_in_every_caller():
    with pytest.raises(MemoryError):
        call(last_of_squares, 1 << 55)


def test_narrow_elements_are_computed_with_as_int64():
    numbers = np.array([0, 200], np.uint8)
    assert call(narrow, numbers, 1) == 120000
    assert numbers[1] == 120000 % 256


def test_branches_that_constants_rule_out_are_not_emitted():
    array = np.zeros(1, np.float32)
    assert call(pruned, array) == WIDE * njit(lambda array: lanes(array))(array)


@device()
def halved(number):
    return number / 2


@emitted
def quartered(number):
    return halved(halved(number))


def test_device_functions_are_called():
    assert call(quartered, 3.0) == 0.75


@emitted
def byte_plus(number):
    number += 1000
    return number


@emitted
def first_byte_plus(bytes_):
    return byte_plus(bytes_[0])


def test_narrow_arguments_arrive_as_int64():
    assert call(first_byte_plus, np.array([7], np.uint8)) == 1007


def made_with(factor):
    @emitted
    def scaled(number):
        return number * factor

    return scaled


def test_functions_of_one_name_are_told_apart():
    """Those of two closures, and one whose global constant has changed."""
    whole, half, single = made_with(2), made_with(0.5), made_with(np.float32(0.1))
    assert [call(f, 3.0) for f in (whole, half, single)] == [6, 1.5, 3.0 * np.float32(0.1)]
    tenth = made_with(0.1)
    assert njit(lambda x: (tenth(x), single(x), half(x)))(3.0) == (3.0 * 0.1, 3.0 * np.float32(0.1), 1.5)
    text = "@emitted\ndef scaled(number):\n    return number * FACTOR\n"
    lines = {"first.py": text, "second.py": text}
    for file, factor in zip(lines, (2, 3), strict=True):
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        names = {"emitted": emitted, "FACTOR": factor}
        exec(compile(text, file, "exec"), names)
        assert call(names["scaled"], 5) == 5 * factor


def test_a_source_that_changed_meanwhile_is_an_error():
    text = "@emitted\ndef added(number):\n    return number + {}\n"
    now = text.format(2)
    linecache.cache["changed.py"] = (len(now), None, now.splitlines(keepends=True), "changed.py")
    names = {"emitted": emitted}
    exec(compile(text.format(1), "changed.py", "exec"), names)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="source of added has changed"):
            call(names["added"], 5)


def test_an_interrupted_first_call_leaves_nothing_behind(monkeypatch):
    scaled, emit = made_with(7), Emission.emit

    def interrupted(emission):
        monkeypatch.setattr(Emission, "emit", emit)
        raise KeyboardInterrupt

    monkeypatch.setattr(Emission, "emit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(scaled, 3)
    assert call(scaled, 3) == 21


def _fill(numbers, result):
    for i in prange(result.size):
        result[i] = last_of_squares(i + 2) + table_sum(numbers, numbers[0])


@pytest.mark.parametrize("parallel", [False, True])
def test_kernels_call_them_and_are_kept(tmp_path, monkeypatch, parallel):
    monkeypatch.setattr(jit, "cache_folder", lambda: tmp_path)
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    results = []
    for _ in range(2):
        form, result = jit.compiled(_fill, jit.FASTMATH, parallel), np.zeros(40)
        form(numbers, result)
        results.append((form.stats.cache_hits, result.tolist()))
    expected = [(i + 1) ** 2 + 2 + 19.0 for i in range(40)]
    assert [found for _, found in results] == [expected] * 2
    assert [sum(hits.values()) for hits, _ in results] == [0, 1]


def test_what_is_made_is_given_back(allocations):
    early_or_late = njit(lambda n: early(n))
    for count in (1, 5):
        early_or_late(count)
        before = allocations()
        early_or_late(count)
        call(squares, count)
        call(last_of_squares, 2)
        made, freed = (now - earlier for now, earlier in zip(allocations(), before, strict=True))
        assert made == freed > 2


@emitted
def early(count):
    """Returns before the second array is made, or after."""
    first = integers(count)
    first[0] = 1
    if count < 3:
        return first[0]
    second = squares(count)
    return second[1] + first[0]
