"""What a recipe names: the preset, and the pretrained parts that a phase starts from."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer

from parallel.errors import UserError, nearest
from spar_scale.config.recipe import Recipe, behind_link, beside
from spar_scale.data.prompts import miniature_text
from spar_scale.data.text import IMAGE, TextTokenizer
from spar_scale.models.presets import PRESETS, Preset
from spar_scale.models.published import PretrainedPart, shapes_only
from spar_scale.phases import phase_of

_log = logging.getLogger(__name__)
_INNER = ("transformer", "vae")
"""Folders of a whole pipeline of diffusers that are parts."""


def preset_of(recipe: Recipe) -> Preset:
    """Return the preset that `model.preset` names, for pictures of `model.image_size`.

    Raises UserError for an unknown preset, and a size that does not fit it.
    """
    name = recipe.model.preset
    if name not in PRESETS:
        raise UserError(f"model.preset: '{name}' is not one of {', '.join(sorted(PRESETS))}{nearest(name, PRESETS)}")
    size = recipe.model.image_size
    return PRESETS[name] if size is None else PRESETS[name].at(size)


def pretrained_parts(recipe: Recipe) -> dict[str, PretrainedPart]:
    """Return the parts that `model.pretrained` names, relative directories taken from the run directory.

    Raises UserError for a part that the phase does not take, a required part that is not given, and a
    directory without a config.
    """
    allowed, required = phase_of(recipe).pretrained_parts(recipe)
    given: Mapping[str, str] = recipe.model.pretrained or {}
    if unknown := sorted(set(given) - set(allowed)):
        raise UserError(
            f"model.pretrained.{unknown[0]}: stage '{recipe.stage}', phase '{recipe.phase}' takes"
            f" {', '.join(allowed) or 'none'}{nearest(unknown[0], allowed)}"
        )
    if missing := sorted(set(required) - set(given)):
        raise UserError(
            f"model.pretrained.{missing[0]}: stage '{recipe.stage}', phase '{recipe.phase}' starts from this part;"
            " name its directory, relative to run_dir"
        )
    return {part: pretrained_part(recipe, part) for part in given}


def pretrained_part(recipe: Recipe, name: str) -> PretrainedPart:
    """Return a part that `model.pretrained` names, to be read in the precision of the recipe.

    Raises UserError where its directory holds no config.
    """
    run_dir, given = Path(recipe.run_dir), recipe.model.pretrained[name]
    # The engine rounds all weights to its precision, so one that is never updated needs no fp32 copy before.
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    part = PretrainedPart(name, beside(run_dir, given), recipe.model.preset, dtype)
    if not shapes_only() and name != "perceptual" and not part.config_path.is_file():  # whose files have no config
        inner = [path.name for path in map(part.directory.joinpath, _INNER) if (path / "config.json").is_file()]
        hint = f"; its folders {', '.join(inner)} have one each: name the one that is this part" if inner else ""
        raise part.error(f"no config.json in {part.directory}{hint}{behind_link(run_dir, given)}")
    return part


def text_of(recipe: Recipe) -> TextTokenizer | None:
    """Return the tokenizer of the recipe's language model; where it names none, that of the miniature's words.

    Raises UserError for a directory without a tokenizer and one that does not fit the preset. None where only shapes
    are wanted and the directory is not there.
    """
    if "mllm" not in recipe.model.pretrained:
        text, source = miniature_text(), "the miniature's words"
    else:
        part = PretrainedPart(
            "mllm", beside(Path(recipe.run_dir), recipe.model.pretrained["mllm"]), recipe.model.preset
        )
        path = part.directory / "tokenizer.json"
        if shapes_only() and not path.is_file():
            return None
        text, source = read_tokenizer(part), f"model.pretrained.mllm: {path}"
    language = preset_of(recipe).language
    if language.image_token_id >= 0 and text.image_token_id != language.image_token_id:
        raise UserError(
            f"{source} has {IMAGE} = {text.image_token_id}, preset '{recipe.model.preset}' needs"
            f" {language.image_token_id}; name a language model of this preset, or set model.preset"
        )
    if text.size > language.vocab_size:
        raise UserError(
            f"{source} has {text.size} tokens, preset '{recipe.model.preset}' has embeddings for {language.vocab_size}"
        )
    return text


def read_tokenizer(part: PretrainedPart) -> TextTokenizer:
    """Return the tokenizer in the directory of a language model. Raises UserError where it cannot be read."""
    path = part.directory / "tokenizer.json"
    if not path.is_file():
        raise part.error(f"there is no {path}; published `-hf` directories have one, as have runs of bootstrap mllm")
    return _tokenizer(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _tokenizer(path: Path, changed_ns: int) -> TextTokenizer:
    """Read a tokenizer once in a process: that of a published model takes seconds. `changed_ns` is part of the key."""
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises its own kind, which derives from Exception alone
        raise UserError(f"model.pretrained.mllm: {path} cannot be read ({error})") from None
    return TextTokenizer(backend, f"model.pretrained.mllm: {path}")


def note_random_part(part: str, seed: int) -> None:
    """Log that a part was not given and is initialised from the seed instead."""
    _log.warning("model.pretrained.%s is not given: the part is initialised from seed %d and stays frozen", part, seed)
