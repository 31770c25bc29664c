"""Stage 0, phase `diffusion`, for the miniature only: the diffusion transformer that stage 2 finds trained.

It draws latents of the pixel autoencoder from captions, as the published one does through a text encoder of
its own: here words and a connector, both thrown away afterwards. The frozen language model's states would be
there too, but its words of one kind are so alike that the transformer learned colours and shapes from them and
hardly heeded places: 0.47 of placed objects stood right after 500 steps, of its own words 0.97. The caption
prompt is that of stage 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from transformers import Qwen2Config

from parallel.program import Layer
from spar_scale.models.connector import Connector
from spar_scale.models.diffusion import Diffusion
from spar_scale.models.initialise import initialise
from spar_scale.models.mllm import mllm_config
from spar_scale.models.presets import Preset
from spar_scale.models.unified import LatentDiffusion, PixelTokenizer
from spar_scale.stages import Export, Stage
from spar_scale.stages.align import conditioned_sample
from spar_scale.stages.conditioning_layers import connector_layers
from spar_scale.stages.diffusion_layers import AutoencoderLatent, diffusion_layers
from spar_scale.stages.parts import load_autoencoder, preset_of, pretrained_directories


class Words(nn.Embedding):
    """Embeddings of the vocabulary that start far apart."""

    def reset_parameters(self) -> None:
        """Draw each from N(0, 0.25)."""
        nn.init.normal_(self.weight, std=0.5)


class CaptionedDiffusion(LatentDiffusion):
    """A diffusion transformer, the frozen autoencoder that it is trained with, and its text encoder."""

    def __init__(self, preset: Preset, tokenizer: PixelTokenizer, latent_scale: float):
        super().__init__()
        self.tokenizer, self.latent_scale = tokenizer, latent_scale
        self.words = Words(preset.language.vocab_size, preset.streams.width)
        layers, channels = preset.conditioning.connector_layers, preset.diffusion.caption_channels
        self.text_encoder = Connector(cast(Qwen2Config, mllm_config(preset).text_config), layers, channels)
        self.diffusion, self.latent_shape = Diffusion(preset.diffusion), preset.latent_shape

    def condition(self, tokens: Tensor, keep: Tensor, references: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return captions (B, P, C) of tokens (B, P), and `keep` again, for `velocity`.

        Raises TypeError for references: no picture to edit is read.
        """
        if references is not None:
            raise TypeError("captions alone condition this model")
        return self.text_encoder(self.words(tokens), keep), keep


class EmbedWords(Layer):
    """`tokens` (B, P) to `captions` (B, P, D)."""

    reads = ("tokens",)
    writes = ("captions",)

    def __init__(self, words: nn.Module):
        super().__init__()
        self.words = words

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """Embed."""
        return {"captions": self.words(tokens)}


def diffusion(recipe: Any) -> Stage:
    """Build stage `bootstrap`, phase `diffusion`.

    Reads from the recipe model.preset, model.pretrained.pixel_autoencoder, required, seed and
    objective.caption_dropout. Exports the published layout of SanaTransformer2DModel.
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
            EmbedWords(model.words),
            *connector_layers(model.text_encoder, 0),
            AutoencoderLatent(tokenizer, scale),
            *diffusion_layers(model.diffusion, 0),
        ],
        inputs=("images", "tokens", "keep", "latent_noise", "timestep_draw"),
        terms={"flow_matching": 1.0},
        groups={"main": ("diffusion", "words", "text_encoder")},
        sample=conditioned_sample(preset, recipe.objective.caption_dropout, task="generation"),
        references=directories,
        export=Export(save_diffusion),
    )


def save_diffusion(model: nn.Module, directory: Path, images: Tensor | None = None) -> None:
    """Write the diffusion transformer in diffusers' published layout (config.json, safetensors)."""
    if not isinstance(model, CaptionedDiffusion):
        raise TypeError(f"expected CaptionedDiffusion, got {type(model).__name__}")
    model.diffusion.transformer.save_pretrained(str(directory), safe_serialization=True)
