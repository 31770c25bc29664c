"""How the tokenizer is cut over tensor-parallel ranks: its parts are shared blocks, cut by the plan of those.

Whole on every rank stay the fusion and the latent heads.
"""

from __future__ import annotations

from parallel.tensor import Plan

PLAN: Plan = {}
