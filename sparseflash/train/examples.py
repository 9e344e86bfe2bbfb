"""The former address of `sparseflash.train.sample_batch`."""

from sparseflash.train.sample_batch import model_and_batch

__all__ = ["model_and_batch"]
