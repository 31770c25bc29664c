"""How SANA is cut over tensor-parallel ranks: attention by heads, a feed-forward by its hidden width."""

from __future__ import annotations

from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.sana_transformer import GLUMBConv

from parallel.tensor import COLUMN, ROW, ModulePlan, Plan, Split

PLAN: Plan = {
    Attention: ModulePlan({"to_q": COLUMN, "to_k": COLUMN, "to_v": COLUMN, "to_out.0": ROW}, ("heads",)),
    GLUMBConv: ModulePlan({"conv_inverted": Split("column", 2), "conv_depth": Split("column", 2), "conv_point": ROW}),
}
"""The first two convolutions of the feed-forward make a half and its gate, cut side by side."""
