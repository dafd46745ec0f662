"""Elements that are moved and not looked at: what they mean does not matter, so each size has one kernel."""

import numpy as np

WORDS = {size: np.dtype(f"uint{8 * size}") for size in (1, 2, 4, 8)}
