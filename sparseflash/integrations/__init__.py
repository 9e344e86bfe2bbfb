"""Doors to other libraries. Each is imported by its own name, so that none is a dependency of the package."""
