"""What emitted functions do not understand is an error when a kernel is compiled, never another meaning."""

import numpy as np
import pytest
from numba.core.errors import TypingError
from test_emitted import call, collatz, squares

from tilewise.kernels.cpu.emitted import emitted
from tilewise.kernels.cpu.scratch import integers


@emitted
def makes_in_a_loop(count):
    for _ in range(count):
        made = integers(3)
        made[0] = 1


@emitted
def reads_backwards(numbers):
    return numbers[-1]


@emitted
def walks_an_array(numbers):
    for number in numbers:
        numbers[0] = number


@emitted
def changes_its_mind(numbers):
    total = numbers
    total = 1
    return total


@emitted
def rounds_its_total(numbers):
    total = 0
    for i in range(numbers.size):
        total += numbers[i]
    return total


@emitted
def narrows_its_total(numbers, factor):
    total = numbers[0]
    total = total * factor
    return total


@emitted
def returns_either(numbers, i):
    if i > 0:
        return i
    return numbers[0]


@emitted
def smaller(numbers):
    return min(numbers[0], 1)


@emitted
def at_a_fraction(numbers):
    return numbers[numbers[0]]


@emitted
def makes_twins(count):
    made = other = integers(count)
    return made[0] + other[0]


@emitted
def gives_one_up(count):
    made, other = integers(count), integers(count)
    made = other
    return made[0]


@emitted
def returns_a_part(count):
    made = integers(count)
    return made[1:]


@emitted
def returns_one_of_two(count):
    made, other = integers(count), integers(count)
    if count > 3:
        return made
    return other


@emitted
def returns_what_it_was_given(numbers):
    return numbers


@emitted
def drops(count):
    squares(count)


@emitted
def loops_else(count):
    for _ in range(count):
        count -= 1
    else:
        return 1
    return count


@emitted
def count_or_one(count):
    return (count or 1) + 1


@emitted
def by_name(count):
    return collatz(n=count)


@emitted
def sometimes(count):
    if count > 1:
        return count


@emitted
def bare(count):
    if count > 1:
        return count
    return


@emitted
def half_an_array(count):
    made = integers(count * 0.5)
    return made[0]


@pytest.mark.parametrize(
    ("function", "arguments", "words"),
    [
        (makes_twins, (3,), "needs one name"),
        (gives_one_up, (3,), "another array already"),
        (returns_a_part, (3,), "one array is returned"),
        (returns_one_of_two, (3,), "one array is returned"),
        (returns_what_it_was_given, (np.ones(2),), "one array is returned"),
        (drops, (3,), "needs a name"),
        (loops_else, (3,), "else of a loop"),
        (count_or_one, (3,), "what is no bool"),
        (by_name, (3,), "by name"),
        (sometimes, (3,), "not at its end"),
        (bare, (3,), "does so everywhere"),
        (half_an_array, (3,), "float64 is no int64"),
        (rounds_its_total, (np.ones(2),), "float64 is no int64"),
        (narrows_its_total, (np.ones(2, np.float32), 0.5), "float64 is no float32"),
        (returns_either, (np.ones(2), 1), "float64 is no int64"),
        (smaller, (np.ones(2),), "float64 is no integer"),
        (at_a_fraction, (np.ones(2),), "float64 is no integer"),
        (makes_in_a_loop, (3,), "array made in a loop"),
        (reads_backwards, (np.zeros(2),), "negative indices"),
        (walks_an_array, (np.zeros(2),), "range"),
        (changes_its_mind, (np.zeros(2),), "cannot emit changes_its_mind, line 4"),
        (collatz, (np.zeros(2),), "nothing in common"),
    ],
)
def test_what_is_not_understood_is_an_error(function, arguments, words):
    for _ in range(2):  # the first leaves nothing behind that would hide what is wrong
        with pytest.raises((TypeError, TypingError), match=words):
            call(function, *arguments)
