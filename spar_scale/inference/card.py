"""The model card of an exported model: what it is, what it was trained on, and how it is used. It states no scores."""

from __future__ import annotations

from pathlib import Path

from parallel.errors import UserError
from spar_scale.config.recipe import Recipe, beside
from spar_scale.stages.parts import preset_of
from spar_scale.training.export import recipe_of

_CARD = """---
library_name: spar_scale
pipeline_tag: any-to-any
---

# SPAR, preset {preset}

A unified multimodal model (SPAR, arXiv 2606.23041): it draws pictures from text, edits pictures by an instruction, and
answers questions about pictures. Weights: {precision}, the exponential moving average after step {step} of phase
{phase}. Pictures have {size} x {size} pixels.

## Use

```python
from spar_scale import SparPipeline

spar = SparPipeline.from_pretrained("THIS_DIRECTORY", device="cuda")
spar.generate("a red bicycle in the rain")[0].save("drawn.png")
spar.edit("drawn.png", "make it night")[0].save("edited.png")
spar.ask("drawn.png", "What is in the picture?")
```

or

```
spar-scale generate THIS_DIRECTORY "a red bicycle in the rain" -o drawn.png
spar-scale edit THIS_DIRECTORY drawn.png "make it night" -o edited.png
spar-scale ask THIS_DIRECTORY drawn.png "What is in the picture?"
spar-scale reconstruct THIS_DIRECTORY drawn.png -o again.png
```

| directory | what | read by |
|---|---|---|
| `mllm/` | language model with the trained vision tower | transformers: `AutoModelForImageTextToText` |
| `transformer/` | diffusion transformer; its captions come from `conditioning/` | diffusers: `SanaTransformer2DModel` |
| `image_tokenizer/`, `conditioning/` | image tokenizer; queries, routing, connector | spar_scale |
| `scheduler/` | sampler | diffusers: `DPMSolverMultistepScheduler` |

`spar.json` has all sizes, the scale of the latents, the recipe, and the sha256 of each file.

## Training

Starting weights: {starts}.

| phase | steps | batch | data (weight) |
|---|---|---|---|
{phases}

## Licence

None is stated here. The licences of the starting weights and of the data bind this model: name one that they allow.
"""


def card(recipe: Recipe, step: int, precision: str) -> str:
    """Return the card of a run's model as Markdown. Phases whose run directories are gone are left out."""
    recipes = _with_earlier(recipe, {})
    given = [(one, path) for one in recipes for path in one.model.pretrained.values()]
    starts = {Path(path).name for one, path in given if _recipe_at(beside(one.run_dir, path).parent) is None}
    rows = []
    for one in recipes:
        data = [f"{source.name}: {Path(str(source.shards)).name} ({source.weight:g})" for source in one.data.sources]
        rows.append(f"| {one.stage} {one.phase} | {one.train.steps} | {one.global_batch} | {', '.join(data)} |")
    return _CARD.format(
        preset=recipe.model.preset,
        precision=precision,
        step=step,
        phase=f"{recipe.stage} {recipe.phase}",
        size=preset_of(recipe).image_size,
        starts=", ".join(sorted(starts)) or "none",
        phases="\n".join(rows),
    )


def _with_earlier(recipe: Recipe, found: dict[Path, Recipe]) -> list[Recipe]:
    """Return the recipes of the runs that a run starts from, the earliest first, and its own."""
    parents = [beside(recipe.run_dir, path).parent for path in recipe.model.pretrained.values()]
    if recipe.init_from is not None:
        parents.append(beside(recipe.run_dir, recipe.init_from))
    for run_dir in parents:
        if run_dir not in found and (earlier := _recipe_at(run_dir)) is not None:
            _with_earlier(earlier, found)
    found[recipe.run_dir.absolute()] = recipe
    return list(found.values())


def _recipe_at(run_dir: Path) -> Recipe | None:
    try:
        return recipe_of(run_dir)
    except UserError:
        return None
