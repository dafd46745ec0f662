"""Installations of tilewise in a folder of their own, and Python processes that use them."""

import os
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def source_folder(package: str) -> Path:
    """Where a package's files lie in the repository, by the mapping in pyproject.toml."""
    mapping = SETUPTOOLS["package-dir"]
    name, inner = package, []
    while name not in mapping:
        name, _, last = name.rpartition(".")
        inner.insert(0, last)
    return ROOT.joinpath(mapping[name], *inner)


def install_copy(folder: Path) -> Path:
    """Copy the packages into `folder` as an installation lays them out; to be put on PYTHONPATH."""
    for package in SETUPTOOLS["packages"]:
        target = folder.joinpath(*package.split("."))
        target.mkdir(parents=True, exist_ok=True)
        for file in source_folder(package).glob("*.py"):
            shutil.copy(file, target)
    return folder


def run_python(code: str, folder: Path, path: Path | None = None, **environment: str | None) -> str:
    """Run `code` in a new process with `folder` as working directory; what it printed. Fails if the process does.

    path: put on PYTHONPATH, before the installation under test. environment: set, or where None removed.
    """
    variables = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(path or "")}
    variables |= {name: value for name, value in environment.items() if value is not None}
    for name in [name for name, value in environment.items() if value is None]:
        variables.pop(name, None)
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()
