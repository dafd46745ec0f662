"""The table of comparisons: for a terminal (with rich where it is installed) and for Markdown."""

from collections.abc import Sequence

from .timing import Comparison

HEADER = ("op", "layer", "shape", "dtype", "time", "rate", "NumPy", "speed-up", "spread")
LEFT = 4  # the first columns are text, aligned left; the others numbers, aligned right
NOTE = (
    "time, NumPy: best of many calls; speed-up: NumPy's time / time; "
    "spread: interquartile range / median of our calls and of NumPy's"
)


def row(comparison: Comparison) -> tuple[str, ...]:
    c = comparison
    rate = f"{c.rate:.{0 if c.rate >= 100 else 1}f} {c.rate_unit}"
    spread = f"{c.ours.spread:.0%}, {c.numpy.spread:.0%}"
    times = duration(c.ours.best), rate, duration(c.numpy.best)
    return (c.op, c.layer, c.shape, c.dtype, *times, f"{1 / c.ratio:.{1 if c.ratio < 1 else 2}f}x", spread)


def duration(seconds: float) -> str:
    """Three significant digits in the unit that suits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:#.3g} {unit}".replace(". ", " ")
    return f"{seconds * 1e6:#.3g} us".replace(". ", " ")


def text(rows: Sequence[Sequence[str]], header: Sequence[str] = HEADER, left: int = LEFT) -> str:
    """Aligned columns without any library."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]

    def aligned(line):
        cells = (
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join([aligned(header), "  ".join("-" * w for w in widths), *map(aligned, rows)])


def markdown(rows: Sequence[Sequence[str]], header: Sequence[str] = HEADER, left: int = LEFT) -> str:
    rule = [":--" if i < left else "--:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))


def show(rows: Sequence[Sequence[str]], title: str, header: Sequence[str] = HEADER, left: int = LEFT) -> None:
    """Print to the terminal."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(f"{title}\n{text(rows, header, left)}")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < left else "right", no_wrap=True)
    for line in rows:
        table.add_row(*line)
    console = Console(highlight=False)
    print(title)
    # A row stays one line also in a file or a narrow window: a cut one cannot be read, a wrapped one not be searched.
    console.width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)
