"""Checkpoints on disk: read lazily, matched to roles, written atomically."""
