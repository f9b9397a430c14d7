"""How much quality was kept."""
