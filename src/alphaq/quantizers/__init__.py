"""Quantizers and the packed form of their results."""
