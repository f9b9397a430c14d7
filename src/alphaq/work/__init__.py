"""How work is spread, noted and read back: workers, journals, what strangers wrote."""
