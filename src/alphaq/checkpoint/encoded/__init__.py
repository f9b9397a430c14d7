"""Weights that a checkpoint stores in 8 or 4 bits: who says so, where their scales are, and decoding."""
