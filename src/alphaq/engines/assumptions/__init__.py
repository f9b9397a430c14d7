"""What each engine takes for granted: ENGINE.toml, and what reads it."""
