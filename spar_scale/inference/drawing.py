"""From prompts to pictures: conditioning, sampling, decoding.

The bare instruction, which guidance departs from, is the prompt without its words; of an edit it keeps
the picture. Prompts and their bare ones are conditioned in one pass, padded to the longest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spar_scale.data.prompts import PAD, TOKENS, Prompt, editing_prompt, generation_prompt
from spar_scale.inference.sampler import sample
from spar_scale.models.spar import SamplingShape
from spar_scale.stages.forward import Forward


def generate(model: Forward, captions: Sequence[str], noise: Tensor, sampling: SamplingShape) -> Tensor:
    """Draw one picture for each caption from noise (B, Z, g, g): images (B, 3, S, S) in [0, 1]."""
    return draw(model, [generation_prompt(caption) for caption in captions], generation_prompt(""), noise, sampling)


def edit(
    model: Forward, pictures: Tensor, instructions: Sequence[str], noise: Tensor, sampling: SamplingShape
) -> Tensor:
    """Edit pictures (B, 3, S, S) in [0, 1] by an instruction each: images of the same shape."""
    num_image_tokens = model.preset.image_tokens
    prompts = [editing_prompt(instruction, num_image_tokens) for instruction in instructions]
    return draw(model, prompts, editing_prompt("", num_image_tokens), noise, sampling, pictures)


@torch.no_grad()
def draw(
    model: Forward,
    prompts: Sequence[Prompt],
    bare: Prompt,
    noise: Tensor,
    sampling: SamplingShape,
    pictures: Tensor | None = None,
) -> Tensor:
    """Draw one picture for each prompt; `pictures` (B, 3, S, S) are those whose tokens the prompts hold."""
    tokens, keep = padded([*prompts, *[bare] * len(prompts)])
    references = None if pictures is None else pictures.repeat(2, 1, 1, 1)
    both, real = model.condition(tokens, keep, references)
    captions, bare_captions = both.chunk(2)
    keep, bare_keep = real.chunk(2)
    steps, guidance, flow_shift = sampling.steps, sampling.guidance, sampling.flow_shift
    latents = sample(model, captions, keep, bare_captions, bare_keep, noise, steps, guidance, flow_shift)
    return model.draw(latents)


def padded(prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """Tokens (B, P) int64, padded on the right, and `keep` (B, P) uint8, 1 where they are real."""
    length = max(len(prompt.tokens) for prompt in prompts)
    tokens = torch.full((len(prompts), length), TOKENS[PAD])
    keep = torch.zeros(tokens.shape, dtype=torch.uint8)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt.tokens)] = torch.tensor(prompt.tokens)
        keep[row, : len(prompt.tokens)] = 1
    return tokens, keep
