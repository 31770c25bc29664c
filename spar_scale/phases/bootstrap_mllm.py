"""Training stage 0, for the miniature only: the vision tower and the language model, from scratch.

Everything trains on the cross-entropy of the next token of an answer (`data/prompts.py`). Stages 1 to 3 take from
this phase what the paper takes from InternVL3. The names of the sources are their tasks (captions, questions, edits,
texts). A linear head names the shape and the colour that each image token shows; it is not published.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spar_scale.phases import Phase

if TYPE_CHECKING:
    from spar_scale.config.recipe import Recipe
    from spar_scale.stages import Stage

PHASE = Phase(
    name="bootstrap_mllm",
    training_stage="bootstrap",
    stage_number=0,
    phase="mllm",
    trains="vision tower and language model",
    losses="cross-entropy of answers and captions",
    publishes="mllm",
    used_by=frozenset({"ask"}),
    evaluated_as="mllm",
    slurm_script="stage0_bootstrap.sh",
    samples_per_s=80,
)


def build(recipe: Recipe) -> Stage:
    """Build the phase; it publishes the layout of InternVL with its tokenizer."""
    import torch
    from torch import nn

    from spar_scale.data.patches import NUM_LABELS
    from spar_scale.data.spec import SampleSpec
    from spar_scale.models.initialise import initialise
    from spar_scale.models.mllm import build_mllm
    from spar_scale.stages import Export, Stage
    from spar_scale.stages.bootstrap_mllm import NUM_TOKENS, mllm_layers, save_mllm
    from spar_scale.stages.parts import preset_of, pretrained_directories

    pretrained_directories(recipe)
    preset = preset_of(recipe)
    model = build_mllm(preset)
    model.naming_head = nn.Linear(preset.streams.width, sum(NUM_LABELS))
    initialise(model, recipe.seed)
    with torch.no_grad():  # transformers' own initialisation has one deviation for all weights
        model.model.language_model.embed_tokens.weight *= preset.language.word_range / preset.language.initializer_range
    return Stage(
        model=model,
        layers=mllm_layers(model),
        inputs=("images", "tokens", "counts", "patches"),
        terms={"next_token": 1.0, "patch_naming": 1.0},
        groups={"main": ("model", "lm_head", "naming_head")},
        sample=SampleSpec(
            task="language",
            image_size=preset.image_size,
            task_tokens=NUM_TOKENS,
            image_tokens=preset.vision.grid**2,
        ),
        export=Export(save_mllm),
    )
