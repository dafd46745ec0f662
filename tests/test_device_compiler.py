"""The short way in which kernels are compiled: what it leaves out is not missed, what it borrows is given back."""

import gc
import operator

import numba
import numpy as np
import pytest
from numba import prange, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Flags
from numba.core.errors import TypingError
from numba.core.registry import cpu_target
from numba.core.runtime import _nrt_python, rtsys
from numba.extending import intrinsic, overload

from tilewise.kernels.cpu import jit
from tilewise.kernels.cpu.device_compiler import _FixedFlags, _needed
from tilewise.kernels.cpu.device_typing import _known
from tilewise.kernels.cpu.jit import device

pytestmark = pytest.mark.skipif(
    not numba.__version__.startswith(jit._SHORTENED_FOR), reason="with another Numba its own pipelines compile kernels"
)


@pytest.fixture(autouse=True)
def nothing_cached(monkeypatch):
    monkeypatch.setattr(jit, "_open_cache", lambda function: None)


def run(function, *args, parallel: bool = False):
    """What a kernel writes that calls the function for each of eight places; and its form."""

    def fill(result, *args):
        for i in prange(result.size):
            result[i] = function(i, *args)

    form = jit.compiled(fill, jit.FASTMATH, parallel)
    result = np.empty(8)
    form(result, *args)
    return result, form


@device()
def innermost(x):
    return x + 1


@device()
def left(x):
    return innermost(x) * 2


@device()
def right(x):
    return innermost(x) * 3


@device()
def both(i, x):
    return left(x + i) + right(x + i) - innermost(x)


@device(allocates=True)
def of_arrays(i, x):
    steps = np.arange(4) * 0.5
    whole = (steps * x + i) / 2.0
    return whole.sum() + np.array([1.0, x, i])[i % 3] + (-whole)[i % 4]


@device(allocates=True)
def of_closures(i, x):
    squares = [k * k for k in range(i + 1)]

    def scaled(value):
        return value * x

    return scaled(len(squares)) + squares[i]


@device(allocates=True)
def of_branches(i, x):
    kept, count, mixed = np.zeros(2), 0, (i, x)
    while count < i:
        if count % 2:
            kept = np.full(2, x * count)
        elif x > count:
            x -= 1
        count += 1
    return kept[0] + kept[1] + x + mixed[1]


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("function", [both, of_arrays, of_closures, of_branches])
def test_compiled_functions_compute_what_python_does(function, parallel):
    if function is both:
        expected = [(2 + 3) * (2.5 + i + 1) - (2.5 + 1) for i in range(8)]
    else:
        expected = [function.py_func(i, 2.5) for i in range(8)]
    result, _ = run(function, 2.5, parallel=parallel)
    np.testing.assert_allclose(result, expected, rtol=1e-14)


@device()
def refuses(i, x):
    if x < i:
        raise ValueError("a text alone")
    return x


@device(raises=True)
def refuses_with_numbers(i, x):
    if x < i:
        raise ValueError("a number too", i)
    return x


@pytest.mark.parametrize(
    ("function", "told"), [(refuses, ("a text alone",)), (refuses_with_numbers, ("a number too", 3))]
)
def test_errors_are_raised(function, told):
    np.testing.assert_array_equal(run(function, 7.5)[0], 7.5)
    with pytest.raises(ValueError, match=told[0]) as error:
        run(function, 2.5)
    assert error.value.args == told


def allocated(function, parallel: bool) -> int:
    """How many arrays and lists it made in eight calls, and gave back."""
    _nrt_python.memsys_enable_stats()
    try:
        before = rtsys.get_allocation_stats()
        run(function, 2.5, parallel=parallel)
        after = rtsys.get_allocation_stats()
    finally:
        _nrt_python.memsys_disable_stats()
    assert after.mi_alloc - before.mi_alloc == after.mi_free - before.mi_free
    return after.mi_alloc - before.mi_alloc


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("function", [of_arrays, of_closures, of_branches])
def test_as_many_arrays_are_made_as_by_numba_s_own_pipeline_and_all_given_back(function, parallel):
    ours = allocated(function, parallel)
    assert ours == allocated(numba.njit(function.py_func), parallel) > 0


def test_a_kernel_links_each_function_once_and_callers_first():
    _, form = run(both, 2.5)
    (compiled,) = form.overloads.values()
    names = [library.name for library in _needed(compiled.library)]
    assert sorted(names) == sorted([*(f.__qualname__ for f in (both, left, right, innermost)), "nrt"])
    assert names.index("both") < names.index("left") < names.index("innermost")


def test_numba_s_own_functions_link_all_that_a_device_function_calls():
    assert numba.njit(lambda x: both(1, x))(2.5) == (2 + 3) * 4.5 - 3.5


def test_a_function_returns_what_it_borrowed(monkeypatch):
    """Also where the compilation fails."""

    @device()
    def wrong(i, x):
        return x.no_such_thing

    run(innermost)
    with pytest.raises(TypingError, match="no_such_thing"):
        run(wrong, 2.5)
    assert "refresh" not in vars(cpu_target.target_context)
    assert "get_call_type" not in vars(types.Function)
    assert gc.isenabled()
    assert numba.njit(lambda x: x * 2)(3) == 6


def test_a_user_s_function_is_compiled_by_numba_also_in_the_midst_of_a_kernel():
    compiled = []

    @intrinsic
    def seven(typingctx):
        user = numba.njit(lambda x: x + 4)
        compiled.append((user, user(3)))
        return types.int64(), lambda context, builder, signature, args: context.get_constant(types.int64, 7)

    @device()
    def calls(i):
        return seven() + i

    result, _ = run(calls)
    np.testing.assert_array_equal(result, np.arange(8) + 7)
    ((user, value),) = compiled
    assert value == 7
    (result,) = user.overloads.values()
    assert type(result.library) is JITCodeLibrary
    assert result.fndesc.llvm_cfunc_wrapper_name in result.library.get_llvm_str()


def test_overloads_are_found_that_come_after_a_kernel():
    def part(x):
        """Overloaded below."""

    overload(part)(lambda x: (lambda x: x + 1) if isinstance(x, types.Integer) else None)

    @device()
    def of_integers(i):
        return part(i)

    np.testing.assert_array_equal(run(of_integers)[0], np.arange(8) + 1)
    overload(part)(lambda x: (lambda x: x + 2) if isinstance(x, types.Float) else None)

    @device()
    def of_both(i):
        return part(i * 1.0) + part(i)

    np.testing.assert_array_equal(run(of_both)[0], np.arange(8) * 2 + 3)


def test_calls_are_remembered_but_not_those_that_numba_compiles_for_their_caller():
    """Their machine code has the rounding that the caller's options allow."""

    @device()
    def sums(i, x):
        return max(x, i * 0.5) + min(i, 3) - x

    run(sums, 2.5)
    remembered = {function.typing_key for function, _ in _known}
    assert operator.add in remembered
    assert not {min, max} & remembered


def test_frozen_objects_stay_frozen():
    gc.freeze()
    try:
        run(innermost)
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()


def test_fixed_flags_equal_others_and_copies_of_them_are_free():
    flags = Flags()
    flags.nrt = True
    fixed = _FixedFlags(flags)
    assert fixed == flags
    assert hash(fixed) == hash(flags)
    free = fixed.copy()
    free.nrt = False
    assert (free.values()["nrt"], fixed.values()["nrt"]) == (False, True)
    assert free != fixed
