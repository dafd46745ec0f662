"""The public functions inside the user's own `@numba.njit` functions, by name and with the same arguments.

    @numba.njit(parallel=True)
    def features(images, weight):
        result = np.empty(...)
        for i in numba.prange(len(images)):
            result[i] = tilewise.max_pool2d(tilewise.conv2d(images[i], weight, activation="relu"), 2)

Numba calls `init` when it first compiles something (entry point `numba_extensions` of pyproject.toml), which only
tells it the names. Each family's file (activation.py, conv.py, ...) is loaded when one of its functions is met. There,
a function of the public one's name takes the types of the arguments, as `numba.extending.overload` wants it, and
returns what to compile.

What is compiled into the user's function is thin: it checks shapes and calls machine code that is the same as that of
the Python call (linking.py), in its serial form: threads are the user's, by his own prange. No Python runs in it.
"""

from importlib import import_module
from importlib.util import find_spec
from inspect import Parameter, signature


def init():
    """Tell Numba of every public function."""
    from tilewise.kernels import _EXPORTS

    for family, names in _EXPORTS.items():
        if family != "dispatch":  # nothing there is an operation
            for name in names:
                _register(family, name)


def _register(family: str, name: str):
    from numba.extending import overload

    public = getattr(import_module(f"tilewise.kernels.{family}"), name)

    def typed(*args, **options):
        return _implementation(family, name)(*args, **options)

    # Numba knows no arguments that are given by name alone; and what follows an argument with a default must have one.
    arguments = [
        p.replace(kind=Parameter.POSITIONAL_OR_KEYWORD, annotation=Parameter.empty)
        if p.kind is not Parameter.KEYWORD_ONLY or p.default is not Parameter.empty
        else Parameter(p.name, Parameter.POSITIONAL_OR_KEYWORD, default=None)
        for p in signature(public).parameters.values()
    ]
    vars(typed)["__signature__"] = signature(public).replace(parameters=arguments)
    overload(public, prefer_literal=True, target="cpu")(typed)


def _implementation(family: str, name: str):
    from numba.core.errors import TypingError

    place = f"tilewise.kernels.njit.{family}"
    function = getattr(import_module(place), name, None) if find_spec(place) else None
    if function is None:
        raise TypingError(f"{name}: cannot be called inside @njit; call it from Python")
    return function
