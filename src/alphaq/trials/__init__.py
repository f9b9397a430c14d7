"""Trying plans for real: compare and search."""
