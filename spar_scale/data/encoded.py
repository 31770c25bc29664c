"""What `spar-scale data encode` stored, read sample by sample in place of computing it.

A directory holds a manifest and, for each shard, one safetensors file (memory-mapped, never pickled): of
each sample the slots of its pictures, and for prompts that show a picture the states of their tokens.
Prompts of words alone recur over all shards, so a source keeps theirs in one file. A token's state
depends on the tokens up to it, so it is stored once for each distinct beginning of a prompt.

`made_of` lists what the values follow from: hashes of the weights, preset, precision, lengths. It stands
in the manifest, which is written last, and its hash in every file: a directory that was half written or
made by other weights is refused before training starts, with what differs.
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
from spar_scale.data.tar_index import digest

MANIFEST = "manifest.json"
VERSION = 1
MadeOf = dict[str, Any]


class Encoded:
    """A directory of stored values that was made of `made_of`, for the shards of some sources.

    `sources` maps a source's name to its shards. `command` is what encodes anew. Raises UserError for a
    directory without a manifest, one made of other things or of other shards, and a missing file.
    """

    def __init__(self, directory: Path, made_of: MadeOf, sources: Mapping[str, Sequence[str]], command: str):
        self.directory, self.command = directory, command
        path = directory / MANIFEST
        manifest = read_manifest(path)
        if manifest is None:
            raise UserError(f"data.encoded: there is no {path}; run `{command}`")
        there: MadeOf = manifest["made_of"]
        if differing := differences(there, made_of):
            raise UserError(f"data.encoded: {path} was made of other things ({differing}); run `{command}`")
        self.key = hash_of(there)
        for source, shards in sources.items():
            if manifest["sources"].get(source) != digest(shards):
                found = "other shards" if source in manifest["sources"] else "no shards"
                raise UserError(f"data.encoded: {path} is of {found} of source '{source}'; run `{command}`")
        opened = {name: [self.shard(name, number) for number in range(len(shards))] for name, shards in sources.items()}
        self._first = {name: shards[0] for name, shards in opened.items()}

    def empty(self, source: str, batch: int, length: int) -> dict[str, Tensor]:
        """Zeros for every slot: pictures (B, ...), states (B, P, D) of prompts of up to `length` tokens."""
        own, prompts = self._first[source].own, self._first[source].prompts
        pictures = {name: own.tensors[name].new_zeros(batch, *own.tensors[name].shape[1:]) for name in own.pictures}
        states = prompts.tensors["states"]
        return pictures | {name: states.new_zeros(batch, length, states.shape[2]) for name in prompts.states}

    def shard(self, source: str, number: int) -> EncodedShard:
        """Open the stored values of a source's shard; a worker does so by itself."""
        own = Stored(self.directory / file_name(source, number), self.key, self.command)
        prompts = own if own.states else Stored(self.directory / file_name(source, None), self.key, self.command)
        return EncodedShard(own, prompts, self.command)


class Stored:
    """One file. Its tensors are memory-mapped, so opening costs nothing until a value is read."""

    def __init__(self, path: Path, key: str, command: str):
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"data.encoded: {path} cannot be read ({error}); run `{command}`") from None
        if metadata.get("made_of") != key:
            raise UserError(f"data.encoded: {path} was made of other things than its manifest says; run `{command}`")
        self.bad: dict[str, str] = json.loads(metadata["bad"])
        self.pictures: list[str] = json.loads(metadata["pictures"])
        self.states: list[str] = json.loads(metadata["states"])


