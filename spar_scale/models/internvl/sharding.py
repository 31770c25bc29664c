"""How InternVL is cut over tensor-parallel ranks: attention by heads, a feed-forward by its hidden width, words."""

from __future__ import annotations

from transformers import InternVLForConditionalGeneration, Qwen2Model
from transformers.models.internvl.modeling_internvl import InternVLVisionAttention, InternVLVisionMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP

from parallel.tensor import COLUMN, ROW, ModulePlan, Plan, Split

LANGUAGE: Plan = {
    Qwen2Model: ModulePlan({"embed_tokens": Split("vocabulary")}),
    InternVLForConditionalGeneration: ModulePlan({"lm_head": Split("head")}),
    Qwen2Attention: ModulePlan({"q_proj": COLUMN, "k_proj": COLUMN, "v_proj": COLUMN, "o_proj": ROW}),
    Qwen2MLP: ModulePlan({"gate_proj": COLUMN, "up_proj": COLUMN, "down_proj": ROW}),
}
VISION: Plan = {
    InternVLVisionAttention: ModulePlan(
        {"q_proj": COLUMN, "k_proj": COLUMN, "v_proj": COLUMN, "projection_layer": ROW}, ("num_heads", "embed_dim")
    ),
    InternVLVisionMLP: ModulePlan({"fc1": COLUMN, "fc2": ROW}),
}
