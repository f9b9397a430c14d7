"""The ways to store a matrix."""
