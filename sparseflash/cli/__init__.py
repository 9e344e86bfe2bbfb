"""The command line. Every command has its own imports, so that ``--help`` does not wait for torch."""

import os

# Waiting threads of libgomp spin, which makes small steps ten times slower if other work shares the cores. The variable
# is read when torch is loaded, so it must be set before.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from sparseflash.cli.app import app, main

__all__ = ["app", "main"]
