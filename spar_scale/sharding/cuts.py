"""How the parts of SPAR are cut by tensor parallelism, and which sizes a preset can be cut into.

Attention is cut by heads, a feed-forward by its hidden width, embeddings and the language head by words. Whole on
every rank stay norms, modulations, patch and time embeddings, routing, queries, fusion, latent and alignment heads, and
what of a pixel autoencoder is no gated convolution.
"""

from __future__ import annotations

import operator
from math import gcd

from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.sana_transformer import GLUMBConv
from transformers import InternVLForConditionalGeneration, Qwen2Model
from transformers.models.internvl.modeling_internvl import InternVLVisionAttention, InternVLVisionMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP

from parallel.errors import UserError
from parallel.tensor import ModulePlan, Plan, Split
from parallel.topology import NEAREST
from spar_scale.models.layers import ResBlock, SelfAttention, TransformerLayer
from spar_scale.models.presets import Preset
from spar_scale.models.unified import SPAR

COLUMN, ROW = Split("column"), Split("row")
HEAD = ModulePlan({"lm_head": Split("head")})
PLAN: Plan = {
    Qwen2Model: ModulePlan({"embed_tokens": Split("vocabulary")}),
    InternVLForConditionalGeneration: HEAD,
    SPAR: HEAD,
    Qwen2Attention: ModulePlan({"q_proj": COLUMN, "k_proj": COLUMN, "v_proj": COLUMN, "o_proj": ROW}),
    Qwen2MLP: ModulePlan({"gate_proj": COLUMN, "up_proj": COLUMN, "down_proj": ROW}),
    InternVLVisionAttention: ModulePlan(
        {"q_proj": COLUMN, "k_proj": COLUMN, "v_proj": COLUMN, "projection_layer": ROW}, ("num_heads", "embed_dim")
    ),
    InternVLVisionMLP: ModulePlan({"fc1": COLUMN, "fc2": ROW}),
    SelfAttention: ModulePlan({"query": COLUMN, "key": COLUMN, "value": COLUMN, "output": ROW}),
    TransformerLayer: ModulePlan({"linear_1": COLUMN, "linear_2": ROW}),
    ResBlock: ModulePlan({"linear_1": COLUMN, "linear_2": ROW}),
    Attention: ModulePlan({"to_q": COLUMN, "to_k": COLUMN, "to_v": COLUMN, "to_out.0": ROW}, ("heads",)),
    GLUMBConv: ModulePlan({"conv_inverted": Split("column", 2), "conv_depth": Split("column", 2), "conv_point": ROW}),
}
"""Class -> its cuts. The first two convolutions of SANA's feed-forward make a half and its gate, cut side by side."""

_COUNTED = (
    "language.key_value_heads",
    "language.heads",
    "language.mlp_width",
    "language.vocab_size",
    "vision.heads",
    "vision.mlp_width",
    "streams.width",
    "streams.pixel_heads",
    "diffusion.heads",
    "diffusion.cross_heads",
    "diffusion.hidden",
)


def check_tensor(preset: Preset, tensor: int) -> None:
    """Raise UserError, naming a size of the preset and the cuts that fit all of them, where `tensor` does not."""
    sizes = {key: operator.attrgetter(key)(preset) for key in _COUNTED}
    refused = [key for key, size in sizes.items() if size % tensor]
    if refused:
        common = gcd(*sizes.values())
        fits = [number for number in range(1, common + 1) if common % number == 0]
        fits.sort(key=lambda number: max(number, tensor) / min(number, tensor))
        raise UserError(
            f"parallel.tensor: found {tensor}; preset '{preset.name}' has {refused[0]} {sizes[refused[0]]}, which it"
            f" must divide; nearest that fit: {' or '.join(f'parallel.tensor={number}' for number in fits[:NEAREST])}"
        )
