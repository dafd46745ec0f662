"""How far training is, on stderr."""

import sys

from .history import History


class Progress:
    """A tqdm bar over all batches; a line for each epoch where tqdm is missing; nothing where not wanted."""

    def __init__(self, epochs: int, batches: int, wanted: bool, done: int = 0):
        self.epochs, self.batches, self.wanted, self.done = epochs, batches, wanted, done
        self.bar = None

    def __enter__(self):
        if self.wanted:
            try:
                from tqdm import tqdm
            except ImportError:
                return self
            batches, first = self.epochs * self.batches, min(self.done + 1, self.epochs)
            start = self.done * self.batches
            self.bar = tqdm(total=batches, initial=start, unit="batch", desc=f"epoch {first}/{self.epochs}")
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()
        return False

    def batch(self, loss: float):
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self.bar.update()

    def epoch(self, history: History):
        done = len(history)
        if self.bar is not None:
            self.bar.set_description(f"epoch {min(done + 1, self.epochs)}/{self.epochs}", refresh=False)
        elif self.wanted:
            shown = [f"{name} {values[-1]:.4f}" for name, values in history.as_dict().items() if name != "seconds"]
            print(f"epoch {done}/{self.epochs}: {', '.join(shown)}, {history.seconds[-1]:.1f} s", file=sys.stderr)
