"""Stored values of the frozen parts, written by `spar-scale data encode` and read sample by sample.

A directory holds a manifest and one safetensors file per shard (memory-mapped, never pickled). A file holds the picture
slots of each sample and, for prompts with a picture, the hidden states of their tokens. Prompts without a picture recur
in all shards, so one file per source holds their states. The state of a token depends only on the tokens up to it, so
it is stored once per distinct prompt prefix.

`made_of` lists everything that determines the values: hashes of the weights, preset, precision, lengths. It is in the
manifest, which is written last, and its hash is in every file. A directory that is incomplete or was made from other
weights is refused before training starts, with a message that lists the differences.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from parallel.errors import UserError
from parallel.files import replaced
from spar_scale.data.images import BadSample
from spar_scale.data.spec import Source
from spar_scale.data.tar_index import digest

MANIFEST = "manifest.json"
VERSION = 1
MadeOf = dict[str, Any]


class Encoded:
    """A directory of stored values that was made from `made_of`, for the shards of some sources.

    `sources` are the sources with their shards. `command` is the command that encodes again; messages name it. Raises
    UserError for a directory without a manifest, one made from other inputs or shards, and a missing file.
    """

    def __init__(self, directory: Path, made_of: MadeOf, sources: Sequence[tuple[Source, list[str]]], command: str):
        self.directory, self.command = directory, command
        path = directory / MANIFEST
        manifest = read_manifest(path)
        if manifest is None:
            raise UserError(f"data.encoded: there is no {path}; run `{command}`")
        stored: MadeOf = manifest["made_of"]
        if differing := differences(stored, made_of):
            raise UserError(f"data.encoded: {path} was made from other inputs ({differing}); run `{command}`")
        self.key = hash_of(stored)
        check_sources(path, manifest, sources, command)
        opened = {one.name: [self.shard(one.name, number) for number in range(len(group))] for one, group in sources}
        self._first = {name: shards[0] for name, shards in opened.items()}

    def empty(self, source: str, batch: int) -> dict[str, Tensor]:
        """Return zeros for every slot of pictures (B, ...)."""
        samples = self._first[source].samples
        return {
            name: samples.tensors[name].new_zeros(batch, *samples.tensors[name].shape[1:]) for name in samples.pictures
        }

    def token_states(self, source: str) -> dict[str, Tensor]:
        """Return zeros for every slot of a prompt's states, (1, D) of one token."""
        prompts = self._first[source].prompts
        return {name: torch.zeros_like(prompts.tensors["states"][:1, 0]) for name in prompts.states}

    def shard(self, source: str, number: int) -> EncodedShard:
        """Open the stored values of a source's shard; each worker process opens its own."""
        samples = EncodedFile(self.directory / file_name(source, number), self.key, self.command)
        if samples.states:
            return EncodedShard(samples, samples, self.command)
        prompts = EncodedFile(self.directory / file_name(source, None), self.key, self.command)
        return EncodedShard(samples, prompts, self.command)


class EncodedFile:
    """One file of stored values. Its tensors are memory-mapped, so opening reads no values."""

    def __init__(self, path: Path, key: str, command: str):
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"data.encoded: {path} cannot be read ({error}); run `{command}`") from None
        if metadata.get("made_of") != key:
            raise UserError(f"data.encoded: {path} was made from other inputs than its manifest; run `{command}`")
        self.bad: dict[str, str] = json.loads(metadata["bad"])
        self.pictures: list[str] = json.loads(metadata["pictures"])
        self.states: list[str] = json.loads(metadata["states"])


class EncodedShard:
    """The stored values of a shard's samples: `samples` is the file with their pictures, `prompts` that with states.

    Both are the same file if the prompts have pictures.
    """

    def __init__(self, samples: EncodedFile, prompts: EncodedFile, command: str):
        self.samples, self.prompts, self.command = samples, prompts, command
        self._prompt_numbers: dict[bytes, int] | None = None

    def fill(self, slots: Mapping[str, Tensor], row: int, member: int, tokens: np.ndarray) -> dict[str, Tensor]:
        """Write the values of sample `member`'s pictures into row `row` of the slots; return the states of its prompt.

        `tokens` (n,) is the prompt; a slot of states is (n, D). Raises BadSample if `data encode` could not read the
        sample's pictures.
        """
        if str(member) in self.samples.bad:
            raise BadSample(self.samples.bad[str(member)])
        for name in self.samples.pictures:
            slots[name][row] = self.samples.tensors[name][member]
        states = self.prompts.tensors["states"][self._state_rows(member, tokens)]
        return dict(zip(self.prompts.states, states.unbind(1), strict=True))

    def _state_rows(self, member: int, tokens: np.ndarray) -> Tensor:
        """Return the row of `states` for each token of a prompt, (n,) int64."""
        stored = self.prompts.tensors
        if self._prompt_numbers is None:
            self._prompt_numbers = {key.tobytes(): number for number, key in enumerate(stored["keys"].numpy())}
        number = self._prompt_numbers.get(prompt_key(tokens, member if self.prompts is self.samples else None))
        if number is None:
            raise UserError(
                f"data.encoded: {self.prompts.path} does not hold the prompt of sample {member}; run `{self.command}`"
            )
        return stored["rows"][stored["first"][number] : stored["first"][number + 1]]