class EncodedShard:
    """The stored values of a shard's samples: `own` holds those of their pictures, `prompts` those of prompts."""

    def __init__(self, own: Stored, prompts: Stored, command: str):
        self.own, self.prompts, self.command = own, prompts, command
        self._places: dict[bytes, int] | None = None

    def fill(self, slots: Mapping[str, Tensor], row: int, member: int, tokens: np.ndarray) -> None:
        """Write a sample's values into row `row` of the slots; `tokens` (n,) are its prompt's, without padding.

        Raises BadSample for pictures that could not be read when they were encoded.
        """
        if str(member) in self.own.bad:
            raise BadSample(self.own.bad[str(member)])
        for name in self.own.pictures:
            slots[name][row] = self.own.tensors[name][member]
        states = self.prompts.tensors["states"][self._rows(member, tokens)]
        for name, values in zip(self.prompts.states, states.unbind(1), strict=True):
            slots[name][row, : len(tokens)] = values

    def _rows(self, member: int, tokens: np.ndarray) -> Tensor:
        """Where the states of each of a prompt's tokens stand."""
        stored = self.prompts.tensors
        if self._places is None:
            self._places = {key.tobytes(): place for place, key in enumerate(stored["keys"].numpy())}
        place = self._places.get(prompt_key(tokens, member if self.prompts is self.own else None))
        if place is None:
            raise UserError(
                f"data.encoded: {self.prompts.path} does not know the prompt of sample {member}; run `{self.command}`"
            )
        return stored["rows"][stored["first"][place] : stored["first"][place + 1]]


class PromptStates:
    """States of prompts on their way to a file: one row (K, D) for each distinct beginning of a prompt."""

    def __init__(self, slots: Sequence[str]):
        self.slots = slots
        self._row_of: dict[tuple[int | None, bytes], int] = {}
        self._states: list[Tensor] = []
        self._keys: list[bytes] = []
        self._rows: list[list[int]] = []

    def add(self, found: Mapping[str, Tensor], said: Mapping[int, np.ndarray], members: Sequence[int] | None) -> None:
        """Add a batch: row -> the tokens (n,) of its prompt, and the slots (B, P, D) of their states.

        `members` are the rows' samples where the prompts show their pictures.
        """
        stacked = torch.stack([found[name] for name in self.slots], dim=2).cpu()
        self._states.append(stacked[0, :0])
        for row, tokens in said.items():
            member = None if members is None else members[row]
            beginnings = [(member, tokens[: end + 1].tobytes()) for end in range(len(tokens))]
            added = [end for end, beginning in enumerate(beginnings) if beginning not in self._row_of]
            self._row_of |= {beginnings[end]: len(self._row_of) + n for n, end in enumerate(added)}
            self._states.append(stacked[row, added])
            self._keys.append(prompt_key(tokens, member))
            self._rows.append([self._row_of[beginning] for beginning in beginnings])

    def tensors(self) -> dict[str, Tensor]:
        """`states` (T, K, D); `keys` (n, 16) of the prompts, whose tokens' rows are `rows[first[i]:first[i + 1]]`."""
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
    """Write one file, atomically: of shards with this digest, made of what `key` is the hash of."""
    tensors = pictures | ({} if states is None else states.tensors())
    metadata = {"made_of": key, "shards": shards, "bad": json.dumps(bad), "pictures": json.dumps(list(pictures))}
    metadata["states"] = json.dumps([] if states is None else list(states.slots))
    try:
        with replaced(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be written ({error})") from None


def is_whole(path: Path, key: str, shards: str) -> bool:
    """Whether a file is there that was made of what `key` is the hash of, and of these shards."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        return False
    return metadata.get("made_of") == key and metadata.get("shards") == shards


def prompt_key(tokens: np.ndarray, member: int | None) -> bytes:
    """What a prompt is found by: its tokens (n,) int64, and its sample where it shows that one's picture."""
    return hashlib.sha256(f"{member}\0".encode() + tokens.tobytes()).digest()[:16]


def differences(there: MadeOf, wanted: MadeOf) -> str:
    """Return what was asked for and is not there, as text; empty where all is."""
    names = [name for name in wanted if there.get(name) != wanted[name]]
    return ", ".join(f"{name} {_short(there.get(name))} there, {_short(wanted[name])} here" for name in names)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Return a manifest, None where there is none. UserError for what is none of ours or of another version."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["version"] != VERSION:
            raise UserError(f"data.encoded: {path} has version {manifest['version']}, this program reads {VERSION}")
        return {"made_of": dict(manifest["made_of"]), "sources": dict(manifest["sources"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"data.encoded: {path} is no manifest ({error}); delete the directory") from None


def hash_of(made_of: MadeOf) -> str:
    """The hash that stands in every file."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def file_name(source: str, number: int | None) -> str:
    """The file of a source's shard, or of its prompts of words alone."""
    return f"{source}-{'prompts' if number is None else f'{number:05d}'}.safetensors"


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text[:12] + "..." if len(text) == 64 else text
