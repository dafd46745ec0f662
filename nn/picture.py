"""A picture of a model as an SVG file, made without other packages.

Layers are boxes from the input at the top to the output at the bottom; branches stand side by side:

    a chain   [ ]     a residual block   .---.     a concatenation   .---.---.
               |                        [ ]  |                      [ ] [ ] [ ]
              [ ]                        '-+-'                       '-join--'
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

from .containers import Concat, Residual, Sequential
from .inspection import output_shapes
from .io import replacing
from .models.blocks import NamedResidual
from .module import Module

GAP, MARGIN, CHARACTER, LINE = 20.0, 12.0, 7.3, 15.0  # pixels; the last two of text of 12 pixels
_STYLE = (
    "rect{fill:#eef3fa;stroke:#4a6fa5}rect.weights{fill:#fdf0dd;stroke:#b07d2b}rect.join{fill:#fff;stroke:#666}"
    "polyline{fill:none;stroke:#666}text{font:12px monospace;text-anchor:middle}"
)
Points = tuple[tuple[float, float], ...]


class Box(NamedTuple):
    x: float
    y: float
    width: float
    height: float
    lines: tuple[str, ...]
    kind: str


class Part(NamedTuple):
    """A piece of the picture: entered at (centre, 0), left at (centre, height), nothing of it outside its size."""

    width: float
    height: float
    centre: float
    boxes: list[Box]
    paths: list[Points]

    def moved(self, x: float, y: float) -> "Part":
        boxes = [box._replace(x=box.x + x, y=box.y + y) for box in self.boxes]
        return self._replace(boxes=boxes, paths=[tuple((a + x, b + y) for a, b in path) for path in self.paths])


def plot_model(model: Module, path: str | Path, input_shape: Sequence[int] | None = None):
    """Write a picture of the model: every layer with its name and class, and how they are connected.

    Sequential, Residual and Concat are drawn by what they do; another module with modules inside is one box, since what
    its forward does cannot be seen.

    Args:
        path: of the SVG file.
        input_shape: x's, with the batch; with it the layers' output shapes are shown (by one forward, as `summary`).

    Raises:
        ValueError: the path does not end in .svg; x does not fit the model.
    """
    if not str(path).lower().endswith(".svg"):
        raise ValueError(f"plot_model: {str(path)!r} must end in .svg")
    shapes = {} if input_shape is None else output_shapes(model, input_shape)
    ends = [_box(("input", str(tuple(input_shape))) if input_shape else ("input",), "join")]
    picture = _chain([*ends, _part("", model, shapes), _box(("output",), "join")])
    with replacing(path) as file:
        file.write(_svg(picture).encode())


def _part(name: str, module: Module, shapes: dict[int, tuple[int, ...]]) -> Part:
    prefix = f"{name}." if name else ""
    children = [(f"{prefix}{child}", inside) for child, inside in module.children()]
    if isinstance(module, Sequential):
        return _chain([_part(*child, shapes) for child in children])
    if isinstance(module, Concat):
        return _branches([_part(*child, shapes) for child in children], "concat")
    if isinstance(module, NamedResidual):
        inside = dict(module.children())
        around = [(f"{prefix}{n}", inside.pop(n, None)) for n in ("downsample", "relu")]
        main = _chain([_part(f"{prefix}{n}", layer, shapes) for n, layer in inside.items()])
        return _residual(main, *(layer and _part(n, layer, shapes) for n, layer in around))
    if isinstance(module, Residual):
        named = (("main", module.main), ("shortcut", module.shortcut), ("activation", module.activation))
        main, *around = (layer and _part(f"{prefix}{n}", layer, shapes) for n, layer in named)
        return _residual(main or _chain([]), *around)
    kind, text = type(module).__name__, [name] if name else []
    shape = f" {shapes[id(module)]}" if id(module) in shapes else ""
    return _box((*text, f"{kind}{shape}"), "weights" if module.parameters() else "layer")


def _residual(main: Part, shortcut: Part | None, activation: Part | None) -> Part:
    block = _branches([main, shortcut or _chain([])], "+")
    return _chain([block, activation]) if activation else block


def _box(lines: tuple[str, ...], kind: str) -> Part:
    width, height = max(map(len, lines)) * CHARACTER + 2 * MARGIN, len(lines) * LINE + 10
    return Part(width, height, width / 2, [Box(0, 0, width, height, lines, kind)], [])


def _chain(parts: list[Part]) -> Part:
    """One below the other, centres aligned. Of no parts: a line, which an identity is."""
    if not parts:
        return Part(2 * MARGIN, 0, MARGIN, [], [])
    centre = max(part.centre for part in parts)
    width = centre + max(part.width - part.centre for part in parts)
    boxes, paths, y = [], [], 0.0
    for i, part in enumerate(parts):
        if i:
            paths.append(((centre, y), (centre, y + GAP)))
            y += GAP
        placed = part.moved(centre - part.centre, y)
        boxes += placed.boxes
        paths += placed.paths
        y += part.height
    return Part(width, y, centre, boxes, paths)


def _branches(parts: list[Part], joined: str) -> Part:
    """Side by side, from one line and to one box."""
    width = sum(part.width for part in parts) + GAP * (len(parts) - 1)
    bottom, centre, x = GAP + max(part.height for part in parts) + GAP, width / 2, 0.0
    join = _box((joined,), "join")
    boxes, paths = [], []
    for part in parts:
        placed, at = part.moved(x, GAP), x + part.centre
        boxes += placed.boxes
        paths += placed.paths
        paths.append(((centre, 0), (centre, GAP / 2), (at, GAP / 2), (at, GAP)))
        paths.append(((at, GAP + part.height), (at, bottom - GAP / 2), (centre, bottom - GAP / 2), (centre, bottom)))
        x += part.width + GAP
    left = max(0.0, join.centre - centre)
    below = join.moved(centre - join.centre, bottom)
    whole = Part(max(width, join.width), bottom + join.height, centre, boxes + below.boxes, paths)
    return whole.moved(left, 0)._replace(centre=centre + left)


def _svg(picture: Part) -> str:
    width, height = picture.width + 2 * MARGIN, picture.height + 2 * MARGIN
    placed = picture.moved(MARGIN, MARGIN)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}">',
        f"<style>{_STYLE}</style>",
    ]
    lines += [f'<polyline points="{" ".join(f"{x:g},{y:g}" for x, y in path)}"/>' for path in placed.paths]
    for box in placed.boxes:
        size = f'x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{box.height:g}"'
        lines.append(f'<rect {size} rx="4" class="{box.kind}"/>')
        top = box.y + (box.height - LINE * len(box.lines)) / 2 + 11
        lines += [
            f'<text x="{box.x + box.width / 2:g}" y="{top + LINE * i:g}">{escape(line)}</text>'
            for i, line in enumerate(box.lines)
        ]
    return "\n".join([*lines, "</svg>", ""])
