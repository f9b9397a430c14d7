"""Spend a budget: one choice per unit, least total loss."""
