"""SPAR's start: published parts put together, and initial weights for what is new."""

from __future__ import annotations

from torch import nn

from spar_scale.models.initialise import initialise
from spar_scale.models.published import PretrainedPart
from spar_scale.models.roles import DiffusionModel, LanguageModel, VisionEncoder
from spar_scale.models.spar.model import SPAR
from spar_scale.models.spar.routing import Kind
from spar_scale.models.spar.shapes import ConditioningShape


def assemble(
    shape: ConditioningShape,
    language: LanguageModel,
    vision: VisionEncoder,
    diffusion: DiffusionModel,
    parts: dict[str, PretrainedPart],
    tokenizer: nn.Module,
    seed: int,
    routing: Kind,
    aligned: bool,
) -> SPAR:
    """Return SPAR with the pretrained parts `mllm` and `diffusion` and a loaded tokenizer; the rest from the seed.

    Where the shape asks for it, the connector starts as a copy of the language model's last layers.
    """
    mllm, transformer = language.load(parts["mllm"], vision), diffusion.load(parts["diffusion"])
    model = SPAR(shape, language, diffusion, mllm, tokenizer, transformer, routing, aligned)
    initialise(model, seed, loaded=("tokenizer", "language_model", "lm_head", "diffusion"))
    if shape.connector_copies:
        model.connector.copy_last_layers(language, model.language_model)
    return model
