"""Flow matching on latents (SPAR, section on training): the path, its velocity, one fp32 value per sample.

x_sigma = (1 - sigma) z + sigma eps, and the model predicts the velocity eps - z. sigma is logit-normal
with mean 0 and deviation 1, rounded to a table of 1000 steps; the published training has no shift of it. A
shift s > 1 moves it towards noise, sigma -> s sigma / (1 + (s - 1) sigma), as the sampler's does. Small latents
need one: what they have most of (the ground, where things stand) shows through the noise up to sigma = 0.8 and
more, where the unshifted training hardly goes, and a model that can read it there does not ask its condition.
All randomness comes in as draws that the batch carries, so a sample's loss does not depend on the batch it
stands in.
"""

from __future__ import annotations

from torch import Tensor

from spar_scale.objectives.reconstruction import mean_squared_error

NUM_TIMESTEPS = 1000


def timesteps(normal: Tensor, shift: float = 1.0) -> Tensor:
    """Standard normal draws (B,) to timesteps (B,) in [1, 1000], fp32; sigma is timestep / 1000.

    u = sigmoid(draw) is the place floor(1000 u) in the table 1000, 999, ..., 1, which is then shifted.
    """
    place = (NUM_TIMESTEPS * normal.float().sigmoid()).floor().clamp_max(NUM_TIMESTEPS - 1)
    timestep = NUM_TIMESTEPS - place
    return shift * timestep / (1 + (shift - 1) * timestep / NUM_TIMESTEPS)


def noisy_latents(latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Return x_sigma = (1 - sigma) z + sigma eps, fp32; z and eps (B, ...), timestep (B,)."""
    sigma = (timestep.float() / NUM_TIMESTEPS).view(-1, *[1] * (latents.ndim - 1))
    return (1 - sigma) * latents.float() + sigma * noise.float()


def velocity_error(prediction: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """Return the mean squared error of a predicted velocity against eps - z, (B, ...) to (B,) in fp32."""
    return mean_squared_error(prediction, noise.float() - latents.float())


def drops_caption(uniform: Tensor, rate: float) -> Tensor:
    """Uniform draws in [0, 1) of shape (B,) to booleans: True where the caption gives way to the bare instruction."""
    return uniform < rate
