"""What is installed: every module, nothing of another name, usable from anywhere, also where nothing can be written."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from installation import ROOT, SETUPTOOLS, install_copy, run_python, source_folder

import tilewise

CALL = """
    import numpy as np, tilewise
    x = np.arange(-4, 4, dtype=np.float32).reshape(1, 1, 2, 4)
    print(tilewise.relu(x).sum(), tilewise.max_pool2d(x, 2).ravel().tolist(), tilewise.__file__)
"""
RESULT = "6.0 [1.0, 3.0]"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources: a build leaves files behind that the next one would take in."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for mapped in SETUPTOOLS["package-dir"].values():
        shutil.copytree(ROOT / mapped, copy / mapped, ignore=shutil.ignore_patterns("__pycache__", "results"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(folder), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


def files_of_the_repository(*suffixes: str) -> set[str]:
    """The path in an installation of every file with one of the suffixes below the mapped folders."""
    paths = set()
    for package, folder in SETUPTOOLS["package-dir"].items():
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in suffixes:
                paths.add("/".join((*package.split("."), *file.relative_to(ROOT / folder).parts)))
    return paths


def test_every_folder_with_python_files_is_a_listed_package():
    found = {path.rpartition("/")[0].replace("/", ".") for path in files_of_the_repository(".py")}
    assert found == set(SETUPTOOLS["packages"])


def test_every_package_has_an_init_file():
    assert [p for p in SETUPTOOLS["packages"] if not (source_folder(p) / "__init__.py").exists()] == []


def test_wheel_holds_every_module_and_kernel_source_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == files_of_the_repository(".py", ".cu", ".cuh") | {"tilewise/kernels/gpu_choices.json"}
    assert "tilewise/kernels/cupy/src/pool_average.cu" in names


def test_wheel_works_from_another_folder(wheel, tmp_path):
    target = tmp_path / "target"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    assert {entry.name for entry in target.iterdir() if entry.suffix != ".dist-info"} == {"tilewise"}
    printed = run_python(CALL, tmp_path, target)
    assert printed == f"{RESULT} {target / 'tilewise' / '__init__.py'}"
    command = "import tilewise.cli; tilewise.cli.main(['bench', '--all', '--match', 'relu lenet5'])"
    assert "64x120" in run_python(command, tmp_path, target)


@pytest.mark.parametrize("variable", ["NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"])
def test_works_where_no_cache_can_be_written(variable, tmp_path):
    """A folder below a regular file cannot be made by anybody, not even by root."""
    (tmp_path / "file").write_text("")
    installed = install_copy(tmp_path / "installed")
    before = sorted(installed.rglob("*"))
    unwriteable = {"NUMBA_CACHE_DIR": None, "XDG_CACHE_HOME": None} | {variable: str(tmp_path / "file" / "below")}
    folder = "from tilewise.kernels.cpu.jit import cache_folder; print(cache_folder(), end=' ')\n"
    printed = run_python(folder + CALL.replace("\n    ", "\n"), tmp_path, installed, **unwriteable)
    assert printed.startswith(f"None {RESULT}")
    assert sorted(installed.rglob("*")) == before, "the installation itself was written to"


def test_import_loads_no_third_party_module(tmp_path):
    code = """
        import sys
        before = set(sys.modules)
        import tilewise
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(sorted(new - {"tilewise"} - sys.stdlib_module_names))
    """
    assert run_python(code, tmp_path) == "[]"


def test_import_compiles_nothing_and_starts_no_threads(tmp_path):
    code = """
        import importlib, threading, numba
        from tilewise import kernels
        from tilewise.kernels.cpu import jit
        for name in kernels.__all__:
            getattr(kernels, name)
        for family in kernels._EXPORTS:
            if family != "dispatch":
                importlib.import_module(f"tilewise.kernels.cpu.{family}")
        assert jit.KERNELS
        print([k.__name__ for k in jit.KERNELS if {"serial", "parallel"} & set(vars(k))], threading.active_count())
        try:
            print(numba.threading_layer())
        except ValueError:
            print("no layer")
    """
    assert run_python(code, tmp_path).splitlines() == ["[] 1", "no layer"]


def test_no_module_shares_its_name_with_a_public_function():
    """Importing such a module would put it in the function's place."""
    files = {file.stem for file in source_folder("tilewise.kernels").glob("*.py")}
    assert files & set(tilewise.kernels.__all__) == set()


def test_version_is_the_project_s():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert tilewise.__version__ == project["version"]
