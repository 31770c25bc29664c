"""The phases of SPAR by the names of their recipes, the sizes of the miniature, and what starts from what."""

from __future__ import annotations

from pathlib import Path, PurePath

from spar_scale.recipe import Recipe

PHASES = (
    "bootstrap_autoencoder",
    "bootstrap_mllm",
    "bootstrap_diffusion",
    "tokenizer_init",
    "tokenizer_decoder",
    "tokenizer_encoder",
    "align_connector",
    "align_joint",
    "instruct",
)
"""Names of the recipes, in their order."""
SIZES = {"demo": "tiny", "smoke": "smoke", "full": "full"}
"""Size -> its folder of recipes."""


def starts_from(recipe: Recipe) -> list[str]:
    """The phases that a recipe's starts from: the first part of each path beside its own run directory."""
    references = [*([recipe.init_from] if recipe.init_from else []), *recipe.model.pretrained.values()]
    return list(dict.fromkeys(PurePath(reference).parts[1] for reference in references))


def shards_in(recipe: Recipe, folder: Path) -> list[str]:
    """The overrides by which a recipe of the miniature reads its shards from a folder."""
    return [
        f"data.sources.{index}.shards={folder / PurePath(str(source.shards)).name}"
        for index, source in enumerate(recipe.data.sources)
    ]
