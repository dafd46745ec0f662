"""Puts an emulator where the GPU would be, for as long as a test lasts."""

from contextlib import contextmanager

from simt.emulator import Emulator


@contextmanager
def emulated_gpu(emulator: Emulator):
    """Inside, backend "cuda" is there, and its engine is the emulator."""
    from tilewise.kernels import dispatch, machine, operation
    from tilewise.kernels.cuda import driver

    engine, missing = driver.engine, machine.unavailable_backends
    driver.engine = lambda ordinal=0: emulator
    machine.unavailable_backends = lambda: {k: v for k, v in missing().items() if k != "cuda"}
    _forget(dispatch, operation)
    try:
        yield emulator
    finally:
        driver.engine, machine.unavailable_backends = engine, missing
        _forget(dispatch, operation)


def _forget(dispatch, operation):
    dispatch.choose_backend.cache_clear()
    operation.forget_plans()
