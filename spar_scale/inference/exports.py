"""A directory with all that a trained SPAR needs: written from a run, used without the run and its starting weights.

    mllm/             InternVL in transformers' layout with the trained vision tower, and the text tokenizer's files
    transformer/      SANA in diffusers' layout
    image_tokenizer/  streams, fusion, pixel decoder and vision tower
    conditioning/     queries, routing and connector with its projection
    scheduler/        the sampler's config, in diffusers' layout
    spar.json         sizes, scale of the latents, precision, recipe, and the sha256 of the files above
    README.md         a model card

It is read through the phase that trained it, with these directories as its pretrained parts. So there is one model and
one forward, and the price is that a program which no longer has the phase or the preset cannot read it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from parallel import checkpoint
from parallel.checkpoint.manifest import read_manifest, sha256_of
from parallel.errors import UserError
from parallel.files import new_directory, write_file
from spar_scale import stages
from spar_scale.config.recipe import Recipe, Section
from spar_scale.files.json_files import read_json
from spar_scale.inference.card import card
from spar_scale.inference.sampler import scheduler
from spar_scale.models.presets import Preset
from spar_scale.stages import Stage
from spar_scale.stages.align import CONDITIONING
from spar_scale.stages.parts import preset_of, pretrained_part
from spar_scale.training.export import ema_stage
from spar_scale.training.mlflow_store import program_commit
from spar_scale.training.parent import overwrite

RECORD = "spar.json"
PARTS = {"mllm": "mllm", "diffusion": "transformer", "tokenizer": "image_tokenizer"}
"""Pretrained part of the phase -> its directory."""
WEIGHTS = "conditioning/model.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_REMEDY = "export the run again"


class Record(Section):
    """The content of spar.json."""

    version: Literal[1]
    preset: str
    sizes: dict[str, Any]
    """All numbers of the preset, by role."""
    picture_size: int
    latent_scale: float
    precision: Literal["fp32", "bf16"]
    step: int
    checkpoint: str
    """sha256 of the manifest of the checkpoint."""
    commit: str | None
    """Commit of the program that wrote it."""
    files: dict[str, str]
    """Path -> sha256."""
    recipe: dict[str, Any]
    """The recipe of the run."""


def write_export(recipe: Recipe, out: Path, precision: Literal["fp32", "bf16"] | None = None) -> str:
    """Write the EMA of a run of a phase that trains all of SPAR as the new directory `out`; return what was written.

    `precision` is that of the weights, by default the run's. Raises UserError if `out` exists or cannot be written, and
    for a run without a checkpoint.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"--out: {out} exists; give the name of a new directory")
    path = checkpoint.find(recipe.run_dir / "checkpoints")
    if path is None:
        raise UserError(f"{recipe.run_dir}: holds no checkpoint yet; train it further")
    precision = precision or recipe.precision
    with new_directory(out) as folder:
        stage = ema_stage(recipe, path)
        stage.model.to(DTYPES[precision])
        _write_parts(recipe, stage, folder)
        assert stage.latent_scale is not None
        preset = preset_of(recipe)
        record = Record(
            version=1,
            preset=preset.name,
            sizes=_sizes(preset),
            picture_size=stage.sample.image_size,
            latent_scale=stage.latent_scale,
            precision=precision,
            step=read_manifest(path).step,
            checkpoint=checkpoint.manifest_hash(path),
            commit=program_commit(),
            files={str(file.relative_to(folder)): sha256_of(file) for file in sorted(folder.rglob("*.*"))},
            recipe=recipe.model_dump(mode="json"),
        )
        write_file(folder / RECORD, json.dumps(record.model_dump(mode="json"), indent=1) + "\n")
        write_file(folder / "README.md", card(recipe, record.step, precision))
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return f"{out}: the average of {path}, preset '{preset.name}', {precision}, {size / 1e6:.1f} MB"


def is_export(directory: Path) -> bool:
    """Return whether a directory was written by `write_export`."""
    return (directory / RECORD).is_file()


