"""SPAR in one piece: language model, routing, connector, diffusion transformer, around an image tokenizer.

Composition only; the parts are defined elsewhere. Training runs the same modules as a list of layers
(stages/align.py); drawing pictures runs the methods here, and a test holds the two together.

Legend: B batch, P prompt tokens, Q queries, D width, C caption channels, latents (B, Z, g, g) divided
by their measured deviation: multiplied by `latent_scale` on the way in, divided on the way out.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration, Qwen2Model

from spar_scale.models.autoencoder import decode_latents, encode_images, resize
from spar_scale.models.conditioning import QueryEmbeddings, extend_padding_mask, sampled_hidden_states
from spar_scale.models.connector import Connector
from spar_scale.models.diffusion import AlignmentHead, Diffusion
from spar_scale.models.layers import Composition
from spar_scale.models.mllm import merge
from spar_scale.models.presets import Preset
from spar_scale.models.routing import Kind, TokenRouting
from spar_scale.models.tokenizer import UnifiedTokenizer


class PixelTokenizer(nn.Module):
    """A pixel autoencoder in the tokenizer's place: the latent space that a published diffusion model knows.

    It encodes images at the size whose latent has the tokens' grid (512 for images of 448 pixels).
    """

    def __init__(self, autoencoder: nn.Module, preset: Preset):
        super().__init__()
        self.encoder, self.decoder = cast(nn.Module, autoencoder.encoder), cast(nn.Module, autoencoder.decoder)
        self.image_size, self.encoded_size = preset.image_size, preset.vision.grid * preset.autoencoder.compression

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] to latents (B, Z, g, g)."""
        return encode_images(self.encoder, images, self.encoded_size)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, Z, g, g) to images (B, 3, S, S), fp32, about [0, 1] and not clamped."""
        return resize(decode_latents(self.decoder, latents), self.image_size)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] through the latent and back, clamped to [0, 1]."""
        return self.decode(self.encode(images)).clamp(0, 1)


class LatentDiffusion(Composition):
    """A diffusion transformer in the latent space of a tokenizer; a subclass says what conditions it."""

    tokenizer: UnifiedTokenizer | PixelTokenizer
    diffusion: Diffusion
    latent_scale: float
    latent_shape: tuple[int, int, int]

    def condition(self, tokens: Tensor, keep: Tensor, references: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return captions (B, M, C) of prompts (B, P), and which of them are real (B, M), for `velocity`."""
        raise NotImplementedError

    def velocity(self, latents: Tensor, timestep: Tensor, captions: Tensor, keep: Tensor) -> Tensor:
        """Predict the velocity (B, Z, g, g) of scaled noisy latents at timestep (B,) = 1000 sigma."""
        return self.diffusion(latents, timestep, captions, keep)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, Z, g, g) to images (B, 3, S, S), fp32, clamped to [0, 1]."""
        return self.tokenizer.decode(latents / self.latent_scale).clamp(0, 1)


class SPAR(LatentDiffusion):
    """The unified model of a preset; parameter names are the checkpoint's.

    The language model and its head are taken from `mllm`, whose vision tower is left behind: the
    tokenizer's serves instead, for the picture to edit and for questions. `alignment_head` exists
    where the diffusion transformer is aligned. What is not taken from `mllm` or `tokenizer` is
    uninitialised.
    """

    alignment_head: AlignmentHead
    teacher: nn.Module

    def __init__(
        self,
        preset: Preset,
        mllm: InternVLForConditionalGeneration,
        tokenizer: UnifiedTokenizer | PixelTokenizer,
        latent_scale: float,
        routing: Kind = "dynamic",
        aligned: bool = False,
    ):
        super().__init__()
        width, shape = preset.streams.width, preset.conditioning
        self.tokenizer, self.latent_scale = tokenizer, latent_scale
        self.image_token_id, self.latent_shape = preset.language.image_token_id, preset.latent_shape
        self.language_model: Qwen2Model = mllm.model.language_model
        self.lm_head = mllm.lm_head
        self.queries = QueryEmbeddings(shape.num_queries, width)
        self.routing = TokenRouting(width, preset.language.layers, shape.sampled_states, routing, shape.temperature)
        config = self.language_model.config
        self.connector = Connector(config, shape.connector_layers, preset.diffusion.caption_channels)
        self.diffusion = Diffusion(preset.diffusion)
        if aligned:
            self.alignment_head = AlignmentHead(preset.diffusion.width, preset.diffusion.align_hidden, width)

    def hidden_states(self, tokens: Tensor, keep: Tensor, references: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the sampled hidden states (B, K, P + Q, D) and the prompt's embeddings (B, P, D).

        tokens (B, P), real where `keep` (B, P) is nonzero; references (B, 3, S, S) in [0, 1] are the
        pictures to edit. Raises TypeError for references with a tokenizer that has no features.
        """
        embedded = self.language_model.embed_tokens(tokens)
        if references is not None:
            if not isinstance(self.tokenizer, UnifiedTokenizer):
                raise TypeError("a pixel autoencoder has no features of a picture to edit")
            embedded = merge(embedded, self.tokenizer.features(references), tokens == self.image_token_id)
        prefix, queries = sampled_hidden_states(
            self.language_model, embedded, self.queries(len(tokens)), keep, self.routing.sampled
        )
        return torch.cat([prefix, queries], dim=2), embedded

    def condition(self, tokens: Tensor, keep: Tensor, references: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return captions (B, P + Q, C) and which of them are real (B, P + Q), for `velocity`."""
        states, embedded = self.hidden_states(tokens, keep, references)
        routed = keep_references(self.routing(states), embedded, tokens == self.image_token_id)
        whole = extend_padding_mask(keep, states.shape[2] - keep.shape[1])
        return self.connector(routed, whole), whole


def keep_references(routed: Tensor, embedded: Tensor, is_image: Tensor) -> Tensor:
    """Put the embeddings (B, P, D) back over the routed tokens (B, P + Q, D) where `is_image` (B, P) is true.

    The reference picture conditions twice: through the language model, and as its features are.
    """
    queries = routed[:, is_image.shape[1] :]
    return torch.cat([torch.where(is_image[..., None], embedded, routed[:, : is_image.shape[1]]), queries], dim=1)
