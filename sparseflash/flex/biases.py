"""Sum the terms that a ``score_mod`` adds into one bias tensor, indexed by pairs of tokens or by their distance.

Shape legend: B samples, H query heads, N queries, M keys; R, the largest distance between a query and a key.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseflash.flex.score_mods import Bias, Sizes, values_of
from sparseflash.integrations.mask_mods import HEAD, KEY, QUERY, SAMPLE, Made, Origin, Read, Recording, aten


def bias_of(terms: Sequence[Bias], recording: Recording, sizes: Sizes, score: Tensor) -> Tensor | None:
    """The sum of all terms as the ``bias`` of :func:`sparseflash.attention`; None if there are none.

    A term that depends on head and distance alone is evaluated once per distance, [H or 1, 2 R + 1]. If there are other
    terms, the sum is over pairs, [B or 1, H or 1, N or 1, M or 1], where a dim is 1 if no term depends on it.
    """
    pairs: Tensor | None = None
    distances: Tensor | None = None
    for term in terms:
        value = (_of_distances if term.relative else _of_pairs)(term, recording, sizes, score)
        value = value if term.number == 1 else value * term.number
        if term.relative:
            distances = value if distances is None else distances + value
        else:
            pairs = value if pairs is None else pairs + value
    if pairs is None or distances is None:
        return distances if pairs is None else pairs
    return pairs + _spread(distances, sizes)


def _of_pairs(term: Bias, recording: Recording, sizes: Sizes, score: Tensor) -> Tensor:
    if term.origin is None:
        return torch.ones((1, 1, 1, 1), dtype=score.dtype, device=score.device)
    asked = ("sample",), ("head",), ("query", "distance"), ("key", "distance")
    counts = Sizes(*(size if term.depends & set(names) else 1 for size, names in zip(sizes, asked, strict=True)))
    found = _looked_up(term.origin, recording, counts)
    return values_of(term.origin, recording, counts, score) if found is None else found.to(score.dtype)


def _of_distances(term: Bias, recording: Recording, sizes: Sizes, score: Tensor) -> Tensor:
    """[H or 1, 2 R + 1], for keys from R before their query to R after it; no pair uses those past the lengths."""
    assert term.origin is not None
    reach = max(sizes.queries, sizes.keys) - 1
    away = torch.arange(-reach, reach + 1, device=score.device).clamp(1 - sizes.queries, sizes.keys - 1)
    heads = torch.arange(sizes.heads if "head" in term.depends else 1, device=score.device)
    one = torch.vmap(recording.function(term.origin), in_dims=(None, None, 0, 0, None))
    every = torch.vmap(one, in_dims=(None, 0, None, None, None))
    table: Tensor = every(torch.zeros_like(away[0]), heads, (-away).clamp(min=0), away.clamp(min=0), score)
    return table.reshape(heads.numel(), away.numel()).to(score.dtype)


def _looked_up(origin: Origin, recording: Recording, counts: Sizes) -> Tensor | None:
    """A term ``x[b, h, q_idx, kv_idx]``, or with some of these in any order, as a view of x; None for other terms."""
    if not isinstance(origin, Made) or origin.step < 0:
        return None
    step = recording.steps[origin.step]
    source, *indices = step.arguments
    if step.operator.overloadpacket != aten.index or not isinstance(source, Read):
        return None
    tensor = recording.contents[source.number]
    axes = {SAMPLE: 0, HEAD: 1, QUERY: 2, KEY: 3}
    dims = [axes[index] for index in indices if index in axes]
    if len(dims) != len(indices) or len(set(dims)) != len(dims) or tensor.dim() != len(dims):
        return None
    for dim, axis in enumerate(dims):
        if tensor.shape[dim] < counts[axis]:  # evaluating it raises torch's own error
            return None
        tensor = tensor.narrow(dim, 0, counts[axis])
    places = tuple(slice(None) if axis in dims else None for axis in range(4))
    return tensor.permute(sorted(range(len(dims)), key=dims.__getitem__))[places]


def _spread(distances: Tensor, sizes: Sizes) -> Tensor:
    """Expand values per distance [H or 1, 2 R + 1] to values per pair [1, H or 1, N, M]."""
    queries, keys = (torch.arange(size, device=distances.device) for size in sizes[2:])
    return distances[:, distances.shape[1] // 2 + keys - queries[:, None]][None]
