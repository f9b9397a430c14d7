"""Load and run native checkpoints."""
