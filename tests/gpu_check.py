"""`make gpu-check`: on a machine with a GPU, all tests of the GPU kernels on it, then their speed beside PyTorch's.

Needs what a CUDA image has (NumPy, Numba, numba-cuda, CuPy, PyTorch, pytest) and this checkout; installs nothing and
fetches nothing. Every step runs, whatever the others say; the exit status tells whether all went well.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 470  # under eight minutes, whatever hangs
ABOUT = """
import importlib.metadata as m, sys
print("Python", sys.version.split()[0])
for name in ("numpy", "numba", "numba-cuda", "cuda-bindings", "torch", "pytest", "cupy-cuda12x", "cupy-cuda13x"):
    try:
        print(name, m.version(name))
    except m.PackageNotFoundError:
        print(name, "is not there")
import tilewise
print("tilewise from", tilewise.__file__)
devices = tilewise.devices()
print(*devices, sep="\\n")
sys.exit(0 if any(d.kind == "gpu" and d.backends["cuda"] is None for d in devices) else 3)
"""


def link_packages(folder: Path) -> Path:
    """A folder for PYTHONPATH in which the checkout is importable as tilewise, without an installation."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = {name: ROOT / place for name, place in settings["package-dir"].items()}
    top = folder / "tilewise"
    top.mkdir()
    for file in packages.pop("tilewise").iterdir():
        (top / file.name).symlink_to(file)
    for name, place in packages.items():
        (top / name.removeprefix("tilewise.")).symlink_to(place)
    return folder


def steps(pytest_arguments: list[str], peers_arguments: list[str]) -> dict[str, tuple[list[str], float]]:
    """name -> (arguments of Python, the share of the time that it may take)."""
    # the others look at what is compiled, and at the driver with none behind it
    elsewhere = ("test_cuda_compile.py", "test_cuda_driver.py", "test_cuda_mutations.py")
    files = sorted(str(p) for p in (ROOT / "tests").glob("test_cuda_*.py") if p.name not in elsewhere)
    # the project's own options name plugins that may not be there
    options = ["-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "-ra", "-q", "--durations=5"]
    return {
        "the machine": (["-c", ABOUT], 0.1),
        "tests on the GPU": (["-m", "pytest", *options, *files, *pytest_arguments], 0.55),
        "beside PyTorch": (["-m", "tilewise.benchmarks.gpu_peers", *peers_arguments], 0.45),
    }


def run_all(chosen: dict, environment: dict[str, str], seconds: float = SECONDS) -> dict[str, str]:
    """Runs every step; name -> what came of it, "ok" where it went well."""
    outcomes, end = {}, time.monotonic() + seconds
    for name, (arguments, share) in chosen.items():
        print(f"\n==== {name}", flush=True)
        limit = max(1.0, min(seconds * share, end - time.monotonic()))
        try:
            done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, timeout=limit, check=False)
            outcomes[name] = "ok" if done.returncode == 0 else f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            outcomes[name] = f"ended after {limit:.0f} s"
    return outcomes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pytest", default="", help="more arguments for pytest")
    parser.add_argument("--peers", default="", help="more arguments for tilewise.benchmarks.gpu_peers")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(link_packages(Path(folder))), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(p for p in paths if p),
            "TILEWISE_TEST_GPU": "1",
            "NUMBA_CACHE_DIR": os.environ.get("NUMBA_CACHE_DIR", str(ROOT / ".cache" / "numba")),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        outcomes = run_all(steps(args.pytest.split(), args.peers.split()), environment)
    print("\n==== summary")
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome}")
    return 0 if set(outcomes.values()) == {"ok"} else 1


if __name__ == "__main__":
    sys.exit(main())
