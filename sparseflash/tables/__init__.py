"""Lookup tables: how a block mask lies in memory, and in which forms it travels to a kernel."""
