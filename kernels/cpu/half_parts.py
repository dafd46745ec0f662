"""Which operations can be cut into independent parts, and along what.

A `Cut` describes one call as `length` slices: images, planes, rows, elements or channels, whatever the result's parts
depend on alone. The float32 plan of a part is that of a smaller call, so nothing about the kernels is known here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]
FEW_ROWS = 64  # of x in a linear layer: with more, the product outweighs the widening of its weight


@dataclass(frozen=True, slots=True)
class Cut:
    """One call as slices along an axis.

    length: how many slices there are.
    views: for each operand the shape in which it is cut (None: absent, or used whole).
    axis: along which operands and results are cut; vectors of channels along their only one.
    axes: the same for each operand, where they differ; such operands may have any strides.
    larger: how many times as large as usual a part should be.
    part: (operands' shapes, options) of a call on so many slices.
    lead, kept: a result gets the shape lead + its last `kept` axes; lead None: it has its shape already.
    """

    length: int
    views: tuple[Shape | None, ...]
    axis: int
    part: Callable[[int], tuple[list, dict]]
    lead: Shape | None = None
    kept: int = 0
    axes: tuple[int, ...] = ()
    larger: int = 1

    def largest(self) -> int:
        """Elements of the largest operand's slice."""
        return max(prod(view) for view in self.views if view) // max(self.length, 1)


def _leading(shapes, options, lead: Shape, kept: int, tails, source: Shape | None = None) -> Cut:
    """The operands as (length, *tail), where the axes of `lead` are counted together.

    source: the same of the option `input_shape`, where there is one.
    """
    length = prod(lead)

    def part(count):
        changed = {"input_shape": (count, *source)} if source else {}
        return [(count, *tail) for tail in tails], options | changed

    return Cut(length, tuple((length, *tail) for tail in tails), 0, part, lead, kept)


def _elements(shapes, options) -> Cut:
    return _leading(shapes, options, shapes[0], 0, [()] * len(shapes))


def _lines(shapes, options) -> Cut | None:
    """Softmax: whatever lies before the axis."""
    shape, axis = shapes[0], options["axis"]
    if axis == 0:
        return None
    changed = options | {"axis": 1}
    return _leading(shapes, changed, shape[:axis], len(shape) - axis, [shape[axis:]] * len(shapes))


def _planes(shapes, options) -> Cut:
    """Pooling: planes of an NCHW image, whole images in NHWC."""
    if options["layout"] == "NHWC":
        lead, kept, tails = shapes[0][:1], 3, [shape[1:] for shape in shapes]
    else:
        lead, kept, tails = shapes[0][:2], 2, [(1, *shape[2:]) for shape in shapes]
    source = options.get("input_shape")
    if source:
        source = source[1:] if options["layout"] == "NHWC" else (1, *source[2:])
    return _leading(shapes, options, lead, kept, tails, source)


def _padded(shapes, options) -> Cut:
    *lead, h, w = shapes[0]
    source = options.get("input_shape")
    return _leading(shapes, options, tuple(lead), 2, [(h, w)], source and source[-2:])


def _channels(shapes, options) -> Cut | None:
    """Batch norm: channels where they are planes; in evaluation rows where channels come last."""
    image = shapes[0]
    if options["layout"] == "NHWC":
        if options["training"] or options["return_stats"]:
            return None
        channels, lead = image[3], image[:3]
        views = (prod(lead), 1, 1, channels)
        whole = list(shapes[1:])
        return Cut(
            prod(lead),
            (views, *(None for _ in whole)),
            0,
            lambda count: ([(count, 1, 1, channels), *whole], options),
            lead,
            1,
        )
    n, c, h, w = image

    def part(count):
        return [shape and ((n, count, h, w) if len(shape) == 4 else (count,)) for shape in shapes], options

    return Cut(c, tuple(shapes), 1, part)


def _outputs(shapes, options) -> Cut | None:
    """linear: the rows of its weight, which for few rows of x is nearly all there is to read. A product of few of them
    would waste its tiles."""
    x, weight, bias = shapes
    if len(x) != 2 or x[0] > FEW_ROWS:
        return None

    def part(count):
        return [x, (count, weight[1]), bias and (count,)], options

    return Cut(weight[0], (None, weight, bias), 1, part, axes=(1, 0, 1), larger=4)


_ELEMENTWISE = ("relu", "leaky_relu", "sigmoid", "tanh")
_POOLS = ("max_pool2d", "avg_pool2d", "adaptive_max_pool2d", "adaptive_avg_pool2d", "max_unpool2d")
_CUTS: dict[str, Callable] = {
    "step": _elements, "sign": _elements, "linear": _outputs, "batch_norm": _channels
}  # fmt: skip
for _names, _find in (
    (_ELEMENTWISE, _elements),
    (("softmax", "log_softmax"), _lines),
    (_POOLS, _planes),
    (("pad",), _padded),
):
    _CUTS |= {name + way: _find for name in _names for way in ("", "_backward")}


def cut(name: str, shapes: list, options: dict) -> Cut | None:
    """How this call can be cut; None where its parts depend on each other."""
    find = _CUTS.get(name)
    return find(shapes, options) if find and all(prod(shape) for shape in shapes if shape) else None
