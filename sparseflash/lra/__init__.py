"""The sequence tasks of the Long Range Arena: ListOps, Text, Retrieval and Image.

Tay et al. 2021, *Long Range Arena*, https://arxiv.org/abs/2011.04006. The files, and how they are read, follow
https://github.com/google-research/long-range-arena and the loaders of https://github.com/state-spaces/s4. Pathfinder is
in :mod:`sparseflash.pathfinder`.
"""

from sparseflash.lra.corpus import TASKS, Corpus, Example, open_corpus
from sparseflash.lra.listops import LISTOPS, Grammar

__all__ = ["LISTOPS", "TASKS", "Corpus", "Example", "Grammar", "open_corpus"]
