"""A recurrent network adds binary numbers: a sequence of pairs of bits in, the sequence of the sum's bits out.

    python examples/rnn.py [--epochs 15] [--seed 0] [--out rnn.png] [--quiet]

At each step the network sees one bit of either number, the lowest first, and says a bit of their sum. To do that it
must carry: its hidden state is its memory. It is trained on numbers of 8 bits, and what it learned is a rule, not a
table: it adds numbers of 40 bits as well, a trillion, which it never saw the like of.
"""

import common
import numpy as np

from tilewise import nn

BITS, MORE_BITS = 8, 40


def sums(count: int, bits: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of numbers below 2**(bits - 1), x (N, bits, 2), and their sums, y (N, bits, 1); the lowest bit first."""
    numbers = rng.integers(2 ** (bits - 1), size=(2, count))
    x = np.stack([numbers >> i & 1 for i in range(bits)]).transpose(2, 0, 1)
    y = np.stack([numbers.sum(0) >> i & 1 for i in range(bits)], axis=1)
    return x.astype(np.float32), y[..., None]


def right(model: nn.Module, x: np.ndarray, y: np.ndarray) -> float:
    """The share of sums all of whose bits are right."""
    return float(((nn.predict(model, x) > 0) == y).all((1, 2)).mean())


def network(rng: np.random.Generator) -> nn.Sequential:
    """Steps of (N, steps, 2) to one number (N, steps, 1) for each: the logit of the sum's bit."""
    return nn.Sequential(nn.RNN(2, 16, batch_first=True, returns="sequence", rng=rng), nn.Linear(16, 1, rng=rng))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    options = common.Arguments(__doc__, "rnn.png", epochs=15).parse(arguments)
    rng = np.random.default_rng(options.seed)
    x, y = sums(2000, BITS, rng)
    test, longer = sums(500, BITS, rng), sums(500, MORE_BITS, rng)
    model = network(rng)
    history = nn.fit(
        model, nn.BCEWithLogitsLoss(), nn.Adam(model.parameters(), lr=0.01), x, y, epochs=options.epochs,
        before_step=lambda: nn.clip_grad_norm_(model.parameters(), 1.0), rng=rng, progress=not options.quiet,
    )  # fmt: skip
    results = {"short": right(model, *test), "long": right(model, *longer)}
    print(f"{results['short']:.1%} of new sums of {BITS} bits are right in all bits")
    print(f"{results['long']:.1%} of sums of {MORE_BITS} bits are")

    figure, (descent, memory) = common.panels(2)
    common.curves(descent, {"training": history.loss}, "binary cross-entropy")
    states = nn.predict(model[0], longer[0][:1])[0]  # (steps, 16): what the network remembers in one long addition
    memory.imshow(states.T, cmap="coolwarm", vmin=-1, vmax=1, aspect="auto")
    memory.set(xlabel="step", ylabel="hidden unit", title="hidden state in one addition")
    figure.savefig(options.out)
    print(f"the loss and the memory are drawn in {options.out}")
    return results


if __name__ == "__main__":
    main()
