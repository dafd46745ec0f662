"""How close is close: computed from the dtype and the length of the sum, never chosen by hand."""

import numpy as np


def tolerance(dtype, reduction: int = 1) -> float:
    """The relative error allowed for a sum of `reduction` products in `dtype`, against the largest result.

    Rounding errors of a sum of n random terms grow like sqrt(n); 8 covers the spread over all elements.

    float16 stores results of arithmetic in float32: one rounding more than that.
    """
    if np.dtype(dtype) == np.float16:
        return float(np.finfo(np.float16).eps) + tolerance(np.float32, reduction)
    bound = 8 * float(np.finfo(dtype).eps) * (1 + max(reduction, 1)) ** 0.5
    assert bound < 1e-2, f"a tolerance of {bound} would accept anything"
    return bound


def assert_close(actual, expected, reduction: int = 1, dtype=None, scale: float | None = None):
    """Every element within tolerance(dtype, reduction) * scale; same shape; NaN and Inf exactly where expected.

    scale: the size of the results before cancellation; the largest finite |expected| where not given.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    dtype = actual.dtype if dtype is None else np.dtype(dtype)
    if dtype.kind != "f":
        np.testing.assert_array_equal(actual, expected)
        return
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected), err_msg="NaN in other places")
    infinite = np.isinf(expected)
    np.testing.assert_array_equal(actual[infinite], expected[infinite], err_msg="Inf in other places")
    if not finite.any():
        return
    error = np.abs(actual[finite].astype(np.float64) - expected[finite].astype(np.float64))
    size = float(np.abs(expected[finite]).max()) if scale is None else scale
    bound = tolerance(dtype, reduction) * max(size, float(np.finfo(dtype).tiny))
    worst = error.max()
    assert worst <= bound, f"error {worst:.3g} > {bound:.3g} (largest result {size:.3g}, {dtype}, sum of {reduction})"
