"""Convolution and pooling by hand: small matrices first, then the edges of a digit.

    python examples/convolution.py [--seed 0] [--out convolution.png]

A convolution lays its kernel on every place of the image and adds up the products; padding adds a border, the stride
leaves places out: floor((N + 2 P - K) / S) + 1 of them. Two kernels that find edges make two feature maps of each
digit. Pooling makes the maps smaller, and less sensitive to where a stroke lies: the script moves the digits by a pixel
and prints how much the maps change, for windows of several sizes.
"""

import common
import numpy as np

from tilewise import avg_pool2d, conv2d, max_pool2d, nn, relu

X = np.array([[1, 0, 2, 3], [2, 1, 0, 1], [1, 0, 1, 3], [2, 0, 3, 2]], np.float32)
W = np.array([[1, 2, 0], [3, 2, 1], [0, 1, 3]], np.float32)
PATH = np.array([[1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 1, 0]], np.float32)
CASES = {  # image, kernel, padding, stride
    "a kernel of 3x3": (X, W, 0, 1),
    "padding 1": (X, W, 1, 1),
    "a kernel of 2x2, stride 2": (X, np.array([[1, 2], [3, 2]], np.float32), 0, 2),
    "a kernel that finds diagonals": (PATH, np.eye(2, dtype=np.float32), 0, 1),
}
SOBEL = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], np.float32)
EDGES = np.stack([SOBEL, SOBEL.T])[:, None] / 4  # (2, 1, 3, 3): vertical edges, horizontal edges


def by_hand(x: np.ndarray, w: np.ndarray, padding: int = 0, stride: int = 1) -> np.ndarray:
    """The convolution of a matrix, written out; conv2d gives the same."""
    x = np.pad(x, padding)
    rows, columns = ((n - k) // stride + 1 for n, k in zip(x.shape, w.shape, strict=True))
    y = np.empty((rows, columns), x.dtype)
    for i in range(rows):
        for j in range(columns):
            window = x[i * stride : i * stride + w.shape[0], j * stride : j * stride + w.shape[1]]
            y[i, j] = (window * w).sum()
    return y


def change(pool, maps: np.ndarray, moved: np.ndarray) -> float:
    """How much the maps of the moved images differ after pooling: 0 not at all, 1 as much as they are large."""
    before, after = pool(maps), pool(moved)
    return float(np.linalg.norm(after - before) / np.linalg.norm(before))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    options = common.Arguments(__doc__, "convolution.png", needs=("sklearn",)).parse(arguments)
    for what, (x, w, padding, stride) in CASES.items():
        y = conv2d(x[None, None], w[None, None], padding=padding, stride=stride)[0, 0]
        print(f"{what}:\n{y}\nby hand the same: {(y == by_hand(x, w, padding, stride)).all()}")

    images, _ = common.digits()
    images = np.pad(images, ((0, 0), (0, 0), (4, 4), (4, 4)))  # so that nothing is moved out of the picture
    maps, moved = (relu(conv2d(x, EDGES, padding=1)) for x in (images, np.roll(images, 1, axis=3)))
    results = {"no pooling": change(lambda x: x, maps, moved)}
    for size in (2, 4, 16):
        results[f"max {size}x{size}"] = change(lambda x, size=size: max_pool2d(x, size), maps, moved)
        results[f"average {size}x{size}"] = change(lambda x, size=size: avg_pool2d(x, size), maps, moved)
    weighted = nn.WeightedAvgPool2d(np.outer([1, 3, 3, 1], [1, 3, 3, 1]), stride=2, padding=1)
    results["weighted average 4x4, stride 2"] = change(weighted.eval(), maps, moved)
    for name, value in results.items():
        print(f"{name}: moving the digits by a pixel changes the maps by {value:.0%}")

    index = np.random.default_rng(options.seed).integers(len(images))
    shown = {
        "a digit": images[index, 0], "vertical edges": maps[index, 0], "horizontal edges": maps[index, 1],
        "max pooling 2x2": max_pool2d(maps[index], 2)[0], "average pooling 4x4": avg_pool2d(maps[index], 4)[0],
    }  # fmt: skip
    figure, panels = common.panels(len(shown))
    for axes, (title, image) in zip(panels, shown.items(), strict=True):
        axes.imshow(image, cmap="gray")
        axes.set(xticks=[], yticks=[], title=title)
    figure.savefig(options.out)
    print(f"a digit and its maps are drawn in {options.out}")
    return results


if __name__ == "__main__":
    main()
