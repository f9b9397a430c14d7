"""Engine profiles: what may be chosen, which matrices must agree, and how to write files."""
