"""The terms of the losses, and what the objectives change on the way, as layers.

Slots: images, target_image, reconstruction (B, 3, S, S); tokenizer_latent, decoder_input (B, C, g, g), not scaled;
latent (B, C, g, g) = tokenizer_latent times its scale; latent_noise eps (B, C, g, g), timestep_draw (B,): standard
normal; noisy_latent (B, C, g, g); timestep (B,) = 1000 sigma; velocity (B, C, g, g). A term is a slot (B,), fp32.
"""

from __future__ import annotations

import functools

from torch import Tensor

from parallel.program import Apply, Layer
from spar_scale.objectives.flow_matching import noisy_latents, timesteps, velocity_error
from spar_scale.objectives.reconstruction import gradient_difference, latent_power, mean_squared_error


def select_target() -> Layer:
    """Return the layer from the pictures of a sample to the first, `target_image`."""
    return Apply(_first, ("images",), "target_image", frozen=True)


def scale_latent(scale: float) -> Layer:
    """Return the layer from `tokenizer_latent` to `latent`, whose deviation is about 1."""
    return Apply(functools.partial(_times, scale), ("tokenizer_latent",), "latent")


def decode_latent(noise: float) -> Layer:
    """Return the layer from `tokenizer_latent` to `decoder_input`, in training with noise of this deviation.

    The noise is a slot, `latent_noise`, that the sample carries.
    """
    reads = ("tokenizer_latent", "latent_noise") if noise > 0 else ("tokenizer_latent",)
    return Apply(functools.partial(_perturbed, noise), reads, "decoder_input")


def reconstruction_terms(gradients: bool = True) -> Layer:
    """Return the layer with the term `mean_squared_error`, with `gradients` also `gradient_difference`."""
    reads = ("reconstruction", "images")
    if gradients:
        return Apply(_reconstruction, reads, ("mean_squared_error", "gradient_difference"))
    return Apply(mean_squared_error, reads, "mean_squared_error")


def latent_power_term() -> Layer:
    """Return the layer with the term `latent_power`."""
    return Apply(latent_power, ("tokenizer_latent",), "latent_power")


def mix_noise(shift: float) -> Layer:
    """Return the layer from `latent` to `noisy_latent` and `timestep`; `shift` moves the times towards noise."""
    reads = ("latent", "latent_noise", "timestep_draw")
    return Apply(functools.partial(_noisy, shift), reads, ("noisy_latent", "timestep"))


def flow_matching_term() -> Layer:
    """Return the layer with the term `flow_matching`: the velocity's mean squared error."""
    return Apply(velocity_error, ("velocity", "latent", "latent_noise"), "flow_matching")


def _first(images: Tensor) -> Tensor:
    return images[:, 0]


def _times(scale: float, latent: Tensor) -> Tensor:
    return latent * scale


def _perturbed(level: float, latent: Tensor, noise: Tensor | None = None) -> Tensor:
    return latent if noise is None else latent + level * noise.to(latent.dtype)


def _reconstruction(reconstruction: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    return mean_squared_error(reconstruction, images), gradient_difference(reconstruction, images)


def _noisy(shift: float, latent: Tensor, noise: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
    timestep = timesteps(draw, shift)
    return noisy_latents(latent, noise, timestep), timestep
