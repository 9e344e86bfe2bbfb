"""Layers of a model."""
