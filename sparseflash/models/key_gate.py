"""A learned logit for each grey value of a key, so that a model over all pixels can ignore dark ones.

Shape legend: S sequences of N tokens, H heads of size D.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseflash.models.config import PixelTransformerConfig

GREY_VALUES = 256
# Softmax gives a key with this logit a share of 1e-26, which vanishes in fp32 next to any key whose gate is 0.
SHUT = -60.0
# Head dims that carry the gate. One would suffice, but kernels load rows in units of 16 bytes in every dtype.
DIMS = 8
# The logit of a weight of 1. Adam moves a weight by about the learning rate per step, and a gate must move far.
GAIN = 16.0


class KeyGate(nn.Module):
    """Adds a learned number to the scores of a key, which depends only on the grey value of its pixel and on the head.

    It uses extra head dims: there the query holds a constant and the key its number, divided by the softmax scale. So
    every kernel, backend and mask supports it unchanged. All gates are initially 0.

    Args:
        heads: number of heads H.

    Attributes:
        weight: [256, H]; the logit is 16 times it.

    Example:
        >>> gate = KeyGate(heads=2)
        >>> q, k = torch.randn(2, 1, 2, 4, 16).unbind(0)
        >>> wide_q, wide_k = gate(q, k, torch.tensor([[0, 127, 128, 255]], dtype=torch.uint8))
        >>> wide_q.shape, torch.allclose(wide_q @ wide_k.mT * 24**-0.5, q @ k.mT * 16**-0.5, atol=1e-5)
        (torch.Size([1, 2, 4, 24]), True)
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(GREY_VALUES, heads))

    def logits(self, grey: Tensor) -> Tensor:
        """The numbers [S, H, N] of keys with these grey values, uint8 [S, N]."""
        return F.embedding(grey.int(), GAIN * self.weight).transpose(1, 2)

    def forward(self, q: Tensor, k: Tensor, grey: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [S, H, N, D + 8], whose default scale, ``(D + 8) ** -0.5``, gives the gated scores.

        Args:
            q: [S, H, N, D].
            k: [S, H, N, D].
            grey: grey values of the tokens, uint8 [S, N].
        """
        narrow, wide = q.shape[-1], q.shape[-1] + DIMS
        one, none = q.new_ones(*q.shape[:-1], 1), q.new_zeros(*q.shape[:-1], DIMS - 1)
        gate = (wide**0.5 * self.logits(grey))[..., None].to(k.dtype)
        return torch.cat([q * (wide / narrow) ** 0.5, one, none], -1), torch.cat([k, gate, none], -1)


def unset(config: PixelTransformerConfig) -> dict[str, Tensor]:
    """Gates for a model of this config that do not change its results, as before training."""
    return _gates(config, torch.ones(GREY_VALUES, dtype=torch.bool))


def opened(
    config: PixelTransformerConfig, weights: Mapping[str, Tensor]
) -> tuple[PixelTransformerConfig, dict[str, Tensor]]:
    """A model of lit pixels as a model of all pixels that gives the same answers: dark keys have shut gates.

    Every pixel is then a token and passes through every layer, with the same pattern. Lit queries give dark keys a
    share of 1e-26, and the readout is over lit pixels as before, so the answers are equal up to rounding.

    Args:
        config: config of a model whose tokens are lit pixels.
        weights: its weights.

    Returns:
        Config and weights of the model of all pixels.

    Raises:
        ValueError: a model with other tokens, or with a gate.

    Example:
        >>> config = PixelTransformerConfig(
        ...     pattern="neighborhood({shape}, 4, {order})", tokens="lit_pixels", block=(32, 32), layers=1
        ... )
        >>> wider, weights = opened(config, {})
        >>> wider.tokens, wider.key_gate, list(weights)
        ('all', True, ['layers.0.key_gate.weight'])
    """
    if config.tokens != "lit_pixels" or config.key_gate:
        kind = "have one already" if config.key_gate else f'are of a model of tokens "{config.tokens}"'
        raise ValueError(
            f"a key gate opens weights of lit pixels for all pixels, by the grey value of each; these {kind}. "
            f"With --no-key-gate they are used as they are, and can be trained"
        )
    gates = _gates(config, torch.arange(GREY_VALUES) > config.lit_above)
    return replace(config, tokens="all", key_gate=True), {**weights, **gates}


def _gates(config: PixelTransformerConfig, seen: Tensor) -> dict[str, Tensor]:
    names = [f"layers.{number}.key_gate.weight" for number in range(1 if config.tied else config.layers)]
    return {name: _weight(seen, config.heads) for name in names}


def _weight(seen: Tensor, heads: int) -> Tensor:
    return torch.where(seen, 0.0, SHUT / GAIN)[:, None].repeat(1, heads)
