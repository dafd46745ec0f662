"""plot_model: every layer is in the picture, none covers another, and lines lead from each to the next."""

from itertools import combinations, pairwise
from xml.etree import ElementTree

import pytest

import tilewise
from tilewise import nn

SVG = "{http://www.w3.org/2000/svg}"
MODELS = {
    "chain": lambda: nn.models.lenet5(rng=0),
    "single layer": nn.ReLU,
    "residual": lambda: nn.Residual(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh()), nn.Conv2d(3, 3, 1), nn.ReLU()),
    "identity": lambda: nn.Sequential(nn.Residual(nn.Conv2d(3, 3, 1)), nn.Concat(nn.Sequential(), nn.ReLU())),
    "resnet": lambda: nn.models.resnet18(3, width=4, init="zeros"),
    "googlenet": lambda: nn.models.googlenet(3, width=16, init="zeros"),
    "mobilenet": lambda: nn.models.mobilenet_v2(3, width_mult=0.25, init="zeros"),
}


def drawn(model, path, *shape):
    with tilewise.using(backend="reference"):
        nn.plot_model(model, path, *shape)
    root = ElementTree.parse(path).getroot()
    boxes = [[float(r.get(key)) for key in ("x", "y", "width", "height")] for r in root.iter(f"{SVG}rect")]
    texts = [text.text for text in root.iter(f"{SVG}text")]
    paths = [
        [[float(n) for n in p.split(",")] for p in line.get("points").split()] for line in root.iter(f"{SVG}polyline")
    ]
    return root, boxes, texts, paths


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_every_layer_is_drawn_apart_from_the_others(build, tmp_path):
    model = build()
    root, boxes, texts, paths = drawn(model, tmp_path / "model.svg")
    leaves = [name for name, module in model.modules() if name and not list(module.children())]
    leaves = [name for name in leaves if not isinstance(model.get_submodule(name), nn.Sequential)]
    assert sorted(set(texts) & set(leaves)) == sorted(leaves)
    width, height = float(root.get("width")), float(root.get("height"))
    for x, y, w, h in boxes:
        assert x >= 0
        assert y >= 0
        assert x + w <= width
        assert y + h <= height
    for (x, y, w, h), (other_x, other_y, other_w, other_h) in combinations(boxes, 2):
        assert x + w < other_x or other_x + other_w < x or y + h < other_y or other_y + other_h < y
    assert all(a == c or b == d for path in paths for (a, b), (c, d) in pairwise(path))


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_lines_lead_from_the_input_to_the_output_through_every_box(build, tmp_path):
    _, boxes, _, paths = drawn(build(), tmp_path / "model.svg")
    tops, bottoms = ([(x + w / 2, y + part * h) for x, y, w, h in boxes] for part in (0, 1))

    def near(point, other):  # the file has six digits
        return abs(point[0] - other[0]) < 0.1 and abs(point[1] - other[1]) < 0.1

    reached, points = {0}, [bottoms[0]]
    while points:
        point = points.pop()
        entered = {i for i, top in enumerate(tops) if near(point, top)} - reached
        reached |= entered
        points += [bottoms[i] for i in entered]
        points += [path[-1] for path in paths if near(point, path[0])]
        paths = [path for path in paths if not near(point, path[0])]
    assert reached == set(range(len(boxes)))
    assert not paths


def test_the_texts(tmp_path):
    model = nn.Sequential({"a<b": nn.Conv2d(1, 2, 3), "norm": nn.BatchNorm2d(2)})
    _, _, texts, _ = drawn(model, tmp_path / "model.svg", (4, 1, 5, 5))
    assert texts == [
        *("input", "(4, 1, 5, 5)", "a<b", "Conv2d (4, 2, 3, 3)", "norm", "BatchNorm2d (4, 2, 3, 3)", "output"),
    ]


def test_a_module_of_ones_own_is_one_box(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            self.inner = nn.Linear(2, 2)

    assert drawn(nn.Sequential(Own()), tmp_path / "model.svg")[2] == ["input", "0", "Own", "output"]


def test_wrong_calls(tmp_path):
    with pytest.raises(ValueError, match=r"plot_model: 'model\.png' must end in \.svg"):
        nn.plot_model(nn.ReLU(), "model.png")
    with pytest.raises(ValueError, match="weight expects 3 channels"), tilewise.using(backend="reference"):
        nn.plot_model(nn.Conv2d(3, 1, 1), tmp_path / "model.svg", (1, 2, 3, 3))
    assert list(tmp_path.iterdir()) == []
