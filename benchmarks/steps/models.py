"""The models, random-initialised and each with one batch: what attends is switched, weights and batch stay."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseflash as sf
from benchmarks.path256 import left_out, sdpa
from benchmarks.steps.settings import Setting
from sparseflash.functional.attention import Mask
from sparseflash.integrations.transformers import register, use_pattern
from sparseflash.models import PixelTransformer, PixelTransformerConfig
from sparseflash.models.pixel_transformer import Layer
from sparseflash.train import Stage, load_preset
from sparseflash.train.data import draw

WITHOUT = "attention left out"
ATTENTIONS = ("eager", "sdpa", "ours dense", "ours sparse")
EAGER_TO = 20_000  # tokens; past that the scores of a layer alone take more memory than a GPU has


class Model(ABC):
    """A model and its batch on a device; under autocast to bf16 on a GPU.

    Attributes:
        module: what is trained.
        attentions: those that it can take.
    """

    module: nn.Module
    attentions: tuple[str, ...] = ATTENTIONS

    def __init__(self, setting: Setting, device: torch.device) -> None:
        self.setting, self.device = setting, device

    @abstractmethod
    def use(self, attention: str) -> None:
        """Switch to one of the attentions, or to `WITHOUT`."""

    @abstractmethod
    def outcome(self) -> Tensor:
        """The loss."""

    @abstractmethod
    def density(self, attention: str) -> float | None:
        """Stored blocks of our masks over all blocks; None for attention that is not ours."""

    def loss(self) -> Tensor:
        """The loss of the batch."""
        half = self.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if half else nullcontext():
            return self.outcome()


def build(setting: Setting, device: torch.device) -> Model:
    """The model of a setting; equal settings give equal weights and batches.

    Raises:
        ImportError: it needs Transformers, which is not here.
    """
    torch.manual_seed(0)
    return (Pixels if setting.family == "path256" else Sequences)(setting, device)


class Sequences(Model):
    """GPT-2, BERT and the two-layer encoder of the Long Range Arena, by Transformers."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        super().__init__(setting, device)
        register()
        import transformers

        transformers.AttentionInterface.register("left_out", _value)
        transformers.AttentionMaskInterface.register("left_out", lambda *_, **__: None)
        kind, config = _config(setting)
        self.module = getattr(transformers, kind).from_config(config).to(device).train()
        ids = torch.randint(setting.vocabulary, (setting.batch, setting.tokens)).to(device)
        labels = ids
        if setting.family == "bert":
            labels = ids.masked_fill(torch.rand(ids.shape).to(device) > 0.15, -100)  # the share that BERT is asked for
        elif setting.family == "lra":
            labels = ids[:, 0] % 2
        self._batch: dict[str, Any] = {"input_ids": ids, "labels": labels}
        if setting.family == "gpt2":
            self._batch["use_cache"] = False

    def use(self, attention: str) -> None:
        if attention.startswith("ours"):
            use_pattern(
                self.module, self.setting.pattern if attention == "ours sparse" else None, block=self.setting.block
            )
        else:
            name = "left_out" if attention == WITHOUT else attention
            self.module.set_attn_implementation(name)  # type: ignore[operator]

    def outcome(self) -> Tensor:
        loss: Tensor = self.module(**self._batch).loss
        return loss

    def density(self, attention: str) -> float | None:
        if not attention.startswith("ours"):
            return None
        pattern = sf.parse(self.setting.pattern if attention == "ours sparse" else "full()")
        if self.setting.family == "gpt2":
            pattern = pattern & sf.patterns.causal()
        return pattern.compile(self.setting.tokens, block=self.setting.block).density


class Pixels(Model):
    """The pixel transformer of the Path-256 preset, labels only."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        super().__init__(setting, device)
        config = load_preset("path256").config
        images = [stage for stage in config.stages if isinstance(stage, Stage)]
        assert isinstance(config.model, PixelTransformerConfig)
        model = replace(
            config.model, layers=setting.layers, width=setting.width, heads=setting.heads, pattern=setting.pattern
        )
        self.module = PixelTransformer(model).to(device).train()
        side = math.isqrt(setting.tokens)
        stage = next(stage for stage in images if stage.geometry.size == side)
        self._batch = draw(stage, 0, range(setting.batch)).to(device)
        self._masks = self.module.masks((side, side))
        self._in_use: list[Mask] = [*self._masks]
        if setting.tokens > EAGER_TO:
            self.attentions = ATTENTIONS[1:]

    def use(self, attention: str) -> None:
        attend = {"eager": _eager, "sdpa": sdpa, WITHOUT: left_out}.get(attention, sf.attention)
        self._in_use = [*self._masks] if attention == "ours sparse" else [None] * self.setting.layers
        for layer in self.module.modules():
            if isinstance(layer, Layer):
                layer.attend = attend

    def outcome(self) -> Tensor:
        return F.cross_entropy(self.module(self._batch.inputs, masks=self._in_use).logits, self._batch.labels)

    def density(self, attention: str) -> float | None:
        return {"ours dense": 1.0, "ours sparse": self._masks[0].density}.get(attention)


def _config(setting: Setting) -> tuple[str, Any]:
    import transformers

    if setting.family == "gpt2":
        return "AutoModelForCausalLM", transformers.GPT2Config(
            vocab_size=setting.vocabulary, n_positions=setting.tokens, n_embd=setting.width, n_layer=setting.layers,
            n_head=setting.heads, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
    # The encoder of the Arena's rows has an MLP of twice its width, BERT one of four times.
    wider = 2 if setting.family == "lra" else 4
    config = transformers.BertConfig(
        vocab_size=setting.vocabulary, hidden_size=setting.width, num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads, intermediate_size=wider * setting.width,
        max_position_embeddings=setting.tokens, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return f"AutoModelFor{'SequenceClassification' if setting.family == 'lra' else 'MaskedLM'}", config


def _value(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """What Transformers calls in place of attention: each token gets its own value."""
    return value.transpose(1, 2).contiguous(), None


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    weights: Tensor = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return weights @ v
