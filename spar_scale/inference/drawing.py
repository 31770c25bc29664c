"""From prompts to pictures: conditioning, sampling, decoding.

The bare instruction, which guidance departs from, is the prompt without its words; of an edit it keeps
the picture. Prompts and their bare ones are conditioned in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from parallel.errors import UserError
from spar_scale.inference.sampler import sample
from spar_scale.models.presets import Preset
from spar_scale.models.spar import SamplingShape
from spar_scale.objectives.flow_matching import NUM_TIMESTEPS
from spar_scale.stages.forward import Forward


def sampling_of(preset: Preset, steps: int | None, guidance: float | None) -> SamplingShape:
    """Return the preset's way of sampling with the given values in place of its own. UserError for too many steps."""
    given = {"steps": steps, "guidance": guidance}
    sampling = replace(preset.sampling, **{name: value for name, value in given.items() if value is not None})
    if sampling.steps > NUM_TIMESTEPS:
        raise UserError(f"--steps: found {sampling.steps}; the flow has {NUM_TIMESTEPS}")
    return sampling


def generate(model: Forward, captions: Sequence[str], noise: Tensor, sampling: SamplingShape) -> Tensor:
    """Draw one picture for each caption from noise (B, Z, g, g): images (B, 3, S, S) in [0, 1]."""
    return draw(model, [model.text.generation_prompt(caption) for caption in ("", *captions)], noise, sampling)


def edit(
    model: Forward, pictures: Tensor, instructions: Sequence[str], noise: Tensor, sampling: SamplingShape
) -> Tensor:
    """Edit pictures (B, 3, S, S) in [0, 1] by an instruction each: images of the same shape."""
    num_image_tokens = model.preset.image_tokens
    prompts = [model.text.editing_prompt(instruction, num_image_tokens) for instruction in ("", *instructions)]
    return draw(model, prompts, noise, sampling, pictures)


@torch.no_grad()
def draw(
    model: Forward,
    prompts: Sequence[Sequence[int]],
    noise: Tensor,
    sampling: SamplingShape,
    pictures: Tensor | None = None,
) -> Tensor:
    """Draw one picture for each prompt behind the first, which is the bare one.

    `pictures` (B, 3, S, S) are those whose tokens the prompts hold.
    """
    bare, *given = prompts
    guided = sampling.guidance != 1
    if pictures is not None and guided:
        pictures = pictures.repeat(2, 1, 1, 1)
    captions, bounds = model.condition([*given, *([bare] * len(given) if guided else ())], pictures)
    steps, guidance, flow_shift = sampling.steps, sampling.guidance, sampling.flow_shift
    latents = sample(model, captions, bounds, noise.to(model.device), steps, guidance, flow_shift)
    return model.draw(latents)
