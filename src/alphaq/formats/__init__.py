"""The ways to store a matrix: one module each, listed in `table`."""
