"""Puts an emulator where the GPU would be, for as long as a test lasts; or tells what the GPU itself has run."""

import os
from contextlib import contextmanager
from importlib import import_module

from simt.emulator import LAUNCHED, Emulator

BACKENDS = ("cuda", "cupy")

# Set by `make gpu-check`: the tests of GPU kernels run on the machine's GPU.
REAL = os.environ.get("TILEWISE_TEST_GPU") == "1"


def has(backend: str, name: str) -> bool:
    """Whether a backend has a public function."""
    from tilewise import kernels
    from tilewise.kernels.dispatch import implementation_module

    (family,) = (family for family, names in kernels._EXPORTS.items() if name in names)
    return hasattr(implementation_module(backend, family), name)


def real_gpu(backend: str = "cuda"):
    """The machine's GPU as an engine of a backend that notes what is launched."""
    driver = import_module(f"tilewise.kernels.{backend}.driver")

    class Noting(driver.Driver):
        schedule, eager_copies = "real", False

        def start(self, form, grid, shared, stream, slots):
            LAUNCHED.add((form.kernel.name, form.dtype.name))
            super().start(form, grid, shared, stream, slots)

    engine = Noting(0)
    engine.backend, engine.launched = backend, LAUNCHED
    return engine


@contextmanager
def emulated_gpu(emulator: Emulator):
    """Inside, the emulator's backend is there, and its engine is the emulator."""
    from tilewise.kernels import dispatch, machine, operation

    driver = import_module(f"tilewise.kernels.{emulator.backend}.driver")
    engine, missing = driver.engine, machine.unavailable_backends
    driver.engine = lambda ordinal=0: emulator
    machine.unavailable_backends = lambda: {k: v for k, v in missing().items() if k != emulator.backend}
    _forget(dispatch, operation)
    try:
        yield emulator
    finally:
        driver.engine, machine.unavailable_backends = engine, missing
        _forget(dispatch, operation)


def _forget(dispatch, operation):
    dispatch.choose_backend.cache_clear()
    operation.forget_plans()
