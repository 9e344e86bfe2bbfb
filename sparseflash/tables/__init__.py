"""Lookup tables: a block mask in device memory, and the forms in which it is passed to kernels."""
