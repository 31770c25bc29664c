"""`spar-scale data encode RECIPE`: run the frozen parts of a training stage once over all samples, store the results.

The frozen layers run on micro-batches of the recipe's size, source by source. Pictures are encoded once per sample;
prompts without pictures once per distinct prompt; prompts with pictures per sample, with each text and without text. A
run that reads the results has the losses of one that computes them within rounding: the prompts of a micro-batch are
packed, and they are others here than in training.

Each shard has one file, which is written under a temporary name and renamed; the manifest is written last. An
interrupted command can be started again and skips the complete files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from parallel.errors import UserError
from parallel.files import write_file
from parallel.launch.world import device_type
from parallel.program import Subprogram
from spar_scale import stages
from spar_scale.config.recipe import Recipe, beside
from spar_scale.data.encoded import (
    MANIFEST,
    VERSION,
    Encoded,
    MadeOf,
    PromptStates,
    file_name,
    hash_of,
    is_whole,
    read_manifest,
    save,
    source_digest,
)
from spar_scale.data.images import BadSample
from spar_scale.data.spec import SampleSpec, Source, shards_of, sources_of
from spar_scale.data.storage import ShardReader
from spar_scale.data.tar_index import check_fresh, read_index
from spar_scale.data.tasks import Conditioned, Members, source_task
from spar_scale.models.published import fp32_values
from spar_scale.stages import Encoding, Stage
from spar_scale.training.attention_choice import attention_of

_log = logging.getLogger(__name__)


def encode(recipe: Recipe) -> str:
    """Store the outputs of the recipe's frozen parts for all samples in `data.encoded`; return a summary.

    Raises UserError for a recipe without `data.encoded`, and a phase without such parts.
    """
    directory = _directory(recipe)
    stage = stages.build(recipe)
    made_of = made_of_stage(recipe, stage)
    sources = _sources(recipe)
    tasks = [_task(stage.sample, source) for source, _ in sources]
    manifest = _begin(directory, made_of, sources)
    model = stage.model.to(device_type(), torch.bfloat16 if recipe.precision == "bf16" else torch.float32).eval()
    with attention_of(recipe), torch.no_grad():
        assert model is stage.model
        for (source, shards), task in zip(sources, tasks, strict=True):
            writer = _Writer(directory, source, shards, hash_of(made_of), stage, task)
            writer.write(recipe.parallel.micro_batch)
            manifest["sources"][source.name] = source_digest(source, shards)
            write_file(directory / MANIFEST, (json.dumps(manifest, indent=1) + "\n"))
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    names = ", ".join(source.name for source, _ in sources)
    return f"{directory}: {names} of {recipe.stage}/{recipe.phase}, {size / 1e6:.1f} MB"


def open_encoded(recipe: Recipe, stage: Stage) -> Encoded | None:
    """Return the stored values that the recipe trains on, or None if it computes them.

    Raises UserError if they are missing, or were made from other shards or inputs.
    """
    if recipe.data.encoded is None:
        return None
    sources = _sources(recipe)
    for source, _ in sources:
        _task(stage.sample, source)
    command = f"spar-scale data encode RECIPE (the recipe of {recipe.run_dir})"
    return Encoded(_directory(recipe), made_of_stage(recipe, stage), sources, command)


def made_of_stage(recipe: Recipe, stage: Stage) -> MadeOf:
    """Return everything that determines the stored values: hashes of the weights by part, and settings."""
    encoding, sample = _encoding(stage), stage.sample
    used = {id(parameter) for parameter in nn.ModuleList(stage.storing_layers()).parameters()}
    weights = frozen_digests(stage.model, used)
    return {
        "preset": recipe.model.preset,
        "precision": recipe.precision,
        "image_size": sample.image_size,
        "num_tokens": sample.num_tokens,
        "image_tokens": sample.image_tokens,
        "long_captions": sample.long_captions,
        "text": sample.tokenizer.digest,
        **{f"slot {name}": "of the pictures" for name in encoding.pictures},
        **{f"slot {name}": "of the prompt" for name in encoding.states},
        **encoding.constants,
        **{f"weights of {part}": value for part, value in weights.items()},
    }


def frozen_digests(model: nn.Module, used: set[int] | None = None) -> dict[str, str]:
    """Return the sha256 of the frozen parameters by top-level part; with `used`, only of parameters with these ids.

    It is of whole tensors in fp32, whatever a run rounds them to; what is still in files is read one tensor at a time.
    """
    hashes: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and (used is None or id(parameter) in used):
            part = hashes.setdefault(name.split(".")[0], hashlib.sha256())
            part.update(name.encode())
            part.update(fp32_values(parameter).contiguous().view(-1).view(torch.uint8).numpy())
    return {part: value.hexdigest() for part, value in hashes.items()}


def _directory(recipe: Recipe) -> Path:
    if recipe.data.encoded is None:
        raise UserError("data.encoded: not set; give the directory to write, relative to run_dir")
    return beside(recipe.run_dir, recipe.data.encoded)


def _encoding(stage: Stage) -> Encoding:
    if stage.encoding is None:
        raise UserError("data.encoded: this phase has no frozen part whose output could be stored; remove the key")
    return stage.encoding


def _sources(recipe: Recipe) -> list[tuple[Source, list[str]]]:
    return shards_of(sources_of(recipe))


def _task(sample: SampleSpec, source: Source) -> Conditioned:
    task = source_task(sample.task, source)
    if not isinstance(task, Conditioned):
        raise UserError(
            f"data.encoded: the crop, flip or text of source '{source.name}' is drawn again in every epoch, so nothing"
            " of it can be stored; remove data.encoded"
        )
    return task


def _begin(directory: Path, made_of: MadeOf, sources: Sequence[tuple[Source, list[str]]]) -> dict[str, Any]:
    """Return the manifest to continue with. Entries for other weights, or for shards that changed, are removed."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.encoded: {directory} cannot be created ({error.strerror})") from None
    path = directory / MANIFEST
    old = read_manifest(path)
    manifest: dict[str, Any] = {"version": VERSION, "made_of": made_of, "sources": {}}
    if old is not None and old["made_of"] == made_of:
        now = {source.name: source_digest(source, shards) for source, shards in sources}
        manifest["sources"] = {name: value for name, value in old["sources"].items() if now.get(name, value) == value}
    if old is not None and (old["made_of"] != made_of or old["sources"] != manifest["sources"]):
        _log.info("%s: was made from other inputs and is encoded again", directory)
        path.unlink()  # without a manifest, the directory is refused until it is complete again
    return manifest


