"""How the CPU kernels are compiled and cached.

`@kernel` makes a function that runs serially or in parallel from one source; `@device` one that kernels inline.
Nothing is compiled at import: a variant is compiled, or loaded from the cache, at its first call.

The cache. Numba stamps a cached kernel with its own file only, so a changed helper in another file would run stale
machine code, also after an upgrade of this package. Here the stamp is a hash of *all* the kernels' sources, the folder
is the user's cache folder (or NUMBA_CACHE_DIR), and where that cannot be written the kernels are compiled for the
process alone.
"""

import functools
import hashlib
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile
from numba.core.cpu import ParallelOptions
from numba.core.runtime import rtsys

from tilewise.kernels.cpu import threads
from tilewise.kernels.disk_cache import cache_folder, source_stamp

_njit: Any = numba.njit  # its annotations know neither options for `parallel` nor our cache

# contract: fused multiply-add; reassoc: vectorised sums; nsz: -0 is 0. NaN and Inf keep their meaning.
FASTMATH = frozenset({"contract", "reassoc", "nsz"})
# For compensated or shifted sums, whose corrections a reassociating compiler would cancel.
EXACT_ORDER = frozenset({"contract", "nsz"})
# For vectors whose instructions are chosen one by one, and for bits that are to be NumPy's: no contraction either.
AS_WRITTEN = frozenset()

# Only the loops we mark run in parallel: Numba is not to parallelise array expressions behind our backs. Of a plain
# dictionary it would take the options out, and know none of them when it compiles the next kernel.
_PARALLEL = ParallelOptions(
    {
        "prange": True,
        "comprehension": False,
        "reduction": False,
        "inplace_binop": False,
        "setitem": False,
        "numpy": False,
        "stencil": False,
        "fusion": False,
    }
)

# The Numba with whose inner workings device_compiler.py was tested. With another, first calls take longer.
_SHORTENED_FOR = "0.68."


def _shortened_pipelines(version: str) -> tuple[dict, dict, dict]:
    """The options that shorten the compilation of device functions, and of kernels' serial and parallel forms."""
    if not version.startswith(_SHORTENED_FOR):
        return {}, {}, {}
    from tilewise.kernels.cpu.device_compiler import DeviceCompiler, ParallelCompiler, SerialCompiler

    return {"pipeline_class": DeviceCompiler}, {"pipeline_class": SerialCompiler}, {"pipeline_class": ParallelCompiler}


_FOR_DEVICE, _FOR_SERIAL, _FOR_PARALLEL = _shortened_pipelines(numba.__version__)

_DIGITS = 24  # of a hash, in the names of cached code

KERNELS: list["Kernel"] = []  # every kernel of the loaded modules, for `python -m tilewise warmup` and the tests


class Kernel:
    """One source, two compiled forms: `serial`, and `parallel`, in which `prange` loops are split over threads.

    Call it as kernel(work, *args), where work is the estimated serial time in nanoseconds; it decides the form. Both
    forms compute the same bits, because the chunks of a prange are fixed by the problem, never by the thread count.
    """

    __name__: str

    def __init__(self, function: Callable, fastmath: frozenset, parallel: bool, one_by_one: bool = False):
        self.function = function
        self.one_by_one = one_by_one
        self.fastmath = fastmath
        self.has_parallel = parallel
        functools.update_wrapper(self, function)
        KERNELS.append(self)

    @functools.cached_property
    def serial(self):
        return compiled(self.function, self.fastmath, parallel=False)

    @functools.cached_property
    def parallel(self):
        return compiled(self.function, self.fastmath, parallel=True)

    def sized(self, work: float) -> Callable:
        """A callable for repeated calls of this much work: where it is small, the serial form without any detour."""
        if work < threads.SERIAL_BELOW or not self.has_parallel:
            return self.serial
        return functools.partial(self, work)

    def bound(self, work: float, *arguments) -> Callable:
        """As `sized`, for calls whose arguments have the types of these, always: the machine code's own entry.

        It does without Numba's look at every argument, a tenth of a microsecond, and so would take an array of another
        dtype for one of these. A plan's signature rules that out: it holds the operands' shapes and dtypes.
        """
        if work >= threads.SERIAL_BELOW and self.has_parallel:
            return functools.partial(self, work)
        types = tuple(map(numba.typeof, arguments))
        self.serial.compile(types)
        return self.serial.overloads[types].entry_point

    def __call__(self, work: float, *args):
        if work < threads.SERIAL_BELOW or not self.has_parallel or not threads.may_split():
            return self.serial(*args)
        return threads.launch(self.parallel, args, self.one_by_one and work >= threads.ONE_BY_ONE_FROM)


def kernel(
    *, fastmath: frozenset = FASTMATH, parallel: bool = True, one_by_one: bool = False
) -> Callable[[Callable], Kernel]:
    """Decorator for an entry point; without prange loops, say parallel=False.

    one_by_one: its chunks are few and take long, so that a large problem's are handed out one by one (threads.py).

    In the parallel form Numba takes a name's array to be as long as the first one: after h = zeros(3) and, in a loop or
    a branch, h = zeros(5), h[1:] has two elements. One array, one name; or slice in a device function.
    """
    return lambda function: Kernel(function, fastmath, parallel, one_by_one)


