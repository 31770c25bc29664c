"""The bidirectional connector between the language model and the diffusion transformer.

Legend: B batch, N tokens (prefix and queries), D width of the language model, C caption channels.
Decoder layers of the language model's own class, as published started from its last layers and final norm,
but without the causal order: every token reads every real token. Position ids are those of the language
model (a count of the real tokens). The conditional projection then leads to the caption channels of the
diffusion transformer. The mask is boolean rather than an additive -1e5: the same softmax in fp32, and
every backend of `ops/attention.py` reads it.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm

from spar_scale.models.conditioning import Rotary, positions
from spar_scale.ops.transformers_attention import IMPLEMENTATION


class Connector(nn.Module):
    """`num_layers` bidirectional decoder layers, final norm, projection to `caption_channels`.

    `config` is the language model's. Weights are uninitialised; `copy_last_layers` is the published start.
    Raises ValueError for more layers than the language model has.
    """

    def __init__(self, config: Qwen2Config, num_layers: int, caption_channels: int):
        super().__init__()
        if not 1 <= num_layers <= config.num_hidden_layers:
            raise ValueError(f"a connector of {num_layers} layers from a model of {config.num_hidden_layers}")
        config = copy.deepcopy(config)
        config._attn_implementation = IMPLEMENTATION
        self.initializer_range = config.initializer_range
        self.rotary = Rotary(config)
        self.layers = nn.ModuleList(Qwen2DecoderLayer(config, index) for index in range(num_layers))
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.projection = nn.Linear(config.hidden_size, caption_channels)

    def copy_last_layers(self, model: Qwen2Model) -> None:
        """Start from the last layers and the final norm of a language model with the same config."""
        for mine, its in zip(self.layers, model.layers[-len(self.layers) :], strict=True):
            mine.load_state_dict(its.state_dict(), strict=True)
        self.norm.load_state_dict(model.norm.state_dict(), strict=True)

    def forward(self, tokens: Tensor, keep: Tensor) -> Tensor:
        """Map tokens (B, N, D), real where `keep` (B, N) is nonzero, to captions (B, N, C)."""
        for layer in self.layers:
            tokens = connector_layer(layer, self.rotary, tokens, keep)
        return self.projection(self.norm(tokens))

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.projection:
            self.projection.reset_parameters()
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Qwen2RMSNorm):
            nn.init.ones_(module.weight)


def connector_layer(layer: nn.Module, rotary: Rotary, tokens: Tensor, keep: Tensor) -> Tensor:
    """One layer: tokens (B, N, D) attend to all tokens where `keep` (B, N) is nonzero. At least one must be."""
    mask = keep.bool()[:, None, None, :].expand(-1, 1, keep.shape[1], -1)
    return layer(tokens, attention_mask=mask, position_embeddings=rotary(tokens, positions(keep)))