class _Writer:
    """Writes the files of one source."""

    def __init__(
        self,
        directory: Path,
        source: Source,
        shards: Sequence[str],
        key: str,
        stage: Stage,
        task: Conditioned,
    ):
        self.directory, self.source, self.shards, self.key = directory, source, shards, key
        self.layers, self.encoding, self.task = stage.layers, _encoding(stage), task
        self.sample = stage.sample.of_source(source)

    def write(self, micro_batch: int) -> None:
        """Write the files that do not exist yet."""
        for number, shard in enumerate(self.shards):
            path = self.directory / file_name(self.source.name, number)
            if not is_whole(path, self.key, source_digest(self.source, [shard])):
                self._write_shard(path, shard, micro_batch)
        path = self.directory / file_name(self.source.name, None)
        if not self.task.illustrated and not is_whole(path, self.key, source_digest(self.source, self.shards)):
            self._write_prompts(path, micro_batch)

    def _write_shard(self, path: Path, shard: str, micro_batch: int) -> None:
        """Write the picture slots of every sample and, if its prompts have pictures, the states of each prompt."""
        encoding, illustrated = self.encoding, self.task.illustrated
        states = PromptStates(encoding.states) if illustrated else None
        first_pass = Subprogram(self.layers, (*encoding.pictures, *(encoding.states if illustrated else ())))
        states_pass = Subprogram(self.layers, encoding.states)
        pictures: dict[str, list[Tensor]] = {name: [] for name in encoding.pictures}
        bad: dict[str, str] = {}
        for batch in _batches(shard, micro_batch):
            numbers = [number for number, _ in batch]
            side = self.sample.image_size
            images, prompts = torch.zeros(micro_batch, len(self.task.sides), 3, side, side), [[]] * micro_batch
            for row, (number, members) in enumerate(batch):
                try:
                    images[row] = torch.from_numpy(self.task.pictures(members, self.sample))
                    prompts[row] = self.task.prompts(members, self.sample) if illustrated else []
                except BadSample as error:
                    bad[str(number)] = str(error)
            # A micro-batch holds one prompt per sample, as in training, so the k-th pass runs the k-th prompt of each.
            for k in range(max(1, *map(len, prompts))):
                rows = [of_sample[k] if len(of_sample) > k else None for of_sample in prompts]
                outputs = (first_pass if k == 0 else states_pass)(self._slots(rows, images=images))
                if states is not None:
                    states.add(outputs, rows, numbers)
                for name in pictures if k == 0 else ():
                    pictures[name].append(outputs[name][: len(batch)].cpu())
        tensors = {name: torch.cat(values) for name, values in pictures.items()}
        save(path, self.key, source_digest(self.source, [shard]), tensors, states, bad)
        _log.info("%s: %d samples, %d of them bad", path, len(read_index(shard)), len(bad))

    def _write_prompts(self, path: Path, micro_batch: int) -> None:
        """Write the states of every prompt that the samples of the source can have."""
        distinct: dict[bytes, np.ndarray] = {}
        for _, members in (sample for shard in self.shards for batch in _batches(shard, 1) for sample in batch):
            with contextlib.suppress(BadSample):
                distinct |= {tokens.tobytes(): tokens for tokens in self.task.prompts(members, self.sample)}
        run = Subprogram(self.layers, self.encoding.states, given=self.encoding.without_pictures)
        states = PromptStates(self.encoding.states)
        prompts = list(distinct.values())
        for first in range(0, len(prompts), micro_batch):
            rows = prompts[first : first + micro_batch]
            blank = {name: torch.zeros(len(rows), *shape) for name, shape in self.encoding.without_pictures.items()}
            states.add(run(self._slots(rows, **blank)), rows, None)
        save(path, self.key, source_digest(self.source, self.shards), {}, states, {})
        _log.info("%s: %d prompts", path, len(prompts))

    def _slots(self, rows: Sequence[np.ndarray | None], **pictures: Tensor) -> dict[str, Tensor]:
        """Return the slots of prompts and pictures on the device; a row without a prompt has one token."""
        tokens = [np.zeros(1, np.int64) if row is None else row for row in rows]
        prompts = {"tokens": np.concatenate(tokens), "lengths": np.array([len(row) for row in tokens])}
        slots = {**{name: torch.from_numpy(array) for name, array in prompts.items()}, **pictures}
        return {name: value.to(device_type()) for name, value in slots.items()}


def _batches(shard: str, size: int) -> Iterator[list[tuple[int, Members]]]:
    """Yield the samples of a shard as (number in the shard, members), `size` at a time."""
    reader, index = ShardReader(shard), read_index(shard)
    check_fresh(shard, index.tar_bytes, reader.size_bytes)

    def members(number: int) -> Members:
        table = index.members(number)
        return Members(tuple(table), lambda extension: reader.read_member(*table[extension]))

    try:
        for first in range(0, len(index), size):
            yield [(number, members(number)) for number in range(first, min(first + size, len(index)))]
    finally:
        reader.close()
