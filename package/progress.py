"""Progress of long work, on standard error: a bar on a terminal where rich is installed, else one line a step."""

import sys
import time


class Progress:
    """`with Progress("compiling", 12) as progress:` and then `progress.step("conv")` after each of the 12 steps."""

    def __init__(self, title: str, total: int):
        self.title = title
        self.total = total
        self.done = 0
        self.began = time.perf_counter()
        self.bar = _bar(title)
        self.task = None if self.bar is None else self.bar.add_task(title, total=total, last="")

    def __enter__(self):
        if self.bar is not None:
            self.bar.start()
        return self

    def step(self, name: str):
        """The step called `name` is done."""
        self.done += 1
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, advance=1, last=name)
            return
        elapsed = time.perf_counter() - self.began
        count = f"{self.done:{len(str(self.total))}d}/{self.total}"
        print(f"{self.title} [{count}] {name}  ({elapsed:.0f} s)", file=sys.stderr, flush=True)

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.stop()
        return False


def _bar(title: str):
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        return None
    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    columns = (progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeElapsedColumn())
    text = progress.TextColumn(title), progress.TextColumn("{task.fields[last]}")
    return progress.Progress(text[0], *columns, text[1], console=console, transient=True)
