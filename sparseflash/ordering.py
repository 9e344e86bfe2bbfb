"""Token orders of an image: which pixel stands at which position of the sequence.

Lives with the patterns, which need it; this is its public address.
"""

from sparseflash.patterns.ordering import ORDERS, Indices, token_order

__all__ = ["ORDERS", "Indices", "token_order"]
