"""Checkpoints: the whole state of a training in one npz file, without pickles."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.shapes import integer
from .io import Arrays, load, save
from .module import Module

_FORMAT = "tilewise checkpoint 1"
_STRUCTURE = "structure"  # the entry that holds all but the arrays, as JSON


class Checkpoint:
    """A file from which `fit` goes on exactly: `fit(..., checkpoint=Checkpoint("run.npz", every=5))`.

    It holds the parameters and buffers and which of them are frozen, the state of the optimiser, of schedules and of
    early stopping, of the numpy.random.Generator, the seeds and calls of dropout, which samples are held out, and the
    history. A training that was interrupted comes to the same bits as one that was not, on one machine. What augment,
    before_step, the loss or a metric remember from call to call is not in it: only functions of their arguments go on
    exactly.

    The last epoch's weights alone: `model.load_state_dict(Checkpoint("run.npz").load()["model"])`. Those of early
    stopping's best epoch, which `fit` leaves in the model, are `load()["early_stopping"]["best_state"]`; {} where none
    were kept.

    Args:
        path: ends in .npz. Each checkpoint takes the place of the one before when it is complete on disk.
        every: how many epochs lie between two of them. The start and the end of training are always written.

    Raises:
        TypeError, ValueError: another ending, or a wrong number of epochs.
    """

    def __init__(self, path: str | Path, every: int = 1):
        self.path = Path(path)
        if self.path.suffix.lower() != ".npz":
            raise ValueError(f"Checkpoint: {os.fspath(path)!r} must end in .npz")
        self.every = integer("Checkpoint", "every", every)

    def save(self, state: Mapping[str, Any]):
        """Write a dict of arrays, numbers, texts, None, and dicts, lists and tuples of those.

        Raises:
            TypeError: of something else; it is named. The file is as it was.
        """
        arrays: Arrays = {}
        structure = json.dumps({"format": _FORMAT, "state": _plain(state, "", arrays)})
        save({**arrays, _STRUCTURE: np.frombuffer(structure.encode(), np.uint8)}, self.path)

    def load(self) -> dict[str, Any]:
        """What was written.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or not a checkpoint.
        """
        arrays = load(self.path)
        try:
            structure = json.loads(arrays[_STRUCTURE].tobytes())
            if structure["format"] != _FORMAT:
                raise ValueError(f"its format is {structure['format']!r}")
            return _whole(structure["state"], arrays)
        except (KeyError, TypeError, ValueError) as error:
            message = f"it has no {error}" if isinstance(error, KeyError) else error
            path = os.fspath(self.path)
            raise ValueError(f"Checkpoint: {path!r} is not a checkpoint of a training: {message}") from error

    def __repr__(self):
        return f"Checkpoint({os.fspath(self.path)!r}, every={self.every})"


def counters(model: Module) -> dict[str, int]:
    """What modules count, by dotted name: dropout's seeds and calls, whether batch norm is frozen."""
    found = {}
    for prefix, module in model.modules():
        found |= {f"{prefix}.{name}" if prefix else name: getattr(module, name) for name in module.counters}
    return found


def set_counters(model: Module, values: Mapping[str, int]):
    for name, value in values.items():
        prefix, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(prefix), attribute, value)


def _plain(value: Any, name: str, arrays: Arrays) -> Any:
    """`value` as JSON has it, with arrays by their names, which begin with `name`."""
    if isinstance(value, np.ndarray):
        while name in arrays or name == _STRUCTURE:  # {"a": {"b": x}, "a.b": y}
            name += "'"
        arrays[name] = value
        return {"array": name}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_plain(item, f"{name}.{i}", arrays) for i, item in enumerate(value)]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _plain(item, f"{name}.{key}".lstrip("."), arrays) for key, item in value.items()}}
    raise TypeError(f"Checkpoint: {name} is a {type(value).__name__}, which cannot be written without pickles")


def _whole(value: Any, arrays: Arrays) -> Any:
    """The reverse of _plain."""
    if not isinstance(value, dict):
        return value
    ((kind, inside),) = value.items()
    if kind == "array":
        return arrays[inside]
    if kind == "dict":
        return {key: _whole(item, arrays) for key, item in inside.items()}
    items = [_whole(item, arrays) for item in inside]
    return items if kind == "list" else tuple(items)
