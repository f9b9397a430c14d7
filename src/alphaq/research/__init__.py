"""Estimators and scoring rules that are kept for comparison: by the log none beats the default.

They are reached through tables alone (`METHODS`, `PROBES`, `--tail`, `--spectrum`); planning knows none of them.
"""
