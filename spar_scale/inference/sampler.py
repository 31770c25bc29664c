"""Drawing latents: DPM-Solver++ on the flow's path, with classifier-free guidance.

The solver is the published one (SANA's scheduler config): second order, multistep, on sigmas that run
from 0.999 to 0 evenly and are then shifted, sigma -> s sigma / (1 + (s - 1) sigma). The model is asked at
timestep 1000 sigma as it was trained; the published pipelines round that down to an integer.
Guided velocity = bare + g (prompted - bare), both from one batch of twice the size; g = 1 asks for the
prompted one alone. Everything outside the model is fp32.

Legend: B pictures, N captions of all of them one after another, C their width, latents (B, Z, g, g).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor

from spar_scale.objectives.flow_matching import NUM_TIMESTEPS


class PredictsVelocity(Protocol):
    """A model of the flow."""

    def velocity(self, latents: Tensor, timestep: Tensor, captions: Tensor, bounds: Tensor) -> Tensor:
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
    bounds: Tensor,
    noise: Tensor,
    steps: int,
    guidance: float,
    flow_shift: float,
) -> Tensor:
    """Draw latents (B, Z, g, g), fp32, from noise of the same shape.

    captions (N, C) with bounds (B + 1,) are those of the prompts; unless guidance is 1, those of the bare instructions
    follow, and there are 2 B + 1 bounds. Raises ValueError unless 1 <= steps <= 1000.
    """
    if not 1 <= steps <= NUM_TIMESTEPS:
        raise ValueError(f"{steps} steps; 1 to {NUM_TIMESTEPS} can be taken")
    solver: Any = scheduler(flow_shift)
    solver.set_timesteps(steps)
    solver.set_begin_index(0)  # else it looks for its place among timesteps that, rounded, need not differ
    latents = noise.float()
    for sigma in solver.sigmas[:-1].to(noise.device):
        timestep = (NUM_TIMESTEPS * sigma).expand(len(bounds) - 1)
        given = latents if guidance == 1 else latents.repeat(2, 1, 1, 1)
        velocity = model.velocity(given, timestep, captions, bounds).float()
        if guidance != 1:
            prompted, bare = velocity.chunk(2)
            velocity = bare + guidance * (prompted - bare)
        latents = solver.step(velocity, sigma, latents).prev_sample
    return latents
