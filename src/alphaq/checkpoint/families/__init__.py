"""Families of models: how they name their tensors, what their configs mean, how they route."""
