"""Show results: terminal tables and a self-contained page."""
