"""MNIST, from the four files that you have: a dense network or LeNet-5.

    python examples/mnist.py FOLDER [--model lenet5] [--epochs 12] [--seed 0] [--checkpoint mnist.npz]

FOLDER holds train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, each
as it is or with .gz (LeCun, Cortes and Burges; they are not downloaded here). The dense network is flatten, 512 with
ReLU, 10 with softmax; Adam, batches of 256, a quarter of the training images held out for validation, and at the end
the accuracy on the test images. With a checkpoint, Ctrl-C and the same command again go on where it stopped.
"""

import gzip
import math
import zlib
from pathlib import Path

import common
import numpy as np

from tilewise import nn

FILES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
         "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}  # fmt: skip


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The unsigned bytes of an IDX file, in their shape.

    The file is a magic number (0, 0, 8 for unsigned bytes, how many dimensions), the dimensions, as big-endian 32-bit
    numbers, and the bytes.

    Raises:
        ValueError: it is no such file, or has too few or too many bytes.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: {error}") from error
    magic = bytes((0, 0, 8, dimensions))
    if content[:4] != magic:
        raise ValueError(f"{path}: begins with {content[:4].hex(' ')}, an IDX file of this kind with {magic.hex(' ')}")
    header = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4))
    if len(content) - header != math.prod(shape):
        raise ValueError(f"{path}: {len(content)} bytes, but shape {shape} takes {header + math.prod(shape)}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def load_part(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """x (N, 1, H, W) from 0 to 1, and the labels (N,), of "train" or "test"; ValueError where a file is missing."""
    arrays = []
    for name, dimensions in zip(FILES[part], (3, 1), strict=True):
        found = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
        if not found:
            raise ValueError(f"{folder}: there is neither {name} nor {name}.gz")
        arrays.append(read_idx(found[0], dimensions))
    images, labels = arrays
    if len(images) != len(labels):
        raise ValueError(f"{folder}: {len(images)} images and {len(labels)} labels of the part {part!r}")
    return (images[:, None] / 255).astype(np.float32), labels.astype(np.int64)


def network(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> nn.Sequential:
    """The network for images of this shape (1, H, W)."""
    if name == "lenet5":  # for 32x32: MNIST's 28x28 get an edge of two pixels, as in 1998
        model = nn.models.lenet5(rng=rng)
        model[0] = nn.Conv2d(1, 6, 5, padding=(32 - shape[-1]) // 2, rng=rng)
        return model
    return nn.Sequential(nn.Flatten(), *nn.models.mlp((math.prod(shape), 512, 10), rng=rng))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = common.Arguments(__doc__, "mnist.png", epochs=12)
    parser.add_argument("folder", type=Path, help="where the four files are")
    parser.add_argument("--model", choices=("dense", "lenet5"), default="dense", help="the network (default dense)")
    parser.add_argument("--checkpoint", type=Path, help="an .npz to go on from, should the training be interrupted")
    options = parser.parse(arguments)
    try:
        (x, y), test = load_part(options.folder, "train"), load_part(options.folder, "test")
    except ValueError as error:
        parser.exit(1, f"mnist: {error}\n")

    rng = np.random.default_rng(options.seed)
    model, loss = network(options.model, x.shape[1:], rng), nn.CrossEntropyLoss()
    history = nn.fit(
        model, loss, nn.Adam(model.parameters()), x, y, epochs=options.epochs, batch_size=256, validation=0.25,
        checkpoint=options.checkpoint, rng=rng, progress=not options.quiet,
    )  # fmt: skip
    history.plot(options.out)
    accuracy = nn.evaluate(model, loss, *test).accuracy
    assert accuracy is not None
    print(f"accuracy {history.val_accuracy[-1]:.2%} in validation, {accuracy:.2%} on {len(test[0])} test images")
    print(f"the history is drawn in {options.out}")
    return {"val_accuracy": history.val_accuracy[-1], "test_accuracy": accuracy}


if __name__ == "__main__":
    main()
