"""What text, or the router alone, says about experts: who is used, by what, and what rounding does to outputs."""
