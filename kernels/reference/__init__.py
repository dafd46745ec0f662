"""The definition of right: every kernel in plain NumPy, complete and independent of the other backends."""
