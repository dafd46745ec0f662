"""Compiles every GPU kernel for the GPU at hand and loads it, in several processes: the tests find them compiled.

PTX and machine code come to tilewise's cache (kernels/cuda/ptx_cache.py, kernels/cupy/module.py), what the driver makes
of PTX to its own. A kernel that fails is
named, and the others go on.
"""

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context


def _load(form: tuple[str, str]) -> tuple[str, float, str]:
    """(the form, seconds, what went wrong)."""
    import numpy as np
    from gpu_compile import backend_of, load_kernels

    (name, dtype), begin = form, time.monotonic()
    try:
        (kernel,) = [k for k in load_kernels() if k.name == name]
        engine = import_module(f"tilewise.kernels.{backend_of(kernel)}.driver").engine(0)
        if kernel.runs_on(engine.capability):
            with engine.current():
                engine._load(kernel.form(np.dtype(dtype)))
        wrong = ""
    except Exception as error:  # the others are to be loaded all the same
        wrong = f"{type(error).__name__}: {str(error)[-600:]}"
    return f"{name} {dtype}", time.monotonic() - begin, wrong


def main() -> int:
    from gpu_compile import load_kernels

    # what takes long first: products before what moves numbers
    kernels = sorted(load_kernels(), key=lambda k: not any(p in ("HMMA", "FFMA") for p in k.promises(k.dtypes[-1])))
    forms = [(k.name, d.name) for k in kernels for d in k.dtypes]
    begin, failed, slowest = time.monotonic(), [], []
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 16), get_context("spawn")) as pool:
        for name, seconds, wrong in pool.map(_load, forms):
            slowest = sorted([*slowest, (seconds, name)])[-5:]
            if wrong:
                failed.append(name)
                print(f"FAILED {name}: {wrong}", flush=True)
    print(
        f"{len(forms) - len(failed)} of {len(forms)} kernels loaded in {time.monotonic() - begin:.0f} s; the slowest:"
    )
    print(", ".join(f"{name} {seconds:.1f} s" for seconds, name in reversed(slowest)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
