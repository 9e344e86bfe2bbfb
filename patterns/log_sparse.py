"""Keys at power-of-two distances."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparseflash.patterns.dilated import Offsets
from sparseflash.patterns.grid import Ints
from sparseflash.patterns.pattern import Bools, Pattern


@dataclass(frozen=True, repr=False)
class LogSparse(Offsets):
    """See :func:`log_sparse`."""

    name = "log_sparse"

    def allows(self, q: Ints, k: Ints) -> Bools:
        gap = np.abs(q - k)
        ok: Bools = gap & (gap - 1) == 0
        return ok

    def offsets(self, limit: int) -> Ints:
        powers = np.int64(1) << np.arange(limit.bit_length(), dtype=np.int64)
        return np.concatenate([-powers[::-1], [0], powers])


def log_sparse() -> Pattern:
    """``abs(q - k)`` is 0 or a power of two.

    LogSparse attention of Li et al., "Enhancing the Locality and Breaking the Memory Bottleneck of Transformer on Time
    Series Forecasting" (2019), section 4.2, in both directions; ``causal() & log_sparse()`` is the paper's.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.log_sparse().compile(6, block=16).to_dense()[0].astype(int)
        array([1, 1, 1, 0, 1, 0])
    """
    return LogSparse()
