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
    from torch import nn

    from spar_scale.data.patches import NUM_LABELS
    from spar_scale.data.spec import SampleSpec
    from spar_scale.models import internvl
    from spar_scale.models.initialise import initialise
    from spar_scale.stages import Export, Stage
    from spar_scale.stages.bootstrap_mllm import NUM_TOKENS, NamePatches, next_token_term, save_mllm
    from spar_scale.stages.parts import preset_of, pretrained_parts, text_of

    pretrained_parts(recipe)
    preset = preset_of(recipe)
    vision, language = preset.vision, preset.language
    model = internvl.build_mllm(vision, language)
    head = nn.Linear(language.width, sum(NUM_LABELS))
    model.naming_head = head
    initialise(model, recipe.seed)
    internvl.spread_words(model, language)
    seeing, reading = internvl.training_layers(model, vision, language)
    return Stage(
        model=model,
        layers=[*seeing, NamePatches(head), *reading, next_token_term()],
        inputs=("images", "tokens", "lengths", "counts", "patches"),
        terms={"next_token": 1.0, "patch_naming": 1.0},
        groups={"main": ("model", "lm_head", "naming_head")},
        sample=SampleSpec(
            task="language",
            image_size=preset.image_size,
            task_tokens=NUM_TOKENS,
            image_tokens=preset.image_tokens,
            text=text_of(recipe),
        ),
        export=Export(save_mllm),
        decoding=language.decoding_layers(*language.parts(model)),
    )
