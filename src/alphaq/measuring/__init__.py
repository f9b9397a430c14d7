"""What is measured of matrices, once, and kept."""
