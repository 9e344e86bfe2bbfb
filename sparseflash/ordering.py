"""Token orders of an image: the position of each pixel in the sequence.

The public address of :func:`token_order`, which is defined in `sparseflash.patterns.ordering`.
"""

from sparseflash.patterns.ordering import ORDERS, Indices, token_order

__all__ = ["ORDERS", "Indices", "token_order"]