class PromptStates:
    """Collects states of prompts for a file: one row (K, D) per distinct prompt prefix, K the number of slots."""

    def __init__(self, slots: Sequence[str]):
        self.slots = slots
        self._row_of: dict[tuple[int | None, bytes], int] = {}
        self._states: list[Tensor] = []
        self._keys: list[bytes] = []
        self._rows: list[list[int]] = []

    def add(
        self, states: Mapping[str, Tensor], rows: Sequence[np.ndarray | None], members: Sequence[int] | None
    ) -> None:
        """Add the prompts of a micro-batch: `states` maps a slot to (T, D), the tokens of all rows.

        `rows` are the tokens (n,) of each; a row without a prompt has one token. `members` are the sample numbers of
        the rows if the prompts have pictures, else None.
        """
        stacked = torch.stack([states[name] for name in self.slots], dim=1).cpu()
        self._states.append(stacked[:0])  # gives `states` its shape and dtype even if no prompt is added
        of_rows = stacked.split([1 if tokens is None else len(tokens) for tokens in rows])
        for row, (tokens, of_row) in enumerate(zip(rows, of_rows, strict=True)):
            if tokens is None:
                continue
            member = None if members is None else members[row]
            prefixes = [(member, tokens[: end + 1].tobytes()) for end in range(len(tokens))]
            new_ends = [end for end, prefix in enumerate(prefixes) if prefix not in self._row_of]
            self._row_of |= {prefixes[end]: len(self._row_of) + n for n, end in enumerate(new_ends)}
            self._states.append(of_row[new_ends])
            self._keys.append(prompt_key(tokens, member))
            self._rows.append([self._row_of[prefix] for prefix in prefixes])

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the file: `states` (T, K, D), `keys` (n, 16) of the prompts, `rows` and `first`.

        The tokens of prompt i have their states in `rows[first[i]:first[i + 1]]`.
        """
        keys = np.frombuffer(b"".join(self._keys), np.uint8).reshape(-1, 16)
        return {
            "states": torch.cat(self._states),
            "keys": torch.from_numpy(keys.copy()),
            "rows": torch.tensor([row for rows in self._rows for row in rows], dtype=torch.int64),
            "first": torch.from_numpy(np.cumsum([0, *(len(rows) for rows in self._rows)])),
        }


def save(
    path: Path, key: str, shards: str, pictures: dict[str, Tensor], states: PromptStates | None, bad: dict[str, str]
) -> None:
    """Write one file atomically; `key` is the hash of `made_of`, `shards` the digest of the encoded shards."""
    tensors = pictures | ({} if states is None else states.tensors())
    metadata = {"made_of": key, "shards": shards, "bad": json.dumps(bad), "pictures": json.dumps(list(pictures))}
    metadata["states"] = json.dumps([] if states is None else list(states.slots))
    try:
        with replaced(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be written ({error})") from None


def is_whole(path: Path, key: str, shards: str) -> bool:
    """Return whether a complete file exists with this hash of `made_of` and this digest of shards."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        return False
    return metadata.get("made_of") == key and metadata.get("shards") == shards


def prompt_key(tokens: np.ndarray, member: int | None) -> bytes:
    """Return the lookup key of a prompt: a hash of its tokens (n,) int64 and, if it has a picture, its sample."""
    return hashlib.sha256(f"{member}\0".encode() + tokens.tobytes()).digest()[:16]


def differences(stored: MadeOf, expected: MadeOf) -> str:
    """Return the entries of `expected` that differ in `stored`, as text; '' if there are none."""
    names = [name for name in expected if stored.get(name) != expected[name]]
    return ", ".join(f"{name}: found {_short(stored.get(name))}, expected {_short(expected[name])}" for name in names)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Return a manifest, or None if there is none. Raises UserError if it is damaged or has another version."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["version"] != VERSION:
            raise UserError(f"data.encoded: {path} has version {manifest['version']}, this program reads {VERSION}")
        return {"made_of": dict(manifest["made_of"]), "sources": dict(manifest["sources"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"data.encoded: {path} is not a manifest ({error}); delete the directory") from None


def source_digest(source: Source, shards: Sequence[str]) -> str:
    """Return the digest of a source's shards, and of how the recipe has them read."""
    read_as = (source.task or source.name, source.fit, *source.texts)
    return hashlib.sha256(json.dumps([digest(shards), *read_as]).encode()).hexdigest()


def check_sources(
    path: Path, manifest: dict[str, Any], sources: Sequence[tuple[Source, list[str]]], command: str
) -> None:
    """Raise UserError unless the manifest at `path` is of these sources."""
    for source, shards in sources:
        found = manifest["sources"].get(source.name)
        if found != source_digest(source, shards):
            which, read = ("no shards", "") if found is None else ("other shards", " or with another task, text or fit")
            raise UserError(
                f"data.encoded: {path} was made from {which} of source '{source.name}'{read}; run `{command}`"
            )


def hash_of(made_of: MadeOf) -> str:
    """Return the hash of `made_of` that every file holds."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def file_name(source: str, number: int | None) -> str:
    """Return the file name of a source's shard; with None, of the source's prompts without pictures."""
    return f"{source}-{'prompts' if number is None else f'{number:05d}'}.safetensors"


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text[:12] + "..." if len(text) == 64 else text