def read_record(directory: Path) -> Record:
    """Return what spar.json says. Raises UserError where it is damaged."""
    return read_json(directory / RECORD, TypeAdapter(Record), _REMEDY)


def exported_recipe(directory: Path) -> Recipe:
    """Return the recipe with which an exported model is built: that of its run, with the parts in the directory.

    Raises UserError for a recipe or a preset that this program does not have or has otherwise.
    """
    directory, record = directory.resolve(), read_record(directory)
    try:
        recipe = Recipe.model_validate_json(json.dumps(record.recipe))
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        where = ".".join(map(str, found["loc"]))
        raise UserError(f"{directory / RECORD}: recipe.{where}: {found['msg']}; {_REMEDY}") from None
    sizes = _sizes(preset_of(recipe))
    for name, value in record.sizes.items():
        if sizes.get(name) != value:
            raise UserError(
                f"{directory / RECORD}: found preset '{record.preset}' with {name} = {value}, this program has"
                f" {sizes.get(name)}; use the program that wrote it (commit {record.commit})"
            )
    model = recipe.model.model_copy(
        update={"pretrained": {part: str(directory / name) for part, name in PARTS.items()}, "alignment": "none"}
    )
    data = recipe.data.model_copy(update={"encoded": None})
    changes = {"model": model, "data": data, "init_from": None, "run_dir": directory, "precision": record.precision}
    return recipe.model_copy(update=changes)


def exported_stage(directory: Path) -> Stage:
    """Return an exported model as the stage that trained it (eval mode, CPU).

    Raises UserError for files that are missing, damaged or of another model.
    """
    record = read_record(directory)
    for name, digest in record.files.items():
        if not (directory / name).is_file() or sha256_of(directory / name) != digest:
            raise UserError(f"{directory / name}: is missing or is not the file that was written; {_REMEDY}")
    stage = stages.build(exported_recipe(directory))
    try:
        weights = load_file(directory / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{directory / WEIGHTS}: cannot be read ({error}); {_REMEDY}") from None
    if missing := sorted(_conditioning(stage).keys() - weights.keys()):
        raise UserError(f"{directory / WEIGHTS}: holds no {missing[0]}; {_REMEDY}")
    overwrite(stage.model, weights, directory / WEIGHTS)
    stage.model.eval()
    return stage


def _write_parts(recipe: Recipe, stage: Stage, folder: Path) -> None:
    preset, model = preset_of(recipe), stage.model
    tokenizer = model.get_submodule("tokenizer")
    trunk, head = model.get_submodule("language_model"), model.get_submodule("lm_head")
    preset.language.save(trunk, head, tokenizer, pretrained_part(recipe, "mllm"), folder / PARTS["mllm"])
    preset.diffusion.save(model.get_submodule("diffusion"), folder / PARTS["diffusion"])
    part = pretrained_part(recipe, "tokenizer")
    scale, images = part.positive(part.config(), "latent_scale"), part.config().get("calibration_images", 0)
    preset.tokenizer.save(tokenizer, folder / PARTS["tokenizer"], preset.name, scale, images)
    (folder / WEIGHTS).parent.mkdir()
    save_file(_conditioning(stage), folder / WEIGHTS)
    scheduler(preset.sampling.flow_shift).save_pretrained(str(folder / "scheduler"))


def _conditioning(stage: Stage) -> dict[str, torch.Tensor]:
    """Return the weights that are SPAR's own, by their names in the checkpoint."""
    state = stage.model.state_dict()
    return {name: tensor.contiguous() for name, tensor in state.items() if name.split(".")[0] in CONDITIONING}


def _sizes(preset: Preset) -> dict[str, Any]:
    """Return the numbers of a preset by dotted name, as JSON holds them."""
    sizes: dict[str, Any] = {}
    for field in dataclasses.fields(preset):
        member: Any = getattr(preset, field.name)
        if dataclasses.is_dataclass(member):
            sizes |= {f"{field.name}.{name}": value for name, value in dataclasses.asdict(member).items()}  # type: ignore[arg-type]
    return json.loads(json.dumps({"image_size": preset.image_size, **sizes}))