def device(
    *, fastmath: frozenset = FASTMATH, inline: str = "never", allocates: bool = False, raises: bool = False
) -> Callable:
    """Decorator for a function that only kernels call; compiled with, and cached inside, each kernel that uses it.

    Arrays are borrowed from the caller: counting references would cost two atomic operations for each array of each
    call, 120 cycles for three, more than copying a short row. A function that makes arrays must count them: allocates.
    One that raises errors with numbers in them needs Numba's own pipeline, to know where it is: raises.

    Numba compiles one anew for each literal number it is called with, and for the unsigned index of a prange: where a
    large one is called with both, write np.int64(0), np.int64(chunk).
    """
    options = {"fastmath": set(fastmath), "error_model": "numpy", "inline": inline, "_nrt": allocates or raises}
    if raises or not _FOR_DEVICE:
        return _njit(**options)
    from tilewise.kernels.cpu.device_compiler import for_kernels

    return lambda function: for_kernels(_njit(**options, **_FOR_DEVICE)(function))


def compiled(function: Callable, fastmath: frozenset, parallel: bool):
    """The Numba dispatcher of one form, cached on disk where possible."""
    if parallel:
        # Numba's cache files are named after the function alone, so the two forms need two names.
        twin = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
        )
        twin.__qualname__ = f"{function.__qualname__}_parallel"
        twin.__module__ = function.__module__
        function = twin
    options: dict[str, Any] = {"fastmath": set(fastmath), "nogil": True, "error_model": "numpy"}
    options |= {"parallel": _PARALLEL, **_FOR_PARALLEL} if parallel else _FOR_SERIAL
    dispatcher = _njit(**options)(function)
    cache = _open_cache(function)
    if cache is not None:
        dispatcher._cache = cache
    return dispatcher


class _Locator:
    """Tells Numba where a function's cache lies and what makes it stale."""

    def __init__(self, folder: Path):
        self._folder = folder

    def ensure_cache_path(self):
        self._folder.mkdir(parents=True, exist_ok=True)

    def get_cache_path(self) -> str:
        return str(self._folder)

    def get_source_stamp(self) -> str:
        return source_stamp()

    def get_disambiguator(self) -> str:
        return ""

    @classmethod
    def from_function(cls, py_func, py_file):
        folder = cache_folder()
        return None if folder is None else cls(folder)


class _CacheImpl(CompileResultCacheImpl):
    _locator_classes = [_Locator]  # noqa: RUF012


class _CacheFile(IndexDataCacheFile):
    """Machine code under names that say what it is, written before the index tells of it.

    Numba numbers the files of a function and writes the index first. A process that is killed in between, or two that
    compile at a time, one of them from older sources, can leave an index that names another signature's code; what
    loads it corrupts its memory.
    """

    def save(self, key, data):
        digest = hashlib.sha256(repr((self._source_stamp, key)).encode()).hexdigest()
        name = self._data_name(int(digest[:_DIGITS], 16))
        self._save_data(name, data)
        overloads = self._load_index()
        if not overloads:
            self._remove_others(name)
        self._save_index(overloads | {key: name})

    def _remove_others(self, name: str):
        """The function's code of older sources."""
        begin, _, end = self._data_name_pattern.partition("{number:d}")
        for file in Path(self._cache_path).iterdir():
            if file.name.startswith(begin) and file.name.endswith(end) and file.name != name:
                with suppress(OSError):
                    file.unlink()


class _Cache(FunctionCache):
    """A function's cache that gives up quietly: a full disk or a lost permission costs time, not the call."""

    _impl_class = _CacheImpl  # pyright: ignore[reportAssignmentType]

    def __init__(self, py_func: Callable):
        super().__init__(py_func)
        impl: Any = self._impl
        self._cache_file = _CacheFile(self.cache_path, impl.filename_base, impl.locator.get_source_stamp())

    def load_overload(self, sig, target_context):
        try:
            if not numba.__version__.startswith(_SHORTENED_FOR):
                return super().load_overload(sig, target_context)
            # Numba would load all that it can compile (and SciPy, where it is installed), 0.2 s, to link machine code
            # that needs nothing of it but the counting of references. Whatever is compiled later still makes it do so.
            rtsys.initialize(target_context)
            with self._guard_against_spurious_io_errors():
                return self._load_overload(sig, target_context)
        except (OSError, EOFError, ValueError):
            return None

    def save_overload(self, sig, data):
        try:
            super().save_overload(sig, data)
        except OSError:
            self.disable()


def _open_cache(function: Callable) -> _Cache | None:
    try:
        return _Cache(function)
    except (OSError, RuntimeError):  # no writeable folder, or the sources cannot be found or read
        return None
