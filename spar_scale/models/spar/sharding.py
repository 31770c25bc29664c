"""How SPAR is cut over tensor-parallel ranks: the head of the language model by words; its families cut the rest.

Whole on every rank stay routing, queries, projection and alignment head.
"""

from __future__ import annotations

from parallel.tensor import ModulePlan, Plan, Split
from spar_scale.models.spar.model import SPAR

PLAN: Plan = {SPAR: ModulePlan({"lm_head": Split("head")})}
