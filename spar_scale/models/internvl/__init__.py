"""InternVL: a vision tower with its projector, and the Qwen2 language model. What other code uses of them is here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm

from parallel.errors import UserError
from parallel.program import Layer
from parallel.tensor import Plan
from spar_scale.models.internvl import layers, model, sharding, vision, weights
from spar_scale.models.internvl.language import Rotary
from spar_scale.models.internvl.shapes import LanguageShape, VisionShape
from spar_scale.models.published import PretrainedPart
from spar_scale.models.roles import LanguageModel, VisionEncoder


class Vision(VisionShape):
    """InternVL's vision encoder (role `VisionEncoder`)."""

    @property
    def plan(self) -> Plan:
        """How it is cut over tensor-parallel ranks."""
        return sharding.VISION

    @property
    def tensor_sizes(self) -> dict[str, int]:
        """The sizes that a tensor-parallel size must divide."""
        return {"heads": self.heads, "mlp_width": self.mlp_width}

    def at(self, image_size: int) -> Vision:
        """Return the encoder for pictures of another size; its positions are then interpolated."""
        return replace(self, read_size=image_size)

    def build(self) -> nn.Module:
        """Return a module with parts `vision_tower` and `projector`, weights uninitialised."""
        return vision.VisionEncoder(self)

    def load(self, part: PretrainedPart) -> nn.Module:
        """Return the same with pretrained weights in the part's precision."""
        return weights.load_vision(part, self)

    def feature_layers(
        self, encoder: nn.Module, frozen: bool, reads: str = "images", writes: str = "features"
    ) -> list[Layer]:
        """Return the way from images to features of a module with the two parts."""
        tower, projector = (encoder.get_submodule(name) for name in ("vision_tower", "projector"))
        return layers.vision_layers(tower, projector, self.downsample_ratio, frozen, reads, writes)


class Language(LanguageShape):
    """InternVL's language model (role `LanguageModel`)."""

    @property
    def plan(self) -> Plan:
        """How it is cut over tensor-parallel ranks."""
        return sharding.LANGUAGE

    @property
    def tensor_sizes(self) -> dict[str, int]:
        """The sizes that a tensor-parallel size must divide."""
        names = ("key_value_heads", "heads", "mlp_width", "vocab_size")
        return {name: getattr(self, name) for name in names}

    def load(self, part: PretrainedPart, vision: Any) -> nn.Module:
        """Return InternVL with pretrained weights in the part's precision; `vision` is the preset's encoder."""
        return weights.load_mllm(part, vision, self)

    def parts(self, mllm: nn.Module) -> tuple[nn.Module, nn.Module]:
        """Return the language model without its head, and the head, of what `load` gave."""
        found = cast(Any, mllm)
        return found.model.language_model, found.lm_head

    def save(
        self, trunk: nn.Module, head: nn.Module, encoder: nn.Module, source: PretrainedPart, directory: Path
    ) -> None:
        """Write InternVL with a vision encoder in its published layout; other files are those of `source`."""
        weights.save_around(trunk, head, encoder, source, directory)

    def position_layer(self, trunk: nn.Module, num_queries: int) -> Layer:
        """Return the layer from `tokens`, `lengths`, `caption_order` to what its other layers read of positions."""
        return layers.QueryPositions(Rotary(cast(Any, trunk).config), num_queries)

    def prompt_layers(self, trunk: nn.Module, features: str | None, longest: int) -> list[Layer]:
        """Return the way from `tokens`, and a slot of features, to every `prefix_state_k`, without gradient."""
        return layers.prompt_layers(trunk, self.image_token_id, features, longest, frozen=True)

    def query_layers(self, trunk: nn.Module, sampled: Iterable[int], longest: int) -> list[Layer]:
        """Return the way of `queries` through the frozen model; `sampled` states become `query_state_k`."""
        return layers.query_layers(trunk, sampled, longest)

    def decoding_layers(self, trunk: nn.Module, head: nn.Module) -> list[Layer]:
        """Return the way of one further `token` at `position` to its `logits`."""
        return layers.decoding_layers(trunk, head, Rotary(cast(Any, trunk).config))

    def new_layers(self, trunk: nn.Module, number: int) -> tuple[list[nn.Module], nn.Module]:
        """Return `number` further decoder layers and a final norm like those of the model, uninitialised."""
        config = cast(Any, trunk).config
        norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        return [Qwen2DecoderLayer(config, index) for index in range(number)], norm

    def last_layers(self, trunk: nn.Module, number: int) -> tuple[list[nn.Module], nn.Module]:
        """Return the last decoder layers of the model and its final norm."""
        return list(trunk.get_submodule("layers").children())[-number:], trunk.get_submodule("norm")

    def bidirectional_layer(self, layer: nn.Module, longest: int) -> Layer:
        """Return a decoder layer as a layer on `captions` in which every token attends to all of its sample."""
        return layers.BidirectionalLayer(layer, longest)


def build_mllm(vision: VisionEncoder, language: LanguageModel) -> nn.Module:
    """Return the whole InternVL, weights at random from the global generator (call `initialise`)."""
    return model.build_mllm(*_own(vision, language))


def spread_words(mllm: nn.Module, language: LanguageModel) -> None:
    """Scale initial word embeddings to the shape's `word_range`."""
    assert isinstance(language, Language)
    model.spread_words(mllm, language)


def training_layers(mllm: nn.Module, vision: VisionEncoder, language: LanguageModel) -> tuple[list[Layer], list[Layer]]:
    """Return the way from `images` to `features`, and from `tokens` and `features` to `logits`; all of it trains."""
    seen, read = _own(vision, language)
    found = cast(Any, mllm)
    tower, projector, trunk = found.model.vision_tower, found.model.multi_modal_projector, found.model.language_model
    return layers.vision_layers(tower, projector, seen.downsample_ratio, frozen=False), [
        layers.PromptPositions(Rotary(trunk.config)),
        *layers.prompt_layers(trunk, read.image_token_id, "features", read.max_positions, frozen=False),
        layers.logits_layer(found.lm_head, read.layers),
    ]


def save_mllm(mllm: nn.Module, directory: Path) -> None:
    """Write the whole InternVL in its published layout, without its tokenizer's files."""
    weights.save_mllm(mllm, directory)


def _own(vision: VisionEncoder, language: LanguageModel) -> tuple[Vision, Language]:
    """Return the two members, where both are of this family. Raises UserError for others."""
    if not isinstance(vision, Vision) or not isinstance(language, Language):
        raise UserError("model.preset: this phase trains InternVL; its vision encoder or language model is another")
    return vision, language
