"""Pairs, padding forms, output sizes and their messages: one copy, tested once."""

from itertools import product

import numpy as np
import pytest

from tilewise.kernels import shapes

F = "conv2d"


def test_pairs():
    assert shapes.pair(F, "stride", 2) == (2, 2)
    assert shapes.pair(F, "stride", (1, 3)) == (1, 3)
    assert shapes.pair(F, "stride", [1, 3]) == (1, 3)
    assert shapes.pair(F, "stride", np.int32(2)) == (2, 2)
    assert all(type(n) is int for n in shapes.pair(F, "stride", (np.int64(2), np.uint8(3))))
    assert shapes.pair(F, "padding", 0, minimum=0) == (0, 0)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, r"conv2d: stride must be at least 1, got 0"),
        ((1, 0), ValueError, r"conv2d: stride must be at least 1, got 0"),
        (-2, ValueError, r"conv2d: stride must be at least 1, got -2"),
        (1.0, TypeError, r"conv2d: stride must be an int, got 1\.0"),
        ((1, 2.0), TypeError, r"conv2d: stride must be an int, got 2\.0"),
        (True, TypeError, r"conv2d: stride must be an int, got True"),
        (None, TypeError, r"conv2d: stride must be an int, got None"),
        ("2", TypeError, r"conv2d: stride must be an int or a pair of ints, got '2'"),
        ((), ValueError, r"conv2d: stride must be an int or a pair \(height, width\), got \(\)"),
        ((1, 2, 3), ValueError, r"conv2d: stride must be an int or a pair \(height, width\), got \(1, 2, 3\)"),
        (((1, 1), 2), TypeError, r"conv2d: stride must be an int, got \(1, 1\)"),
        (np.array([1, 2]), TypeError, r"conv2d: stride must be an int, got array"),
    ],
)
def test_wrong_pairs(value, error, message):
    with pytest.raises(error, match=message):
        shapes.pair(F, "stride", value)


@pytest.mark.parametrize("value", [0, 1, 0.25, np.float32(0.25), np.float16(1), np.int64(0)])
def test_probabilities(value):
    assert shapes.probability("f", "p", value) == value
    assert type(shapes.probability("f", "p", value)) is float


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        *((value, TypeError, "f: p must be a number, got ") for value in (True, np.True_, "0.5", None, 0.5j, [0.5])),
        (np.array(0.5), TypeError, r"f: p must be a number, got array\(0\.5\)"),
        (np.array([0.5, 0.2]), TypeError, r"f: p must be a number, got array\(\[0\.5, 0\.2\]\)"),
        *((value, ValueError, "f: p must be from 0 to 1, got ") for value in (-1, 1.5, float("nan"), np.float32(2))),
    ],
)
def test_wrong_probabilities(value, error, message):
    with pytest.raises(error, match=message):
        shapes.probability("f", "p", value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, ((1, 1), (1, 1))),
        ((1, 2), ((1, 1), (2, 2))),
        ([1, 2], ((1, 1), (2, 2))),
        (((1, 2), (3, 4)), ((1, 2), (3, 4))),
        ([[1, 2], [3, 4]], ((1, 2), (3, 4))),
        ("valid", ((0, 0), (0, 0))),
    ],
)
def test_padding_forms(value, expected):
    assert shapes.padding_pairs(F, value, (8, 8), (3, 3), (1, 1), (1, 1)) == expected


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1, ValueError, r"conv2d: padding must be at least 0, got -1"),
        (((0, 0), (0, -1)), ValueError, r"conv2d: padding must be at least 0, got -1"),
        (1.5, TypeError, r"conv2d: padding must be an int, got 1\.5"),
        ((1, 2, 3), ValueError, r"conv2d: padding must be an int or a pair"),
        (((1, 2), 3), ValueError, r"conv2d: padding must be \(\(top, bottom\), \(left, right\)\), got \(\(1, 2\), 3\)"),
        (((1, 2), (3,)), ValueError, r"conv2d: padding must be \(\(top, bottom\), \(left, right\)\)"),
        (((1, 2), (3, 4), (5, 6)), ValueError, r"conv2d: padding must be an int or a pair"),
        (
            "full",
            ValueError,
            r'conv2d: padding must be an int, a pair, two pairs, "valid", "same" or "same_lower", got',
        ),
    ],
)
def test_wrong_padding(value, error, message):
    with pytest.raises(error, match=message):
        shapes.padding_pairs(F, value, (8, 8), (3, 3), (1, 1), (1, 1))


