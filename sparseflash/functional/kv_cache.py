"""The cache of keys and values for decoding."""

from __future__ import annotations

import os
from typing import Literal, overload

import torch

from sparseflash.functional.arguments import check_counts, check_size
from sparseflash.functional.attention import Mask
from sparseflash.functional.decode import decode
from sparseflash.functional.operands import DTYPES
from sparseflash.patterns.described import described


class KVCache:
    """Keys, values and lengths of a batch of growing sequences, in memory that is allocated once.

    ``k`` [B, Hkv, capacity, D] and ``v`` [B, Hkv, capacity, Dv] are views of that memory, ``lengths`` int32 [B] counts
    the tokens of each sample; :func:`sparseflash.decode` takes all three. The host never waits for a GPU, and a growing
    sequence compiles nothing. The capacity is fixed. For more room, make a cache of larger capacity and append the
    tokens of this one, ``k[:, :, :n]`` and ``v[:, :, :n]``.

    Overflow: ``append`` raises if the host knows that the tokens do not fit. The host knows lengths on the CPU, and
    lengths on a GPU that did not depend on tensors given to ``append`` or ``rewind``; in a compiled graph it knows
    none. Otherwise the tokens that do not fit are dropped: nothing is written outside the cache, ``lengths`` keeps
    counting, and queries past the capacity get 0 and -inf from ``attend``, so that an overflow can be detected later.

    Args:
        batch: number of samples B.
        kv_heads: number of key heads Hkv.
        capacity: tokens per sample.
        head_dim: D, the size of a key.
        value_dim: Dv, the size of a value; default D.
        dtype: of keys and values.
        device: of keys, values and lengths.

    Raises:
        TypeError: a size is not an int, or attention does not take this dtype.
        ValueError: a size below 1.

    Example:
        >>> import torch, sparseflash as sf
        >>> q, k, v = torch.randn(3, 1, 4, 200, 32).unbind(0)
        >>> pattern = sf.parse("causal() & streaming(4, 64)")
        >>> cache = sf.KVCache(1, 4, 256, 32)
        >>> cache.append(k[:, :, :150], v[:, :, :150])  # the prompt
        >>> for t in range(150, 200):
        ...     cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        ...     out = cache.attend(q[:, :, t : t + 1], pattern)
        >>> torch.allclose(out, sf.attention(q, k, v, pattern)[:, :, -1:], atol=1e-5)
        True
        >>> cache
        KVCache(batch 1, 4 heads, room for 256 tokens, 263,168 bytes on cpu)
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {"batch": batch, "kv_heads": kv_heads, "capacity": capacity, "head_dim": head_dim}
        for name, size in (sizes | {"value_dim": value_dim}).items():
            check_size(name, size)
        if dtype not in DTYPES:
            raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
        self.capacity = capacity
        with torch.inference_mode(False):  # usable outside of inference mode even if it is made inside
            # One slot more than the capacity: dropped tokens are written there.
            self._k = torch.zeros((batch, kv_heads, capacity + 1, head_dim), dtype=dtype, device=device)
            self._v = torch.zeros((batch, kv_heads, capacity + 1, value_dim), dtype=dtype, device=device)
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._at_least = 0  # a lower bound of the lengths, known without asking the device

    @property
    def k(self) -> torch.Tensor:
        """[B, Hkv, capacity, D]."""
        return self._k[:, :, : self.capacity]

    @property
    def v(self) -> torch.Tensor:
        """[B, Hkv, capacity, Dv]."""
        return self._v[:, :, : self.capacity]

    def append(self, k_new: torch.Tensor, v_new: torch.Tensor, counts: torch.Tensor | None = None) -> None:
        """Append the next n tokens of each sample.

        Args:
            k_new: [B, Hkv, n, D], any n, in the cache's dtype and on its device. Gradients are not recorded.
            v_new: [B, Hkv, n, Dv].
            counts: int32 or int64 [B], 0 to n: append only this many tokens of a sample; the rest is padding, as in
                prompts of unequal lengths. Default: all n.

        Raises:
            TypeError: another dtype, or counts that are not ints.
            ValueError: another shape or device, an overflow that the host knows of, or counts outside 0 to n. Counts
                on a GPU and in compiled graphs are clamped instead, unless ``SPARSEFLASH_DEBUG=1``.
        """
        self._check_new(k_new, v_new, counts)
        n = k_new.shape[2]
        if counts is not None:
            counts = self._within("counts", counts, n)
        if not torch.compiler.is_compiling():
            self._check_room(n, counts)
        step = torch.arange(n, device=self.lengths.device)
        slot = self.lengths[:, None] + step
        if counts is not None:
            slot = slot.masked_fill(step >= counts[:, None], self.capacity)
        slot = slot.clamp(max=self.capacity)
        sample = torch.arange(len(self.lengths), device=self.lengths.device)[:, None]
        self._k[sample, :, slot] = k_new.detach().transpose(1, 2)
        self._v[sample, :, slot] = v_new.detach().transpose(1, 2)
        self.lengths += n if counts is None else counts

    def rewind(self, tokens: int | torch.Tensor) -> None:
        """Remove the newest tokens of each sample, for example those of a draft model that the large model rejected.

        Args:
            tokens: how many to remove: an int for all samples, or int32 or int64 [B] on the cache's device. At least
                0, and at most the length of a sample.

        Raises:
            TypeError: tokens are not ints.
            ValueError: a tensor of another shape or device, a negative number, or more tokens than a sample has.
                Numbers on a GPU and in compiled graphs are clamped instead, unless ``SPARSEFLASH_DEBUG=1``.
        """
        if isinstance(tokens, torch.Tensor):
            check_counts("tokens", tokens, self.lengths, "the cache")
        elif isinstance(tokens, bool) or not isinstance(tokens, int):
            raise TypeError(f"tokens must be an int or a tensor of ints [{len(self.lengths)}], got {described(tokens)}")
        elif tokens < 0:
            raise ValueError(f"tokens must not be negative, got {tokens}")
        self.lengths.sub_(self._within("tokens", torch.as_tensor(tokens, device=self.lengths.device), self.lengths))
        if not torch.compiler.is_compiling():
            self._at_least = 0 if isinstance(tokens, torch.Tensor) else max(0, self._at_least - tokens)

    def reset(self) -> None:
        """Remove all tokens. The memory stays allocated."""
        self.lengths.zero_()
        if not torch.compiler.is_compiling():
            self._at_least = 0

    @overload
    def attend(
        self, q: torch.Tensor, mask: Mask = None, *, scale: float | None = None, softcap: float | None = None,
        alibi_slopes: torch.Tensor | None = None, sinks: torch.Tensor | None = None,
        return_lse: Literal[False] = False, backend: str | None = None,
    ) -> torch.Tensor: ...  # fmt: skip
    @overload
    def attend(
        self, q: torch.Tensor, mask: Mask = None, *, scale: float | None = None, softcap: float | None = None,
        alibi_slopes: torch.Tensor | None = None, sinks: torch.Tensor | None = None, return_lse: Literal[True],
        backend: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip

    def attend(
        self,
        q: torch.Tensor,
        mask: Mask = None,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        alibi_slopes: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        return_lse: bool = False,
        backend: str | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of the newest n tokens, already appended, over all tokens: see :func:`sparseflash.decode`.

        Args:
            q: [B, Hq, n, D], 1 to 16 queries.
            mask: for ``capacity`` queries and keys.
            scale: factor on the scores, default ``D ** -0.5``.
            softcap: see :func:`sparseflash.attention`, also for the next two.
            alibi_slopes: fp32 [Hq] or [B, Hq].
            sinks: floating [Hq].
            return_lse: also return the log-sum-exp.
            backend: "cpu" or "triton"; None chooses by the device.
        """
        return decode(
            *(q, self.k, self.v, mask),
            lengths=self.lengths,
            scale=scale,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            return_lse=return_lse,
            backend=backend,
        )

    def __repr__(self) -> str:
        batch, heads = self._k.shape[:2]
        size = self._k.nbytes + self._v.nbytes
        return (
            f"KVCache(batch {batch:,}, {heads} heads, room for {self.capacity:,} tokens, {size:,} bytes on "
            f"{self._k.device})"
        )

    def _check_new(self, k_new: torch.Tensor, v_new: torch.Tensor, counts: torch.Tensor | None) -> None:
        for name, x, held in (("k_new", k_new, self._k), ("v_new", v_new, self._v)):
            if not isinstance(x, torch.Tensor) or x.dtype != held.dtype:
                got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
                raise TypeError(f"{name} must be a tensor of {held.dtype} like the cache, got {got}")
            B, H, _, D = held.shape
            if x.dim() != 4 or (x.shape[0], x.shape[1], x.shape[3]) != (B, H, D):
                raise ValueError(f"{name} must be [{B}, {H}, tokens, {D}] for this cache, got {tuple(x.shape)}")
            if x.device != held.device:
                raise ValueError(f"{name} must lie on {held.device} with the cache, got {x.device}")
        if k_new.shape[2] != v_new.shape[2]:
            raise ValueError(
                f"k_new and v_new must have equally many tokens, got {tuple(k_new.shape)} and {tuple(v_new.shape)}"
            )
        if counts is not None:
            check_counts("counts", counts, self.lengths, "the cache")

    def _within(self, name: str, numbers: torch.Tensor, most: int | torch.Tensor) -> torch.Tensor:
        """Numbers within 0 to ``most``: raises for others if the host can read them, and clamps them otherwise."""
        looked_at = numbers.device.type == "cpu" or os.environ.get("SPARSEFLASH_DEBUG") == "1"
        if looked_at and not torch.compiler.is_compiling():
            outside = (numbers < 0) | (numbers > most)
            for sample in outside.expand(self.lengths.shape).nonzero().flatten()[:1].tolist():
                number = int(numbers.expand(self.lengths.shape)[sample])
                limit = most if isinstance(most, int) else int(most[sample])
                raise ValueError(f"{name} of sample {sample} must be 0 to {limit}, got {number}")
            return numbers
        return numbers.clamp(min=0).clamp(max=most)

    def _check_room(self, n: int, counts: torch.Tensor | None) -> None:
        """Raise if the tokens are known not to fit, and update the lower bound of the lengths."""
        if self.lengths.device.type == "cpu":
            longest = int((self.lengths + (n if counts is None else counts)).max())
        else:
            longest = self._at_least + (n if counts is None else 0)
        if longest > self.capacity:
            raise ValueError(
                f"the cache has room for {self.capacity} tokens per sample, and {longest} would be there after this "
                f"append; make one to hold them, KVCache(..., capacity={2 * longest}), and append this one's tokens"
            )
        self._at_least += n if counts is None else 0
