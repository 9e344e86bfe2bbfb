"""The pages of the reference: which public names stand on which page."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import NamedTuple

# Public classes on whose pages the members of a base stand that has no page of its own.
BASES = {"sparseflash.BlockMask": "sparseflash.patterns.mask_data.MaskData"}


class ApiPage(NamedTuple):
    """A page of the reference."""

    title: str
    about: str
    names: tuple[str, ...]  # full names; a module stands for all of its public names


def public(module: str, *left_out: str) -> tuple[str, ...]:
    """Full names of all public names of a module but some."""
    return tuple(f"{module}.{name}" for name in import_module(module).__all__ if name not in left_out)


def pages() -> dict[str, ApiPage]:
    """Pages by their place on the site, in the order of the menu."""
    ours = "sparseflash.patterns"
    constructors = public(ours, "BlockMask", "Pattern", "Grid", "SlowScan", "WastefulPattern", "parse")
    return {
        "api/attention.md": ApiPage(
            "Attention",
            "Attention over a mask, and the dense reference that tests compare it with.",
            ("sparseflash.attention", "sparseflash.reference.attention", "sparseflash.reference.dropout_mask"),
        ),
        "api/patterns.md": ApiPage(
            "Patterns",
            "Which query may see which key, whatever the length. Pictures of all of them: [gallery](../gallery.md).",
            (
                *(f"{ours}.Pattern", "sparseflash.parse", *constructors),
                *(f"{ours}.Grid", f"{ours}.SlowScan", f"{ours}.WastefulPattern"),
                *("sparseflash.ordering.token_order", "sparseflash.ordering.ORDERS"),
            ),
        ),
        "api/block-mask.md": ApiPage(
            "Block masks",
            "A pattern compiled for given lengths and blocks; see [how the tables work](../how-tables-work.md).",
            ("sparseflash.BlockMask",),
        ),
        "api/lookup.md": ApiPage(
            "Lookup tables",
            "What kernels read. `attention` makes and keeps them by itself.",
            ("sparseflash.lookup", "sparseflash.LookupTable"),
        ),
        "api/decoding.md": ApiPage(
            "Decoding", "The newest tokens against a cache.", ("sparseflash.decode", "sparseflash.KVCache")
        ),
        "api/modules.md": ApiPage(
            "Modules",
            "Layers of a model, and rotary positions.",
            (
                *("sparseflash.SparseAttention", "sparseflash.SparseTransformerBlock"),
                *(f"sparseflash.rotary.{name}" for name in ("Rotary1d", "Rotary2d", "Rotary3d", "PackedRotary")),
                *(f"sparseflash.rotary.{name}" for name in ("rotary_table", "rotary_table_2d", "rotate")),
            ),
        ),
        "api/routing.md": ApiPage(
            "Routing",
            "Key blocks chosen by content, on the device: [routing](../routing.md).",
            tuple(f"sparseflash.routing.{name}" for name in ("topk_table", "topk_blocks", "Selection")),
        ),
        "api/distributed.md": ApiPage(
            "Context parallel",
            "One sequence on many ranks: [several GPUs](../several-gpus.md).",
            (
                *public("sparseflash.distributed"),
                *(f"sparseflash.distributed.checkpoint.{name}" for name in ("save_checkpoint", "load_checkpoint")),
                *(f"sparseflash.distributed.comm_volume.{name}" for name in ("Operands", "received", "ring_forward")),
            ),
        ),
        "api/transformers.md": ApiPage(
            "Hugging Face",
            'Models of Hugging Face with `attn_implementation="block_sparse"`: [Transformers](../transformers.md).',
            (
                *(f"sparseflash.integrations.transformers.{n}" for n in ("from_pretrained", "use_pattern", "register")),
                "sparseflash.integrations.transformers.overview.describe",
                *(f"sparseflash.integrations.transformers.finetune.{n}" for n in ("compare", "perplexity", "train")),
            ),
        ),
        "api/diffusers.md": ApiPage(
            "Hugging Face Diffusers",
            "Diffusion transformers over a pattern: [Diffusers](../diffusers.md).",
            public("sparseflash.integrations.diffusers"),
        ),
        "api/flex.md": ApiPage(
            "FlexAttention",
            "Its programs and its masks: [from FlexAttention](../from-flexattention.md).",
            (
                *(f"sparseflash.flex.{name}" for name in ("flex_attention", "create_block_mask", "BlockMask")),
                *("sparseflash.integrations.flex.from_flex", "sparseflash.integrations.flex.to_flex"),
            ),
        ),
        "api/pathfinder.md": ApiPage(
            "Pathfinder", "The task, its generator and its files.", public("sparseflash.pathfinder")
        ),
        "api/models.md": ApiPage("Models", "The pixel transformer.", public("sparseflash.models")),
        "api/train.md": ApiPage(
            "Training",
            "What `sparseflash train` does: [Pathfinder, Path-X and Path-256](../path256.md).",
            public("sparseflash.train"),
        ),
    }  # fmt: skip


@cache
def names() -> set[str]:
    """Every name that the reference describes."""
    return {name for page in pages().values() for name in page.names}


def definition(name: str) -> str:
    """Where a public name is defined, as modules that pass it on call it too.

    Example:
        >>> definition("sparseflash.attention")
        'sparseflash.functional.attention.attention'
    """
    module, _, attribute = name.rpartition(".")
    value = getattr(import_module(module), attribute)
    return f"{getattr(value, '__module__', module)}.{getattr(value, '__name__', attribute)}"


@cache
def described() -> set[str]:
    """Names of the reference, and where they are defined: docstrings refer to either."""
    return names() | {definition(name) for name in names()} | set(BASES.values())


def markdown(page: ApiPage) -> str:
    """The page as mkdocstrings reads it."""
    return "\n\n".join([f"# {page.title}", page.about, *map(directive, page.names)]) + "\n"


def directive(name: str) -> str:
    """What mkdocstrings puts the reference of a name in the place of."""
    if name not in BASES:
        return f"::: {name}"
    module, _, base = BASES[name].rpartition(".")
    inherited = vars(getattr(import_module(module), base))
    members = sorted({member for member in {*inherited, *inherited["__annotations__"]} if not member.startswith("_")})
    return f"::: {name}\n    options:\n      inherited_members: [{', '.join(members)}]"
