"""The sequence tasks of the Long Range Arena: ListOps, Text, Retrieval and Image. Pathfinder has a room of its own.

Tay et al. 2021, *Long Range Arena*, https://arxiv.org/abs/2011.04006; what the files are and how they are read follows
https://github.com/google-research/long-range-arena and the loaders of https://github.com/state-spaces/s4.
"""

from sparseflash.lra.corpus import TASKS, Corpus, Example, open_corpus
from sparseflash.lra.listops import LISTOPS, Grammar

__all__ = ["LISTOPS", "TASKS", "Corpus", "Example", "Grammar", "open_corpus"]
