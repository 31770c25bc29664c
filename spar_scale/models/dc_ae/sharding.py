"""How a pixel autoencoder is cut over tensor-parallel ranks: by nothing of its own; every rank holds it whole.

Gated convolutions in its deep blocks are SANA's class, and cut by SANA's plan where that is used.
"""

from __future__ import annotations

from parallel.tensor import Plan

PLAN: Plan = {}
