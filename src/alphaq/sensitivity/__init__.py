"""What a matrix's error would cost: importance from its spectrum, times the noise of each choice."""