def test_explicit_padding_knows_no_names():
    with pytest.raises(ValueError, match="conv_transpose2d: padding 'same' is not known here; use an int, a pair"):
        shapes.explicit_padding("conv_transpose2d", "same")


def test_same_padding_gives_the_ceiling_and_no_more_rows_than_needed():
    for n, k, s, d in product(range(1, 12), range(1, 6), range(1, 4), range(1, 4)):
        (top, bottom), other = shapes.padding_pairs(F, "same", (n, n), (k, k), (s, s), (d, d))
        assert other == (top, bottom)
        assert bottom - top in (0, 1)  # the odd row goes after
        assert shapes.output_size(n, k, s, (top, bottom), d) == -(-n // s)
        if top + bottom:  # with one row less there would be too few outputs
            assert shapes.output_size(n, k, s, (top, bottom - 1), d) < -(-n // s)
        lower, _ = shapes.padding_pairs(F, "same_lower", (n, n), (k, k), (s, s), (d, d))
        assert lower == (bottom, top)


def test_same_padding_knows_height_from_width():
    assert shapes.padding_pairs(F, "same", (5, 8), (4, 3), (1, 2), (1, 2)) == ((1, 2), (1, 2))
    assert shapes.padding_pairs(F, "same_lower", (5, 8), (4, 3), (1, 2), (1, 2)) == ((2, 1), (2, 1))


def test_output_size_counts_the_windows():
    """Against the count of starting points from which the last tap still lies in the padded input."""
    for n, k, s, p, q, d in product(range(1, 9), range(1, 5), range(1, 4), range(3), range(3), range(1, 3)):
        starts = [i for i in range(0, n + p + q, s) if i + d * (k - 1) < n + p + q]
        assert shapes.output_size(n, k, s, (p, q), d) == len(starts)


def test_ceil_mode_is_pytorchs(torch):
    for n, k, s, d in product(range(1, 10), range(1, 5), range(1, 5), range(1, 3)):
        for p in range(k // 2 + 1):
            if n + 2 * p < d * (k - 1) + 1:
                continue
            x = torch.zeros(1, n, 1)
            theirs = torch.nn.functional.max_pool1d(x[..., 0], k, s, p, d, ceil_mode=True).shape[-1]
            assert shapes.output_size(n, k, s, (p, p), d, ceil_mode=True) == theirs, (n, k, s, p, d)


def test_image_shape():
    assert shapes.image_shape(F, "x", (2, 3, 4, 5), "NCHW") == (2, 3, 4, 5)
    assert shapes.image_shape(F, "x", (2, 3, 4, 5), "NHWC") == (2, 5, 3, 4)
    assert shapes.image_shape(F, "x", (3, 4, 5), "NCHW") == (1, 3, 4, 5)
    assert shapes.image_shape(F, "x", (3, 4, 5), "NHWC") == (1, 5, 3, 4)
    for layout in ("NCHW", "NHWC"):
        shape = shapes.layout_shape(2, 3, 4, 5, layout)
        assert shapes.image_shape(F, "x", shape, layout) == (2, 3, 4, 5)
    with pytest.raises(ValueError, match=r'conv2d: layout must be "NCHW" or "NHWC", got \'CHWN\''):
        shapes.image_shape(F, "x", (2, 3, 4, 5), "CHWN")
    with pytest.raises(
        ValueError, match=r"conv2d: x must have 4 dimensions \(N, H, W, C\), or 3 .* got shape \(4, 5\)"
    ):
        shapes.image_shape(F, "x", (4, 5), "NHWC")


def test_needs():
    names = ("x", "weight", "bias")
    assert shapes.needs(F, ("bias", "x"), names) == ("x", "bias")
    assert shapes.needs(F, {"weight"}, names) == ("weight",)
    assert shapes.needs(F, [], names) == ()
    with pytest.raises(TypeError, match=r"conv2d: needs must be a tuple of names out of .*, got 'x'"):
        shapes.needs(F, "x", names)
    with pytest.raises(ValueError, match=r"conv2d: needs may hold 'x', 'weight', 'bias', got 'w'"):
        shapes.needs(F, ("x", "w"), names)


def test_activation():
    for name in (None, "relu", "relu6", "leaky_relu", "sigmoid", "tanh"):
        assert shapes.activation(F, name) is name
    with pytest.raises(ValueError, match=r'conv2d: activation must be None or one of "relu", .*, got \'softmax\''):
        shapes.activation(F, "softmax")
