"""`make gpu-check`: on a machine with a GPU, all tests of the GPU kernels on it, then their speed beside PyTorch's.

Needs what a CUDA image has (NumPy, Numba, numba-cuda, CuPy, PyTorch, pytest) and this checkout; installs nothing and
fetches nothing. Where there is a GPU, every step runs, whatever the others say, each command in a process of its own,
since an error on a GPU spoils its process for all that follows; the exit status tells whether all went well. What came
of it is written to `--out` as it goes: gpu-check.json, tests.log and the timings.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "gpu"
SECONDS = 470  # under eight minutes, whatever hangs
HANGS = 60  # seconds of a test after which pytest tells where it is
FILE_SHARE = 0.6  # of its step's time, for one of the commands side by side: one that hangs leaves the others some
ABOUT = """
import importlib.metadata as m, sys
print("Python", sys.version.split()[0])
for name in ("numpy", "numba", "numba-cuda", "cuda-bindings", "torch", "pytest", "cupy-cuda12x", "cupy-cuda13x",
             "ml_dtypes"):
    try:
        print(name, m.version(name))
    except m.PackageNotFoundError:
        print(name, "is not there")
import tilewise
print("tilewise from", tilewise.__file__)
devices = tilewise.devices()
print(*devices, sep="\\n")
sys.exit(0 if any(d.kind == "gpu" and None in d.backends.values() for d in devices) else 3)
"""


@dataclass(frozen=True)
class Step:
    """commands: name -> arguments of Python, in which {seconds} stands for the time that is left for it.

    share: of all the time, at most. log: where the output of commands that run side by side goes. needed: without it,
    the steps after it have no sense.
    """

    commands: dict[str, list[str]]
    share: float
    log: Path | None = None
    needed: bool = False


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


def steps(pytest_arguments: list[str], peers_arguments: list[str], out: Path = OUT) -> list[Step]:
    """Correctness before timings; what compiles in many processes before what would compile one by one."""
    # the others look at what is compiled, and at the driver with none behind it
    elsewhere = ("compile", "driver", "module", "mutations")
    found = [*(ROOT / "tests").glob("test_cuda_*.py"), *(ROOT / "tests").glob("test_cupy_*.py")]
    files = [p for p in sorted(found) if p.stem.rpartition("_")[2] not in elsewhere]
    # the project's own options name plugins that may not be there
    options = ["-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "-ra", "-q", "--durations=5"]
    options += ["-o", f"faulthandler_timeout={HANGS}"]
    tests = {p.name: ["-m", "pytest", *options, str(p), *pytest_arguments] for p in files}
    peers = ["-m", "tilewise.benchmarks.gpu_peers", "--budget", "{seconds}", "--results", str(out), *peers_arguments]
    return [
        Step({"the machine": ["-c", ABOUT]}, 0.1, needed=True),
        Step({"kernels compiled and loaded": [str(ROOT / "tests" / "gpu_load.py")]}, 0.35),
        Step(tests, 0.4, out / "tests.log"),
        Step({"beside PyTorch": peers}, 1.0),
    ]


def _run(arguments: list[str], environment: dict[str, str], limit: float, **output) -> str:
    """Runs one command; "ok" where it went well, else what came of it."""
    given = [a.replace("{seconds}", f"{max(limit - 25, 1):.0f}") for a in arguments]
    try:
        done = subprocess.run([sys.executable, *given], cwd=ROOT, env=environment, timeout=limit, check=False, **output)
    except subprocess.TimeoutExpired:
        return f"ended after {limit:.0f} s"
    return "ok" if done.returncode == 0 else f"exit status {done.returncode}"


def _run_side_by_side(step: Step, environment: dict[str, str], limit: float, folder: Path) -> dict[str, str]:
    """Runs a step's commands at the same time; their output goes to its log, and the end of each is printed."""
    assert step.log is not None
    end = time.monotonic() + limit

    def run(name: str) -> tuple[str, str]:
        with (folder / name).open("w") as log:
            left = max(1.0, min(FILE_SHARE * limit, end - time.monotonic()))
            return name, _run(step.commands[name], environment, left, stdout=log, stderr=subprocess.STDOUT)

    outcomes = {}
    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // 2))) as pool, step.log.open("w") as whole:
        for name, outcome in pool.map(run, step.commands):
            said = (folder / name).read_text(errors="replace")
            whole.write(f"==== {name}: {outcome}\n{said}\n")
            whole.flush()
            print(f"---- {name}: {outcome}\n{said[-3000:]}", flush=True)
            outcomes[name] = outcome
    return outcomes


def run_all(chosen: list[Step], environment: dict[str, str], out: Path, seconds: float = SECONDS) -> dict[str, str]:
    """Runs every step; name -> what came of it, "ok" where it went well. Also written to gpu-check.json, as it goes."""
    out.mkdir(parents=True, exist_ok=True)
    outcomes, begin = {}, time.monotonic()
    for step in chosen:
        print(f"\n==== {', '.join(step.commands)}", flush=True)
        limit = max(1.0, min(seconds * step.share, begin + seconds - time.monotonic()))
        if step.log is None:
            outcomes |= {name: _run(arguments, environment, limit) for name, arguments in step.commands.items()}
        else:
            with tempfile.TemporaryDirectory() as folder:
                outcomes |= _run_side_by_side(step, environment, limit, Path(folder))
        about = {"outcomes": outcomes, "seconds": round(time.monotonic() - begin)}
        (out / "gpu-check.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        if step.needed and any(outcomes[name] != "ok" for name in step.commands):
            print("\nthere is no GPU that tilewise can use: nothing else was run")
            break
    return outcomes


def environment_with(packages: Path) -> dict[str, str]:
    """The environment of all commands: the checkout, caches that later processes find, NVIDIA's compiler."""
    cache = ROOT / ".cache"
    paths = [str(packages), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    made = {
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "TILEWISE_TEST_GPU": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    kept = {
        "NUMBA_CACHE_DIR": str(cache / "numba"), "CUDA_CACHE_PATH": str(cache / "nv"),
        "CUDA_CACHE_MAXSIZE": str(4 << 30),
    }  # fmt: skip
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if Path(nvcc).exists():  # where numba-cuda looks for libNVVM
        kept["CUDA_HOME"] = str(Path(nvcc).resolve().parent.parent)
    return kept | os.environ | made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pytest", default="", help="more arguments for pytest")
    parser.add_argument("--peers", default="", help="more arguments for tilewise.benchmarks.gpu_peers")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for what is written")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    with tempfile.TemporaryDirectory() as folder:
        environment = environment_with(link_packages(Path(folder)))
        outcomes = run_all(steps(args.pytest.split(), args.peers.split(), out), environment, out, args.seconds)
    print("\n==== summary")
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome}")
    return 0 if set(outcomes.values()) == {"ok"} else 1


if __name__ == "__main__":
    sys.exit(main())
