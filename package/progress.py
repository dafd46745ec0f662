"""Progress of long work on the terminal: a bar where rich is installed, else one line a step."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def steps(named: Iterable[tuple[str, T]], title: str) -> Iterator[T]:
    """Yield the second of each pair, showing the first (what is being worked on), on standard error."""
    todo = list(named)
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield from _lines(todo, title)
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from _lines(todo, title)
        return
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=len(todo), now="")
        for name, item in todo:
            progress.update(task, now=name)
            yield item
            progress.advance(task)


def _lines(todo: list[tuple[str, T]], title: str) -> Iterator[T]:
    for number, (name, item) in enumerate(todo, 1):
        print(f"{title} [{number:{len(str(len(todo)))}d}/{len(todo)}] {name}", file=sys.stderr, end=" ", flush=True)
        start = time.perf_counter()
        yield item
        print(f"{time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
