"""The implementations to time: ours, SDPA's backends, compiled FlexAttention in several forms, FlashAttention-4.

A contender is a function of q, k and v, prepared for a mask; it returns out, or out and lse. One that is not to be had
here is named with the reason.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask as FlexMask
from torch.nn.attention.flex_attention import flex_attention

import sparseflash as sf
from benchmarks.masks import Mask
from sparseflash.integrations.flex import to_flex
from sparseflash.patterns import BlockMask, Pattern
from sparseflash.tools.timing import reason

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]

# FlexAttention's blocks may differ from ours, and its compiler searches launches when asked to.
FLEX_FORMS: dict[str, dict[str, Any]] = {
    "flex": {},
    "flex, launches searched": {"mode": "max-autotune-no-cudagraphs"},
    "flex, TMA": {"options": {"USE_TMA": True}},
    "flex, blocks of 256": {"block": 256},
    "flex, blocks of 64": {"block": 64},
}


def ours(mask: BlockMask, device: torch.device) -> Attend:
    """Through the table of a mask."""
    table = sf.lookup(mask, device)
    return lambda q, k, v: sf.attention(q, k, v, table, return_lse=True)


def prepare_torch() -> None:
    """Let FlexAttention compile one program for each mask_mod, and run one backward pass many times."""
    torch._dynamo.config.recompile_limit = 1000
    torch._functorch.config.donated_buffer = False


def peers(
    mask: Mask, pattern: Pattern, tokens: int, block: int, device: torch.device, every_form: bool
) -> tuple[dict[str, Attend], dict[str, str]]:
    """All implementations but ours, for a mask of ``tokens`` tokens.

    Args:
        mask: what is attended to, in FlexAttention's form too.
        pattern: the same for so many tokens.
        tokens: of queries and keys.
        block: side of the blocks that our table has.
        device: where the operands are.
        every_form: FlexAttention in all its forms, each of which compiles a program.

    Returns:
        Those to be had, and the reasons for those that are not.
    """
    found: dict[str, Attend] = {}
    left_out: dict[str, str] = {}
    causal = {"full()": False, "causal()": True}.get(str(pattern))
    if causal is not None:
        found |= _sdpa(causal, device)
    for name, form in FLEX_FORMS.items() if every_form else [("flex", FLEX_FORMS["flex"])]:
        try:
            found[name] = flex(mask, pattern, tokens, device, **{"block": block, **form})
        except Exception as error:  # another library's compiler: the other figures are still wanted
            left_out[name] = reason(error)
    try:
        found["fa4"] = flash_attention_4(pattern, tokens, block, device)
    except Exception as error:
        left_out["fa4"] = reason(error)
    return found, left_out


def _sdpa(causal: bool, device: torch.device) -> dict[str, Attend]:
    def attend(backend: SDPBackend | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        chosen: AbstractContextManager[Any] = nullcontext() if backend is None else sdpa_kernel(backend)
        with chosen:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

    backends: dict[str, SDPBackend | None] = {"sdpa": None}
    if device.type == "cuda":
        backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    return {name: partial(attend, backend) for name, backend in backends.items()}


def flex(
    mask: Mask,
    pattern: Pattern,
    tokens: int,
    device: torch.device,
    block: int,
    mode: str | None = None,
    options: Any = None,
) -> Attend:
    """FlexAttention over the mask's blocks, with the mask_mod that its user would write."""
    listed = to_flex(pattern.compile(tokens, block=block), device)
    if mask.mod is not None:
        with torch.device(device):
            mod = mask.mod(tokens)
        listed = FlexMask.from_kv_blocks(
            listed.kv_num_blocks, listed.kv_indices, listed.full_kv_num_blocks, listed.full_kv_indices,
            BLOCK_SIZE=listed.BLOCK_SIZE, mask_mod=mod, seq_lengths=listed.seq_lengths,
        )  # fmt: skip
    compiled = torch.compile(flex_attention, mode=mode)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        grouped = q.shape[1] != k.shape[1]
        return compiled(q, k, v, block_mask=listed, enable_gqa=grouped, kernel_options=options)

    return attend


def flash_attention_4(pattern: Pattern, tokens: int, block: int, device: torch.device) -> Attend:
    """`flash_attn.cute`: dense, causal, or over whole blocks.

    Raises:
        ImportError: it is not installed.
        NotImplementedError: the mask cuts blocks, which takes code in its own language, or this version has no
            block-sparse tables.
    """
    interface = importlib.import_module("flash_attn.cute.interface")
    causal = {"full()": False, "causal()": True}.get(str(pattern))
    tables: dict[str, Any] = {}
    if causal is None:
        compiled = pattern.compile(tokens, block=block)
        if len(compiled.tiles):
            raise NotImplementedError("PARTIAL blocks: FlashAttention-4 takes token masks as CuTe code")
        if "block_sparse_tensors" not in inspect.signature(interface.flash_attn_func).parameters:
            raise NotImplementedError("this version of flash_attn.cute takes no block_sparse_tensors")
        listed: Any = to_flex(compiled, device)
        of = importlib.import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
        rows, columns = (
            of(
                mask_block_cnt=torch.zeros_like(count),
                mask_block_idx=torch.zeros_like(index),
                full_block_cnt=count,
                full_block_idx=index,
            )
            for count, index in (
                (listed.full_kv_num_blocks, listed.full_kv_indices),
                (listed.full_q_num_blocks, listed.full_q_indices),
            )
        )
        tables = {"block_sparse_tensors": rows, "block_sparse_tensors_bwd": columns}
        known = inspect.signature(interface.flash_attn_func).parameters
        tables = {name: table for name, table in tables.items() if name in known}

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        given = (x.transpose(1, 2) for x in (q, k, v))  # its tensors are [batch, tokens, heads, dim]
        out = interface.flash_attn_func(*given, causal=bool(causal), **tables)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend
