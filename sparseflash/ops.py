"""The former name of `sparseflash.functional.operators`, which registers the operators of exported programs."""

import warnings

from sparseflash.functional import operators

warnings.warn(
    "sparseflash.ops is now sparseflash.functional.operators: import that, or torch before sparseflash",
    DeprecationWarning,
    stacklevel=2,
)


def __getattr__(name: str) -> object:
    return getattr(operators, name)
