"""What numba kernels share: vectors, packed codes, sums."""
