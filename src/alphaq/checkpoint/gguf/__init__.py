"""GGUF files: their format, how families map onto it, opening one as a checkpoint."""
