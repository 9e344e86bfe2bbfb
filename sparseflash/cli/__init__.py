"""The command line. Every command imports what it needs by itself, so that ``--help`` does not wait for torch."""

import os

# Threads of libgomp spin while they wait; beside other work on the same cores that makes small steps ten times slower.
# It is read when torch is loaded, so it must be set before.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from sparseflash.cli.app import app, main

__all__ = ["app", "main"]
