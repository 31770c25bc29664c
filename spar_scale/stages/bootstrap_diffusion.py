"""Stage 0, phase `diffusion`, for the miniature only: the diffusion transformer that stage 2 finds trained.

It draws latents of the pixel autoencoder from the frozen language model's last states of a caption,
through one projection that is thrown away afterwards: a frozen random transformer would make the
connector phase meaningless. The caption prompt is that of stage 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from parallel.program import Layer
from spar_scale.models.diffusion import Diffusion
from spar_scale.models.initialise import initialise
from spar_scale.models.presets import Preset
from spar_scale.models.unified import LatentDiffusion, PixelTokenizer
from spar_scale.stages import Encoding, Export, Stage
from spar_scale.stages.align import conditioned_sample
from spar_scale.stages.bootstrap_mllm import DecoderLayer
from spar_scale.stages.conditioning_layers import ProjectCaptions
from spar_scale.stages.diffusion_layers import AutoencoderLatent, diffusion_layers
from spar_scale.stages.parts import load_autoencoder, load_mllm, preset_of, pretrained_directories


class CaptionedDiffusion(LatentDiffusion):
    """A diffusion transformer, the frozen parts that it is trained with, and the projection between them."""

    def __init__(self, preset: Preset, language_model: nn.Module, tokenizer: PixelTokenizer, latent_scale: float):
        super().__init__()
        self.language_model, self.tokenizer, self.latent_scale = language_model, tokenizer, latent_scale
        self.caption_projection = nn.Linear(preset.streams.width, preset.diffusion.caption_channels)
        self.diffusion, self.latent_shape = Diffusion(preset.diffusion), preset.latent_shape

    def condition(self, tokens: Tensor, keep: Tensor, references: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return captions (B, P, C) of tokens (B, P), padded on the right, and `keep` again, for `velocity`.

        Raises TypeError for references: no picture to edit is read.
        """
        if references is not None:
            raise TypeError("captions alone condition this model")
        states = self.language_model(input_ids=tokens, use_cache=False).last_hidden_state
        return self.caption_projection(states), keep


class EmbedWords(Layer):
    """`tokens` (B, P) to the language model's first `states` (B, P, D)."""

    reads = ("tokens",)
    writes = ("states",)
    detached = frozenset(writes)

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self.embedding = embedding

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """Embed."""
        return {"states": self.embedding(tokens)}


class FinalStates(Layer):
    """`states` through the language model's final norm to `captions`, without gradient."""

    reads = ("states",)
    writes = ("captions",)
    detached = frozenset(writes)

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, states: Tensor) -> dict[str, Tensor]:
        """Normalise."""
        return {"captions": self.norm(states)}


def diffusion(recipe: Any) -> Stage:
    """Build stage `bootstrap`, phase `diffusion`.

    Reads from the recipe model.preset, model.pretrained.{mllm, pixel_autoencoder}, both required, seed
    and objective.caption_dropout. Exports the published layout of SanaTransformer2DModel.
    """
    parts = ("mllm", "pixel_autoencoder")
    directories = pretrained_directories(recipe, allowed=parts, required=parts)
    preset = preset_of(recipe)
    autoencoder, scale = load_autoencoder(directories["pixel_autoencoder"], preset)
    language = load_mllm(directories["mllm"], preset).model.language_model
    tokenizer = PixelTokenizer(autoencoder, preset)
    model = CaptionedDiffusion(preset, language, tokenizer, scale)
    initialise(model, recipe.seed, loaded=("language_model", "tokenizer"))
    text: list[Layer] = [
        EmbedWords(language.embed_tokens),
        *(DecoderLayer(layer, language.config) for layer in language.layers),
        FinalStates(language.norm),
    ]
    latent = AutoencoderLatent(tokenizer, scale)
    trained = [ProjectCaptions(nn.Identity(), model.caption_projection), *diffusion_layers(model.diffusion, 0)]
    return Stage(
        model=model,
        layers=[*text, latent, *trained],
        inputs=("images", "tokens", "keep", "latent_noise", "timestep_draw"),
        terms={"flow_matching": 1.0},
        groups={"main": ("diffusion", "caption_projection")},
        sample=conditioned_sample(preset, recipe.objective.caption_dropout, task="generation"),
        references=directories,
        export=Export(save_diffusion),
        encoding=Encoding(
            layers=[*text, latent],
            text=text,
            pictures=("latent",),
            states=("captions",),
            remaining=trained,
            constants={"latent_scale": scale},
        ),
    )


def save_diffusion(model: nn.Module, directory: Path, images: Tensor | None = None) -> None:
    """Write the diffusion transformer in diffusers' published layout (config.json, safetensors)."""
    if not isinstance(model, CaptionedDiffusion):
        raise TypeError(f"expected CaptionedDiffusion, got {type(model).__name__}")
    model.diffusion.transformer.save_pretrained(str(directory), safe_serialization=True)
