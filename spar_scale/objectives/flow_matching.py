"""Flow matching on latents (SPAR, section on training): the path, its velocity, one fp32 value per sample.

x_sigma = (1 - sigma) z + sigma eps, and the model predicts the velocity eps - z. sigma is logit-normal with mean 0 and
standard deviation 1, rounded to a table of 1000 steps; the published training does not shift it. A shift s > 1 moves it
towards noise, sigma -> s sigma / (1 + (s - 1) sigma), like the sampler's shift. Small latents need a shift: their main
content (background, positions) is visible through the noise up to sigma = 0.8 and more, where training without a shift
has few samples, and a model that can see the content does not learn to use its condition. All random draws are passed
in with the batch, so the loss of a sample does not depend on the other samples.
"""

from __future__ import annotations

from torch import Tensor

from spar_scale.objectives.reconstruction import mean_squared_error

NUM_TIMESTEPS = 1000


def timesteps(normal: Tensor, shift: float = 1.0) -> Tensor:
    """Map standard normal draws (B,) to timesteps (B,) in [1, 1000], fp32; sigma is timestep / 1000.

    With u = sigmoid(draw), the timestep is entry floor(1000 u) of the table 1000, 999, ..., 1, which is then shifted.
    """
    entry = (NUM_TIMESTEPS * normal.float().sigmoid()).floor().clamp_max(NUM_TIMESTEPS - 1)
    timestep = NUM_TIMESTEPS - entry
    return shift * timestep / (1 + (shift - 1) * timestep / NUM_TIMESTEPS)


def noisy_latents(latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Return x_sigma = (1 - sigma) z + sigma eps, fp32; z and eps (B, ...), timestep (B,)."""
    sigma = (timestep.float() / NUM_TIMESTEPS).view(-1, *[1] * (latents.ndim - 1))
    return (1 - sigma) * latents.float() + sigma * noise.float()


def velocity_error(prediction: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """Return the mean squared error of a predicted velocity against eps - z, (B, ...) to (B,) in fp32."""
    return mean_squared_error(prediction, noise.float() - latents.float())


def drops_caption(uniform: Tensor, rate: float) -> Tensor:
    """Map uniform draws in [0, 1), (B,), to booleans: True if the sample gets the unconditional prompt."""
    return uniform < rate
