"""Track the denoising step of each forward pass, and its number of text tokens."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from sparseflash.patterns.pattern import checked_int

ATTRIBUTE = "sparseflash_denoising"  # of a transformer: the Denoising that `use_pattern` attached to it


class Denoising:
    """Tracks the forward passes of a transformer.

    Attributes:
        step: index of the denoising step, from 0.
        text: number of prompt tokens in this pass.
    """

    def __init__(self, steps: frozenset[int] | None, dense_steps: int) -> None:
        self._steps, self._dense_steps = steps, dense_steps
        self._timestep: float | None = None
        self._handle: Any = None
        self.step = -1
        self.text = 0

    @classmethod
    def of(cls, steps: Collection[int] | None, dense_steps: int) -> Denoising:
        """A checked instance: sparse in ``steps``, or in all steps after the first ``dense_steps``.

        Raises:
            TypeError: a number that is not an int.
            ValueError: a negative number, or both arguments.
        """
        dense_steps = checked_int("use_pattern", "dense_steps", dense_steps, 0)
        if steps is not None and dense_steps:
            raise ValueError(
                f"use_pattern: steps= already selects the sparse steps: leave out dense_steps={dense_steps}"
            )
        numbers = None if steps is None else frozenset(checked_int("use_pattern", "step", s, 0) for s in steps)
        return cls(numbers, dense_steps)

    def attach(self, transformer: Any) -> None:
        """Track a transformer from its next forward pass on."""
        self._handle = transformer.register_forward_pre_hook(self.begin, with_kwargs=True)
        setattr(transformer, ATTRIBUTE, self)

    @staticmethod
    def detach(transformer: Any) -> None:
        """Remove the Denoising attached to a transformer, if any."""
        attached = transformer.__dict__.pop(ATTRIBUTE, None)
        if attached is not None:
            attached._handle.remove()

    @property
    def is_sparse(self) -> bool:
        """Whether this pass uses the pattern."""
        return self.step >= self._dense_steps if self._steps is None else self.step in self._steps

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # reads a number from the device
    def begin(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook before a forward pass: updates step and text."""
        given = inspect.signature(transformer.forward).bind_partial(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        prompt = given.get("encoder_hidden_states")
        self.text = 0 if prompt is None else prompt.shape[1]
        if self._steps is not None or self._dense_steps:
            self._count(given["timestep"])
        else:
            self.step = 0

    def _count(self, timestep: Tensor | float) -> None:
        # With a given first frame, Wan passes a timestep per token; the largest is that of the other frames.
        now = float(timestep.max() if isinstance(timestep, Tensor) else timestep)
        if self._timestep is None or now > self._timestep:
            self.step = 0
        elif now < self._timestep:
            self.step += 1
        self._timestep = now
