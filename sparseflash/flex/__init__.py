"""Drop-in FlexAttention: change one import to ``from sparseflash.flex import create_block_mask, flex_attention``.

The same names and arguments as ``torch.nn.attention.flex_attention``, over the tables of this library: a ``mask_mod``
is evaluated once, when the block mask is created, and never compiled into a kernel; the backward pass works on every
device; and a mask takes only the memory of its stored blocks. Torch compiles ``score_mod`` functions into its kernels;
here :func:`flex_attention` recognises the common ones and refuses the others, with an error that says what to do.

Source of the interface: Dong et al. (2024), "Flex Attention", https://arxiv.org/abs/2412.05496, and the PyTorch
documentation.
"""

from typing import TYPE_CHECKING, Any

from torch.nn.attention import flex_attention as _torchs
from torch.nn.attention.flex_attention import (
    AuxOutput,
    AuxRequest,
    FlexKernelOptions,
    and_masks,
    create_mask,
    noop_mask,
    or_masks,
)
from torch.nn.attention.flex_attention import (
    _mask_mod_signature as _mask_mod_signature,
)
from torch.nn.attention.flex_attention import (
    _score_mod_signature as _score_mod_signature,
)

from sparseflash.flex import as_pytree as as_pytree
from sparseflash.flex.block_mask import BlockMask
from sparseflash.flex.call import flex_attention
from sparseflash.flex.creating import _create_empty_block_mask as _create_empty_block_mask
from sparseflash.flex.creating import create_block_mask

__all__ = [
    "AuxOutput",
    "AuxRequest",
    "BlockMask",
    "FlexKernelOptions",
    "and_masks",
    "create_block_mask",
    "create_mask",
    "flex_attention",
    "noop_mask",
    "or_masks",
]

if not TYPE_CHECKING:  # otherwise a type checker would accept every misspelt name

    def __getattr__(name: str) -> Any:
        """Forward torch's private names, which some programs import; they differ between torch versions."""
        if name.startswith("_") and not name.startswith("__") and hasattr(_torchs, name):
            return getattr(_torchs, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
