"""Initial weights of a run from a saved model, which may have fewer layers."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sparseflash.models import Model, PixelTransformerConfig
from sparseflash.models.files import CONFIG, WEIGHTS, read_tensors
from sparseflash.models.key_gate import opened, unset
from sparseflash.patterns.shown import shown_lines
from sparseflash.utils.untrusted import read_text


def load_initial_weights(model: Model, folder: Path) -> None:
    """Load the weights of a saved model of the same shape, with any pattern and any tokens.

    If this model has key gates and the saved one has none, they are set so that the results do not change. A model of
    lit pixels then ignores dark ones, see `sparseflash.models.key_gate.opened`; one of all pixels has gates of 0.

    If the saved model has fewer layers, copies fill this one, see `grown`. A tied model stores one layer, so tied
    models of any depth can load each other's weights.

    Raises:
        FileNotFoundError: no weights in the folder.
        ValueError: weights of another shape or of more layers, or a key gate that cannot be added or removed.
    """
    weights, layers = _gated(model, read_tensors(folder / WEIGHTS), folder), len(model.layers)
    try:
        model.load_state_dict(grown(weights, layers))
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {folder} are of a model of another shape (layers stored: {_stored(weights)} there, "
            f"{layers} here). A model may have more layers than the weights it begins with; the rest of its shape must "
            f"be theirs: {shown_lines(error)}"
        ) from None


def _gated(model: Model, weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The weights, with key gates if the model has them."""
    wanted = model.config.key_gate
    if any(".key_gate." in name for name in weights):
        if not wanted:
            raise ValueError(f"the weights in {folder} have a key gate and the model has none; add --key-gate")
        return weights
    if not wanted:
        return weights
    text = read_text(folder / CONFIG)
    try:
        config = PixelTransformerConfig.from_json(text)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is not a config of a model over pixels: {shown_lines(error)}") from None
    if config.tokens == "all":
        return {**unset(config), **weights}
    return opened(config, weights)[1]


def grown(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Weights of a model of this many layers, from those of a shallower one; others are returned unchanged.

    Progressive stacking, as in Gong et al. 2019, "Efficient Training of BERT by Progressively Stacking", with copies
    next to each other: see `source`.
    """
    stored = _stored(weights)
    if not 0 < stored < layers:
        return dict(weights)
    found = {name: tensor for name, tensor in weights.items() if _layer(name) is None}
    for layer in range(layers):
        old = f"layers.{source(layer, stored, layers)}."
        found |= {
            f"layers.{layer}.{name.removeprefix(old)}": tensor
            for name, tensor in weights.items()
            if name.startswith(old)
        }
    return found


def source(layer: int, stored: int, layers: int) -> int:
    """The stored layer that becomes this one of ``layers``; the first and the last stay at the ends.

    Example:
        >>> [source(layer, 6, 10) for layer in range(10)]
        [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    """
    # layer * (stored - 1) / (layers - 1) to the nearest integer, half up.
    return (2 * layer * (stored - 1) + layers - 1) // (2 * (layers - 1))


def _stored(weights: Mapping[str, Tensor]) -> int:
    return len({_layer(name) for name in weights} - {None})


def _layer(name: str) -> str | None:
    """The number in ``layers.<number>.<rest>``; None for other names."""
    parts = name.split(".", 2)
    return parts[1] if parts[0] == "layers" and len(parts) == 3 else None
