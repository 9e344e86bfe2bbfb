"""The former address of `sparseflash.train.pretrain`."""

from sparseflash.train.pretrain import GREY, MaskedPixels, hidden_pixels, pretrain

__all__ = ["GREY", "MaskedPixels", "hidden_pixels", "pretrain"]
