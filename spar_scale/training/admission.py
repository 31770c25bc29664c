"""What keeps a recipe from being trained, found in seconds and all at once: the check before a job waits for its nodes.

Where `train` has a function that refuses before anything big is built, that very function is called here. Weights are
never read: of a pretrained part the config and the headers of its files are held against the preset, of a parent's
checkpoint its manifest is read, of stored values their manifest is compared except for the hashes of weights. So what
is refused here is refused by `train`, and `train` may still refuse damaged weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

import torch
from torch import nn

from parallel.errors import UserError
from parallel.launch.run_lock import check_free
from parallel.topology import Layout
from spar_scale.config.recipe import Recipe, behind_link, beside
from spar_scale.data import encoded
from spar_scale.data.spec import shards_of, sources_of
from spar_scale.data.tar_index import read_header
from spar_scale.data.tasks import source_task
from spar_scale.models.presets import REPOSITORIES, Preset
from spar_scale.models.published import PretrainedPart
from spar_scale.phases import origin_of, phase_of
from spar_scale.stages import Stage, meta_stage
from spar_scale.stages.parts import preset_of, pretrained_part, read_tokenizer
from spar_scale.stages.perceptual import PART, perceptual_files
from spar_scale.training.engine_settings import engine_settings
from spar_scale.training.parent import check_parent
from spar_scale.training.run_directory import refuse_another

_LOADERS: dict[str, Callable[[PretrainedPart, Preset], nn.Module]] = {
    "pixel_autoencoder": lambda part, preset: preset.autoencoder.load(part)[0],
    "diffusion": lambda part, preset: preset.diffusion.load(part),
    "tokenizer": lambda part, preset: preset.tokenizer.load(part, preset.vision, preset.autoencoder)[0],
    "mllm": lambda part, preset: preset.language.load(part, preset.vision),
    "vision": lambda part, preset: preset.vision.load(part),
}
"""Published part -> what reads it; `vision` is one of which only the vision tower is read."""


def check_layout(recipe: Recipe, world: int) -> None:
    """Raise UserError where the preset, the phase or the batch cannot be spread over `world` processes so."""
    from spar_scale.models.sharding import check_tensor

    layout = Layout(recipe.parallel.tensor, recipe.parallel.pipeline, recipe.parallel.zero)
    check_tensor(preset_of(recipe), layout.tensor)
    data_size = layout.data(world)
    if layout.pipeline > 1:
        layout.check_layers(len(meta_stage(recipe).layers), world)
    engine_settings(recipe, data_size)


def check_shards(recipe: Recipe) -> None:
    """Raise UserError for a source without shards, or whose first shard has no index of its present size.

    The loader checks all shards, but only after the weights are loaded and the run directory has the recipe.
    """
    for _, shards in shards_of(sources_of(recipe)):
        read_header(shards[0])


def refusals(recipe: Recipe, world: int, stage: Stage | None, before: Collection[str] = ()) -> list[str]:
    """Return everything that `train` would refuse of a recipe in a world of so many processes; empty where nothing.

    `stage` is its meta stage, None where that has been refused already: what depends on it is then left out. What
    comes from the phases `before`, which are trained earlier in a chain, need not be there yet.
    """
    checks: list[Callable[[], object]] = [
        lambda: check_layout(recipe, world),
        lambda: refuse_another(recipe.run_dir / "recipe.yaml", recipe),
        lambda: check_free(recipe.run_dir),
        lambda: _check_encoded(recipe, stage),
    ]
    if recipe.init_from is not None and origin_of(recipe.init_from) not in before:
        checks.insert(3, lambda: check_parent(recipe))
    if stage is not None:
        spec = stage.sample
        checks += [lambda source=source: source_task(spec.task, source) for source in sources_of(recipe)]
    given = recipe.model.pretrained
    checks += [lambda part=part: _check_part(recipe, part) for part in given if origin_of(given[part]) not in before]
    return list(dict.fromkeys(_messages(checks)))


def stored_bytes(recipe: Recipe, source: str, num_tokens: int) -> int:
    """Return the bytes that `data.encoded` holds for a sample of `source` with so many tokens; 0 without it."""
    if recipe.data.encoded is None:
        return 0
    directory = beside(recipe.run_dir, recipe.data.encoded)
    manifest = encoded.read_manifest(directory / encoded.MANIFEST)
    if manifest is None:
        return 0
    shards = shards_of([one for one in sources_of(recipe) if one.name == source])
    stored = encoded.Encoded(directory, manifest["made_of"], shards, "spar-scale data encode RECIPE")
    of_a_token = sum(state.nbytes for state in stored.token_states(source).values())
    return sum(tensor.nbytes for tensor in stored.empty(source, 1).values()) + num_tokens * of_a_token


def _messages(checks: list[Callable[[], object]]) -> Iterator[str]:
    for check in checks:
        try:
            check()
        except UserError as error:
            yield str(error)


def _check_part(recipe: Recipe, part: str) -> None:
    """Raise UserError where a pretrained part is not there, or its config or headers do not fit the preset."""
    found, preset = replace(_found(recipe, part), headers_only=True), preset_of(recipe)
    if part == PART:
        perceptual_files(recipe, found)
        return
    vision_only = part in phase_of(recipe).vision_only
    load = _LOADERS.get("vision" if vision_only else part)
    if load is not None:  # else a name that no phase takes, which the stage refuses
        with torch.device("meta"):
            load(found, preset)
    if part == "mllm" and not vision_only:
        read_tokenizer(found)


def _found(recipe: Recipe, part: str) -> PretrainedPart:
    reference = recipe.model.pretrained[part]
    directory = beside(recipe.run_dir, reference)
    try:
        return pretrained_part(recipe, part)
    except UserError as error:
        if directory.name == "pretrained":
            remedy = f"train the phase that writes it first (spar-scale train, run_dir={directory.parent})"
        else:
            published = REPOSITORIES.get(recipe.model.preset, {}).get(part, "the published files")
            remedy = f"put {published} there, or name a directory that has it: model.pretrained.{part}=DIR"
        raise UserError(f"{error}; {remedy}") from None


def _check_encoded(recipe: Recipe, stage: Stage | None) -> None:
    """Raise UserError where `data.encoded` is not there, or was made with other settings or of other shards."""
    if recipe.data.encoded is None:
        return
    path = beside(recipe.run_dir, recipe.data.encoded) / encoded.MANIFEST
    command = f"spar-scale data encode RECIPE (the recipe of {recipe.run_dir})"
    manifest = encoded.read_manifest(path)
    if manifest is None:
        link = behind_link(recipe.run_dir, recipe.data.encoded)
        raise UserError(f"data.encoded: there is no {path}; run `{command}`{link}")
    wanted: encoded.MadeOf = {"preset": recipe.model.preset, "precision": recipe.precision}
    if stage is not None:
        wanted |= {
            name: getattr(stage.sample, name) for name in ("image_size", "num_tokens", "image_tokens", "long_captions")
        }
        if stage.sample.text is not None:
            wanted["text"] = stage.sample.text.digest
    if differing := encoded.differences(manifest["made_of"], wanted):
        raise UserError(f"data.encoded: {path} was made of other things ({differing}); run `{command}`")
    encoded.check_sources(path, manifest, shards_of(sources_of(recipe)), command)
