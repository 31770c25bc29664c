"""The diffusion transformer's training forward as layers: flow matching, and the alignment of its features.

Slots (B samples, N latent positions, W_t and W widths, M captions, Z latent channels):
    latent z (B, Z, g, g)    latent_noise eps (B, Z, g, g)    timestep_draw (B,) standard normal
    captions (B, M, C), then the transformer's own context (B, M, W_t)    keep (B, P), 1 where real
    image_tokens (B, N, W_t)   modulation (B, 6 W_t)   time (B, W_t)   teacher f_v (B, N, D)
    flow_matching (B,), alignment (B,): the terms
"""

from __future__ import annotations

from torch import Tensor, nn

from parallel.program import Layer
from spar_scale.models.autoencoder import encode_images
from spar_scale.models.conditioning import extend_padding_mask
from spar_scale.models.diffusion import Diffusion, DiffusionInput, DiffusionOutput, run_block
from spar_scale.models.unified import PixelTokenizer
from spar_scale.objectives.flow_matching import noisy_latents, timesteps, velocity_error
from spar_scale.objectives.self_alignment import self_alignment


class AutoencoderLatent(Layer):
    """The target among `images` through a frozen pixel encoder to the scaled `latent`."""

    reads = ("images",)
    writes = ("latent",)
    detached = frozenset(writes)

    def __init__(self, tokenizer: PixelTokenizer, scale: float):
        super().__init__()
        self.encoder, self.side, self.scale = tokenizer.encoder, tokenizer.encoded_size, scale

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Encode."""
        return {"latent": encode_images(self.encoder, images[:, 0], self.side) * self.scale}


class ScaleLatent(Layer):
    """`latent` times a constant."""

    reads = ("latent",)
    writes = ("latent",)

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, latent: Tensor) -> dict[str, Tensor]:
        """Scale."""
        return {"latent": latent * self.scale}


class BeginDiffusion(Layer):
    """The noisy latent, the time and the captions to what the blocks read."""

    reads = ("captions", "latent", "latent_noise", "timestep_draw")
    writes = ("image_tokens", "captions", "modulation", "time")

    def __init__(self, diffusion: Diffusion, shift: float):
        super().__init__()
        self.begin, self.shift = DiffusionInput(diffusion.transformer), shift

    def forward(self, captions: Tensor, latent: Tensor, latent_noise: Tensor, timestep_draw: Tensor):
        """Mix the noise in and embed."""
        timestep = timesteps(timestep_draw, self.shift)
        embedded = self.begin(noisy_latents(latent, latent_noise, timestep), timestep, captions)
        return dict(zip(self.writes, embedded, strict=True))


class DiffusionBlock(Layer):
    """One block on `image_tokens`."""

    reads = ("image_tokens", "captions", "keep", "modulation")
    writes = ("image_tokens",)

    def __init__(self, block: nn.Module, grid: int, num_queries: int):
        super().__init__()
        self.block, self.grid, self.num_queries = block, (grid, grid), num_queries

    def forward(self, image_tokens: Tensor, captions: Tensor, keep: Tensor, modulation: Tensor) -> dict[str, Tensor]:
        """Run the block."""
        real = extend_padding_mask(keep, self.num_queries)
        return {"image_tokens": run_block(self.block, image_tokens, captions, real, modulation, self.grid)}


class Alignment(Layer):
    """The term `alignment` (B,): L_align of the tapped `image_tokens` against a teacher's features."""

    writes = ("alignment",)

    def __init__(self, head: nn.Module, teacher: str):
        super().__init__()
        self.head, self.teacher = head, teacher
        self.reads = ("image_tokens", teacher)

    def forward(self, image_tokens: Tensor, **teacher: Tensor) -> dict[str, Tensor]:
        """Compare."""
        return {"alignment": self_alignment(self.head(image_tokens), teacher[self.teacher])}


class FlowMatching(Layer):
    """The term `flow_matching` (B,): the velocity's mean squared error."""

    reads = ("image_tokens", "time", "latent", "latent_noise")
    writes = ("flow_matching",)

    def __init__(self, diffusion: Diffusion, grid: int):
        super().__init__()
        self.end, self.grid = DiffusionOutput(diffusion.transformer), (grid, grid)

    def forward(self, image_tokens: Tensor, time: Tensor, latent: Tensor, latent_noise: Tensor) -> dict[str, Tensor]:
        """Predict and compare."""
        return {"flow_matching": velocity_error(self.end(image_tokens, time, self.grid), latent, latent_noise)}


def diffusion_layers(
    diffusion: Diffusion, num_queries: int, shift: float, tap: tuple[int, Layer] | None = None
) -> list[Layer]:
    """Return the way from `captions` and `latent` to the term `flow_matching`.

    `num_queries` of the captions stand behind those that `keep` tells of; `shift` moves the times towards
    noise; `tap` is a layer with the number, from 1, of the block that it follows.
    """
    grid = diffusion.shape.sample_size // diffusion.shape.patch_size
    layers: list[Layer] = [BeginDiffusion(diffusion, shift)]
    for number, block in enumerate(diffusion.transformer.transformer_blocks, start=1):
        layers.append(DiffusionBlock(block, grid, num_queries))
        if tap is not None and number == tap[0]:
            layers.append(tap[1])
    return [*layers, FlowMatching(diffusion, grid)]
