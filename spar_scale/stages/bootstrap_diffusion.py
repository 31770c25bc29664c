"""Stage 0, phase `diffusion`, for the miniature only: the diffusion transformer that stage 2 finds trained.

It draws latents of the pixel autoencoder from captions, as the published one does through a text encoder of
its own: here words, their places and one layer, thrown away afterwards. Two others were given up. The frozen
language model's last states, when its words still began nearly alike: the transformer hardly heeded places. Layers of
the connector's kind drew a fifth fewer of the prompts after the same steps: under Muon their gated feed-forwards
grow until little of a word is left of what they write, and with one of two seeds half of the placed objects stood
wrong. The caption prompt is that of stage 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from parallel.program import Layer
from spar_scale.models.conditioning import positions
from spar_scale.models.diffusion import Diffusion
from spar_scale.models.initialise import initialise
from spar_scale.models.layers import TransformerLayer
from spar_scale.models.presets import Preset
from spar_scale.models.unified import LatentDiffusion, PixelTokenizer
from spar_scale.stages import Export, Stage
from spar_scale.stages.align import conditioned_sample
from spar_scale.stages.diffusion_layers import AutoencoderLatent, diffusion_layers
from spar_scale.stages.parts import load_autoencoder, preset_of, pretrained_directories


class TextEncoder(nn.Module):
    """Words and their places, and one bidirectional layer: tokens (B, P) to captions (B, P, C).

    Words start far apart, so that those of one kind (left, right) stay apart in what the transformer reads.
    """

    def __init__(self, preset: Preset):
        super().__init__()
        channels = preset.diffusion.caption_channels
        self.words = nn.Embedding(preset.language.vocab_size, channels)
        self.places = nn.Embedding(preset.language.max_positions, channels)
        self.layer = TransformerLayer(channels, preset.streams.pixel_heads)

    def forward(self, tokens: Tensor, keep: Tensor) -> Tensor:
        """Encode tokens (B, P), real where `keep` (B, P) is nonzero."""
        return self.layer(self.words(tokens) + self.places(positions(keep)), keep)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5 if module is self.words else 0.3)
        else:
            cast(Any, module).reset_parameters()


class CaptionedDiffusion(LatentDiffusion):
    """A diffusion transformer, the frozen autoencoder that it is trained with, and its text encoder."""

    def __init__(self, preset: Preset, tokenizer: PixelTokenizer, latent_scale: float):
        super().__init__()
        self.tokenizer, self.latent_scale = tokenizer, latent_scale
        self.text_encoder = TextEncoder(preset)
        self.diffusion, self.latent_shape = Diffusion(preset.diffusion), preset.latent_shape

    def condition(self, tokens: Tensor, keep: Tensor, references: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return captions (B, P, C) of tokens (B, P), and `keep` again, for `velocity`.

        Raises TypeError for references: no picture to edit is read.
        """
        if references is not None:
            raise TypeError("captions alone condition this model")
        return self.text_encoder(tokens, keep), keep


class EncodeText(Layer):
    """`tokens` (B, P) to `captions` (B, P, C)."""

    reads = ("tokens", "keep")
    writes = ("captions",)

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor, keep: Tensor) -> dict[str, Tensor]:
        """Encode."""
        return {"captions": self.encoder(tokens, keep)}


def diffusion(recipe: Any) -> Stage:
    """Build stage `bootstrap`, phase `diffusion`.

    Reads from the recipe model.preset, model.pretrained.pixel_autoencoder, required, seed and
    objective.{caption_dropout, timestep_shift}. Exports the published layout of SanaTransformer2DModel.
    """
    parts = ("pixel_autoencoder",)
    directories = pretrained_directories(recipe, allowed=parts, required=parts)
    preset = preset_of(recipe)
    autoencoder, scale = load_autoencoder(directories["pixel_autoencoder"], preset)
    tokenizer = PixelTokenizer(autoencoder, preset)
    model = CaptionedDiffusion(preset, tokenizer, scale)
    initialise(model, recipe.seed, loaded=("tokenizer",))
    return Stage(
        model=model,
        layers=[
            EncodeText(model.text_encoder),
            AutoencoderLatent(tokenizer, scale),
            *diffusion_layers(model.diffusion, 0, recipe.objective.timestep_shift),
        ],
        inputs=("images", "tokens", "keep", "latent_noise", "timestep_draw"),
        terms={"flow_matching": 1.0},
        groups={"main": ("diffusion", "text_encoder")},
        sample=conditioned_sample(preset, recipe.objective.caption_dropout, task="generation"),
        references=directories,
        export=Export(save_diffusion),
    )


def save_diffusion(model: nn.Module, directory: Path, images: Tensor | None = None) -> None:
    """Write the diffusion transformer in diffusers' published layout (config.json, safetensors)."""
    if not isinstance(model, CaptionedDiffusion):
        raise TypeError(f"expected CaptionedDiffusion, got {type(model).__name__}")
    model.diffusion.transformer.save_pretrained(str(directory), safe_serialization=True)
