"""What training measured, epoch by epoch: as lists, as a picture, and as TensorBoard's event files."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass
class History:
    """One entry for each epoch. loss, accuracy and metrics are means over the epoch's batches, made while the weights
    changed; those with val_ were measured after the epoch. Lists that were not asked for stay empty.

    `history["val_top5"]` is the list of that name, of metrics too.
    """

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    val_accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def __len__(self):
        return len(self.loss)

    def __getitem__(self, name: str) -> list[float]:
        found = self._lists().get(name)
        if found is None:
            raise KeyError(f"the history has no {name!r}; it has {', '.join(self.as_dict())}")
        return found

    def _lists(self) -> dict[str, list[float]]:
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "metrics"}
        return own | self.metrics

    def as_dict(self) -> dict[str, list[float]]:
        """A copy of every list that is not empty, by its name: for json, or pandas.DataFrame."""
        return {name: list(values) for name, values in self._lists().items() if values}

    def add(self, values: Mapping[str, float], prefix: str = ""):
        """One more entry in each of these lists."""
        lists = self._lists()
        for name, value in values.items():
            name = prefix + name
            (lists[name] if name in lists else self.metrics.setdefault(name, [])).append(value)

    def replace(self, values: Mapping[str, list[float]]):
        """All lists anew, from as_dict's."""
        self.__init__()
        for name, entries in values.items():
            for entry in entries:
                self.add({name: entry})

    def plot(self, path: str | Path):
        """Write a picture of the curves (loss, accuracy and metrics where there are any); the ending chooses PNG, SVG
        or PDF.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
            from matplotlib.ticker import MaxNLocator
        except ImportError as error:
            raise ImportError('History.plot needs matplotlib: pip install "tilewise[plot]"') from error
        curves = {name: values for name, values in self.as_dict().items() if name != "seconds"}
        panels = list(dict.fromkeys(["loss", *(name.removeprefix("val_") for name in curves)]))
        figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for label, values in (("training", curves.get(name)), ("validation", curves.get(f"val_{name}"))):
                if values:
                    axes.plot(range(1, len(values) + 1), values, marker=".", label=label)
            axes.set(xlabel="epoch", ylabel=name)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
            axes.legend()
        figure.savefig(path, dpi=150)


class TensorBoard:
    """Writes a history as event files for TensorBoard: `fit(..., after_epoch=TensorBoard("runs/first"))`.

    Each call writes the epochs that are new. Called once, after training, it writes them all. The folder gets two runs,
    training and validation, so that TensorBoard draws both curves of a name in one panel. A training that goes on from
    a checkpoint goes on here too.

    Args:
        folder: made where it is missing. `tensorboard --logdir folder` shows it.

    Raises:
        ImportError: tensorboard is not installed (extra: log).
    """

    def __init__(self, folder: str | Path):
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise ImportError('TensorBoard needs tensorboard: pip install "tilewise[log]"') from error
        self.folder = Path(folder)
        self.written = 0  # epochs
        self._events, self._summaries, self._new_writer = event_pb2, summary_pb2, EventFileWriter
        self._writers: dict[str, Any] = {}

    def __call__(self, history: History):
        for name, values in history.as_dict().items():
            writer = self._writer("validation" if name.startswith("val_") else "training")
            for epoch in range(self.written, len(values)):
                value = self._summaries.Summary.Value(tag=name.removeprefix("val_"), simple_value=values[epoch])
                summary = self._summaries.Summary(value=[value])
                writer.add_event(self._events.Event(wall_time=time.time(), step=epoch + 1, summary=summary))
        self.written = len(history)
        for writer in self._writers.values():
            writer.flush()

    def _writer(self, run: str) -> Any:
        if run not in self._writers:
            writer = self._writers[run] = self._new_writer(str(self.folder / run))
            if self.written:  # hides the epochs that were logged after the checkpoint from which training goes on
                start = self._events.SessionLog(status=self._events.SessionLog.START)
                writer.add_event(self._events.Event(wall_time=time.time(), step=self.written + 1, session_log=start))
        return self._writers[run]

    def close(self):
        """Close the files. What was written is in them already."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def state_dict(self) -> dict[str, int]:
        return {"written": self.written}

    def load_state_dict(self, state: Mapping[str, int]):
        self.close()  # the next files say from where they go on
        self.written = state["written"]
