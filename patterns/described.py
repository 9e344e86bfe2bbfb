"""Quoting users' arguments in error messages."""

from __future__ import annotations

import reprlib
from typing import Any

import numpy as np


class _Quoting(reprlib.Repr):
    """A repr of bounded length that gives the kind, dtype and shape of arrays and tensors instead of their content."""

    def repr1(self, x: Any, level: int) -> str:
        # A type such as torch.Tensor has these two as descriptors.
        if not isinstance(x, type | np.generic) and hasattr(x, "dtype") and hasattr(x, "shape"):
            return f"{type(x).__name__} of {x.dtype}, shape {tuple(x.shape)}"
        return super().repr1(x, level)


_quoting = _Quoting()
_quoting.maxstring = _quoting.maxother = _quoting.maxlong = 120


def described(value: object) -> str:
    """The repr of a value, of bounded length; arrays and tensors, also those in lists, by kind, dtype and shape.

    Example:
        >>> import numpy as np
        >>> described(np.zeros((3, 4))), described([1, np.zeros(2)]), described("text")
        ('ndarray of float64, shape (3, 4)', '[1, ndarray of float64, shape (2,)]', "'text'")
    """
    return _quoting.repr(value)
