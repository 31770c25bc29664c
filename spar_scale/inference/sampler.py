"""Drawing latents: DPM-Solver++ on the flow's path, with classifier-free guidance.

The solver is the published one (SANA's scheduler config): second order, multistep, on sigmas that run
from 0.999 to 0 evenly and are then shifted, sigma -> s sigma / (1 + (s - 1) sigma). The model is asked at
timestep 1000 sigma as it was trained; the published pipelines round that down to an integer.
Guided velocity = bare + g (prompted - bare), both from one batch of twice the size; g = 1 asks for the
prompted one alone. Everything outside the model is fp32.

Legend: B pictures, M captions, C their width, latents (B, Z, g, g).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor

from spar_scale.objectives.flow_matching import NUM_TIMESTEPS


class PredictsVelocity(Protocol):
    """A model of the flow."""

    def velocity(self, latents: Tensor, timestep: Tensor, captions: Tensor, keep: Tensor) -> Tensor:
        """Predict the velocity eps - z (B, Z, g, g) at timestep (B,) = 1000 sigma."""
        ...


def seeded_noise(shape: tuple[int, ...], seeds: Sequence[int]) -> Tensor:
    """Return standard normal noise (B, *shape), fp32, each from a generator of its own seed.

    Drawn on the CPU, so a picture depends on the run, the prompt and its seed, not on what is drawn beside it.
    """
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def scheduler(flow_shift: float) -> DPMSolverMultistepScheduler:
    """Return the solver, for steps that are to be set."""
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)


@torch.no_grad()
def sample(
    model: PredictsVelocity,
    captions: Tensor,
    keep: Tensor,
    bare_captions: Tensor,
    bare_keep: Tensor,
    noise: Tensor,
    steps: int,
    guidance: float,
    flow_shift: float,
) -> Tensor:
    """Draw latents (B, Z, g, g), fp32, from noise of the same shape.

    captions (B, M, C), real where `keep` (B, M) is nonzero; those of the bare instruction may have
    another M. Raises ValueError unless 1 <= steps <= 1000.
    """
    if not 1 <= steps <= NUM_TIMESTEPS:
        raise ValueError(f"{steps} steps; 1 to {NUM_TIMESTEPS} can be taken")
    solver: Any = scheduler(flow_shift)
    solver.set_timesteps(steps)
    solver.set_begin_index(0)  # else it looks for its place among timesteps that, rounded, need not differ
    if guidance != 1:
        captions, keep = _both(captions, bare_captions), _both(keep, bare_keep)
    latents = noise.float()
    for sigma in solver.sigmas[:-1].to(noise.device):
        timestep = (NUM_TIMESTEPS * sigma).expand(len(captions))
        given = latents.repeat(len(captions) // len(latents), 1, 1, 1)
        velocity = model.velocity(given, timestep, captions, keep).float()
        if guidance != 1:
            prompted, bare = velocity.chunk(2)
            velocity = bare + guidance * (prompted - bare)
        latents = solver.step(velocity, sigma, latents).prev_sample
    return latents


def _both(one: Tensor, other: Tensor) -> Tensor:
    """Stack (B, M, ...) on (B, M', ...), the shorter padded with zeros on the right."""
    length = max(one.shape[1], other.shape[1])
    widths = [(0, 0) * (tensor.ndim - 2) + (0, length - tensor.shape[1]) for tensor in (one, other)]
    return torch.cat([F.pad(tensor, width) for tensor, width in zip((one, other), widths, strict=True)])
