"""MLX: affine groups, and a config.json as mlx-lm reads it."""
