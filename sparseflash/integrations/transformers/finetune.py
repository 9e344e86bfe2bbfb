"""Make a dense language model sparse: switch it over, fine-tune it, and measure perplexity, for one or more patterns.

Shape legend: B samples of N tokens per batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from sparseflash.integrations.transformers import use_pattern
from sparseflash.integrations.transformers.operators import checked
from sparseflash.patterns.causal import causal
from sparseflash.patterns.pattern import Pattern

Batch: TypeAlias = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Row:
    """The result of one pattern.

    Attributes:
        pattern: its text.
        density: stored blocks / all blocks at the length of the test batches, causal.
        switched: perplexity after switching the dense model over, without training.
        trained: perplexity after fine-tuning.
    """

    pattern: str
    density: float
    switched: float
    trained: float


@torch.no_grad()
def perplexity(model: Any, batches: Iterable[Batch]) -> float:
    """The exponential of the mean cross-entropy, in nats, of predicting each token from those before it.

    Args:
        model: a causal language model of Transformers.
        batches: token ids [B, N], or mappings with ``input_ids`` and ``attention_mask`` (1 for tokens, 0 for padding).

    Raises:
        ValueError: no token to predict.
    """
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        loss, predicted = _loss(model, batch)
        total, count = total + float(loss) * predicted, count + predicted
    model.train(training)
    if not count:
        raise ValueError("the batches hold no token that follows another one: nothing to measure")
    return math.exp(total / count)


def train(
    model: Any,
    batches: Sequence[Batch],
    *,
    steps: int,
    lr: float = 1e-4,
    warmup: int = 10,
    clip: float = 1.0,
    label: str = "training",
    console: Console | None = None,
) -> list[float]:
    """Train a causal language model with AdamW, linear warm-up and cosine decay; batches are repeated in order.

    For more control use Transformers' ``Trainer`` or your own loop: nothing here is specific to the attention.

    Args:
        model: with any attention; its weights are changed in place.
        batches: as for :func:`perplexity`.
        steps: optimizer steps.
        lr: peak learning rate.
        warmup: steps until the peak learning rate.
        clip: largest norm of the gradient.
        label: text before the progress bar.
        console: for the progress bar; default the terminal.

    Returns:
        The loss of each step.

    Raises:
        ValueError: no batches, or fewer than 0 steps.
    """
    if not batches:
        raise ValueError("no batches to train on")
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    losses = []
    model.train()
    for step, batch in track(enumerate(islice(cycle(batches), steps)), label, total=steps, console=console):
        rate = lr * min(1.0, (step + 1) / (warmup + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, _ = _loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def compare(
    model: Any,
    patterns: Sequence[str | Pattern],
    train_batches: Sequence[Batch],
    test_batches: Sequence[Batch],
    *,
    steps: int = 100,
    lr: float = 1e-4,
    block: int = 128,
    console: Console | None = None,
) -> list[Row]:
    """Fine-tune a dense model into a sparse one for each pattern, and print the perplexity of each.

    Every pattern starts from the model's present weights; the model itself is not changed. Include ``full()`` as a
    control: the same number of steps with dense attention.

    Args:
        model: a causal language model of Transformers.
        patterns: patterns or their texts.
        train_batches: as for :func:`train`.
        test_batches: as for :func:`perplexity`.
        steps: optimizer steps for each pattern; 0 only switches over.
        lr: peak learning rate.
        block: tokens per block side.
        console: for the table; default the terminal.

    Returns:
        A row for each pattern, in order.

    Raises:
        ValueError: no patterns, a text that is not a pattern, nothing to train on or to measure.
    """
    if not patterns:
        raise ValueError("no patterns to compare")
    texts = [str(pattern) for pattern in patterns]
    tokens = max(_ids(batch).shape[1] for batch in test_batches) if test_batches else 1
    densities = [(checked(text) & causal()).compile(tokens, block=block).density for text in texts]
    console = console or Console()
    dense = perplexity(model, test_batches)
    rows = []
    for text, density in zip(texts, densities, strict=True):
        sparse = use_pattern(copy.deepcopy(model), text, block=block)
        switched = perplexity(sparse, test_batches)
        if steps:
            train(sparse, train_batches, steps=steps, lr=lr, label=text, console=console)
        rows.append(Row(text, density, switched, perplexity(sparse, test_batches)))
    console.print(_table(rows, dense, steps, tokens))
    return rows


def _table(rows: Sequence[Row], dense: float, steps: int, tokens: int) -> Table:
    table = Table(title=f"perplexity at {tokens:,} tokens; the dense model has {dense:.2f}")
    table.add_column("pattern")
    for name in ("blocks read", "switched over", f"after {steps} steps"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row.pattern, f"{row.density:.1%}", f"{row.switched:.2f}", f"{row.trained:.2f}")
    return table


def _ids(batch: Batch) -> Tensor:
    return batch if isinstance(batch, Tensor) else batch["input_ids"]


def _loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """The mean loss of the predicted tokens, and their number."""
    ids = _ids(batch).to(model.device)
    mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
    mask = None if mask is None else mask.to(model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    targets = ids[:, 1:]
    if mask is not None:  # a token counts if neither it nor the one before it is padding
        targets = targets.masked_fill((mask[:, 1:] * mask[:, :-1]) == 0, -100)
    predicted = int((targets != -100).sum())
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="sum")
    return loss / max(predicted, 1), predicted
