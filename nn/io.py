"""Arrays by name in files: NumPy's npz, safetensors, and (to read) PyTorch's.

    nn.save(model.state_dict(), "model.safetensors")
    model.load_state_dict(nn.load("resnet18.pth"))

Nothing in a file is executed: npz is read without pickles, PyTorch's with weights_only.
"""

import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np

Arrays = dict[str, np.ndarray]
# What NumPy and zipfile raise when bits of an npz file are changed.
_DAMAGE = (ValueError, TypeError, OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)


def save(state: Mapping[str, np.ndarray], path: str | Path):
    """Write arrays by name, as `Module.state_dict` gives them. The path's ending is the format: .npz or .safetensors.

    The file appears under its name when it is complete: what was there before stays until then, and whatever happens.

    Raises:
        ValueError: another ending.
        TypeError: a value is no array of numbers.
        ImportError: safetensors is not installed (extra: io).
    """
    write = _chosen("save", path, {".npz": _write_npz, ".safetensors": _write_safetensors})
    arrays = {name: np.asarray(value, order="C") for name, value in state.items()}
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise TypeError(f"save: {name} is {array.dtype}, not an array of numbers")
    with replacing(path) as file:
        write(arrays, file)


def load(path: str | Path) -> Arrays:
    """The arrays of a file by name, for `Module.load_state_dict`; bfloat16, which NumPy does not have, as float32.

    Args:
        path: of a .npz, .safetensors, .pt or .pth file, the last two from torch.save(model.state_dict(), path).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another ending; the file is damaged, or holds something else than arrays by name.
        ImportError: safetensors (extra: io) or PyTorch is not installed.
    """
    formats = {".npz": _read_npz, ".safetensors": _read_safetensors, ".pt": _read_torch, ".pth": _read_torch}
    return _chosen("load", path, formats)(path)


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to, in the same folder; it takes the place of what is at `path` at the end, if all went well."""
    final = Path(os.path.realpath(path))  # a link stays one
    unfinished = final.with_name(f".{final.name}.{uuid4().hex}")
    try:
        with open(unfinished, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the content is on disk before the name is
        os.replace(unfinished, final)
    finally:
        unfinished.unlink(missing_ok=True)


def _chosen(function: str, path: str | Path, formats: Mapping[str, Any]) -> Any:
    ending = Path(path).suffix.lower()
    if ending not in formats:
        raise ValueError(f"{function}: {os.fspath(path)!r} must end in one of {', '.join(formats)}")
    return formats[ending]


def _damaged(path: str | Path, kind: str, error: Exception) -> ValueError:
    return ValueError(f"load: {os.fspath(path)!r} is damaged or not {kind}: {error or type(error).__name__}")


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError('.safetensors files need safetensors: pip install "tilewise[io]"') from error
    return safetensors


def _write_npz(arrays: Arrays, file: BinaryIO):
    """As np.savez, which cannot write an array named "file"."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def _write_safetensors(arrays: Arrays, file: BinaryIO):
    """By way of memory: the library's save_file gives the file another mode, and a full disk an error of its own."""
    file.write(_safetensors().numpy.save(arrays))


def _read_npz(path: str | Path) -> Arrays:
    with open(path, "rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        except _DAMAGE as error:
            raise _damaged(path, "an npz file of arrays", error) from error


def _read_safetensors(path: str | Path) -> Arrays:
    library = _safetensors()
    try:
        entries = library.deserialize(Path(path).read_bytes())
    except library.SafetensorError as error:
        raise _damaged(path, "a safetensors file", error) from error
    return {name: _array(name, entry) for name, entry in entries}


def _array(name: str, entry: Mapping[str, Any]) -> np.ndarray:
    """An array of safetensors' dtype names: F32, I64, BOOL, ..."""
    code, shape = entry["dtype"], entry["shape"]
    if code == "BF16":  # the upper half of a float32
        return (np.frombuffer(entry["data"], "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if code == "BOOL":
        return np.frombuffer(entry["data"], bool).reshape(shape)
    if code[:1] not in "FIU" or code[1:] not in ("8", "16", "32", "64") or code == "F8":
        raise ValueError(f"load: {name} is {code}, which NumPy does not have")
    return np.frombuffer(entry["data"], f"<{code[0].lower()}{int(code[1:]) // 8}").reshape(shape)


def _read_torch(path: str | Path) -> Arrays:
    try:
        import torch
    except ImportError as error:
        raise ImportError("load: .pt and .pth files need PyTorch: pip install torch") from error
    with open(path, "rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of many kinds, by where the file is damaged
            raise _damaged(path, "a file of tensors only", error) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"load: {os.fspath(path)!r} holds a {type(state).__name__}, not tensors by name")
    others = [f"{name!r} ({type(value).__name__})" for name, value in state.items() if not torch.is_tensor(value)]
    if others:
        raise ValueError(
            f"load: {os.fspath(path)!r} holds more than tensors: {', '.join(others[:5])}; if one of them is the "
            f"state_dict, read the file with torch.load and give that to load_state_dict"
        )
    return {name: (v.float() if v.dtype == torch.bfloat16 else v).detach().numpy() for name, v in state.items()}
