"""Where compiled kernels are kept, of the CPU and of the GPU, and what makes them stale."""

import hashlib
import os
import sys
from functools import lru_cache
from pathlib import Path


def cache_folder() -> Path | None:
    """Where compiled kernels are kept, or None where no folder can be written.

    One folder for each installation, so that two environments of one user do not overwrite each other's kernels. It is
    not called `tilewise`: where NUMBA_CACHE_DIR is the working folder, that would hide an editable installation.
    """
    base = os.environ.get("NUMBA_CACHE_DIR")
    if not base:
        base = os.environ.get("XDG_CACHE_HOME") or _user_cache_folder()
    place = hashlib.sha256(str(_package_folder()).encode()).hexdigest()[:12]
    folder = Path(base) / "tilewise-kernels" / place
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def _user_cache_folder() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path.home() / ".cache"


def _package_folder() -> Path:
    return Path(__file__).resolve().parent


@lru_cache(maxsize=4)
def source_stamp(backend: str = "") -> str:
    """A hash over every kernel source, or one backend's: when any of them changes, no cached kernel is used."""
    digest = hashlib.sha256()
    files = (_package_folder() / backend).glob("**/*")
    for path in sorted(file for file in files if file.suffix in (".py", ".cu", ".cuh")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
