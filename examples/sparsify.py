"""A dense language model made sparse: fine-tune it for each of some patterns, and print perplexity by pattern.

The model is one saved on disk by Transformers, or without --model a small GPT-2 over bytes that is trained first, on
the source of this project. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import sparseflash as sf
from sparseflash.integrations.transformers import compare, register, train

PATTERNS = ("full()", "local(64)", "streaming(4, 60)", "local(32) | strided(32)", "log_sparse()")
BYTES = 256


def text_of(paths: list[Path]) -> bytes:
    """Files, or those of this project, behind each other."""
    if not paths:
        folder = Path(sf.__file__).parent
        paths = sorted(path for path in folder.rglob("*.py"))
    return b"\n\n".join(path.read_bytes() for path in paths)


def batches(ids: Tensor, tokens: int, batch: int, seed: int = 0) -> list[Tensor]:
    """Int64 [batch, tokens] each: the text in stretches, shuffled."""
    rows = ids[: len(ids) // tokens * tokens].view(-1, tokens)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    return [part for part in rows.split(batch) if len(part) == batch]


def small_model(tokens: int) -> Any:
    """A random GPT-2 over bytes."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=BYTES, n_positions=tokens, n_embd=96, n_layer=3, n_head=4, attn_pdrop=0.0, resid_pdrop=0.0,
        embd_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="block_sparse")


def main(arguments: list[str] | None = None) -> None:
    """Train or load the dense model, then one sparse model for each pattern."""
    parser = argparse.ArgumentParser(prog="python -m examples.sparsify", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of a causal language model, with its tokenizer")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="files to train and measure on; default ours")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, help="expressions; default some of each kind")
    parser.add_argument("--tokens", type=int, default=256, help="of a sequence; default 256")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step; default 8")
    parser.add_argument("--dense-steps", type=int, default=300, help="of the small model's own training; default 300")
    parser.add_argument("--steps", type=int, default=50, help="of fine-tuning for each pattern; default 50")
    parser.add_argument("--lr", type=float, help="peak learning rate; default 1e-3 for the small model, else 5e-5")
    chosen = parser.parse_args(arguments)
    register()
    torch.manual_seed(0)
    text, console = text_of(chosen.text), Console()
    if chosen.model is None:
        ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    else:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(chosen.model)
        ids = tokenizer(text.decode(), return_tensors="pt").input_ids[0]
    held_out = len(ids) // 10
    training, test = (batches(part, chosen.tokens, chosen.batch) for part in (ids[held_out:], ids[:held_out]))
    if not training or not test:
        parser.error(
            f"{len(ids):,} tokens of text are too few for batches of {chosen.batch} x {chosen.tokens}; give more --text"
        )
    lr = chosen.lr if chosen.lr is not None else 1e-3 if chosen.model is None else 5e-5
    if chosen.model is not None:
        model = transformers.AutoModelForCausalLM.from_pretrained(chosen.model, attn_implementation="block_sparse")
    else:
        model = small_model(chosen.tokens)
        train(model, training, steps=chosen.dense_steps, lr=lr, label="dense model", console=console)
    compare(model, chosen.patterns, training, test[:16], steps=chosen.steps, lr=lr, block=16, console=console)


if __name__ == "__main__":
    main()
