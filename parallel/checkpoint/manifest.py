"""The manifest of a checkpoint, which makes damage detectable.

`manifest.json` lists every file with its size and sha256 and every key with its shape and dtype, and holds the run's
state (JSON) and a hash of itself. A directory is a checkpoint if its name has the form `step-00000100` and its manifest
is intact; the checkpoint is intact if every listed file is.

`referenced-by.json` beside it lists the runs that start from this checkpoint; pruning does not remove it then.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from parallel.errors import UserError
from parallel.files import write_file

FORMAT = 1
MANIFEST = "manifest.json"
REFERENCES = "referenced-by.json"
_STEP = re.compile(r"step-(\d{8,})")
_CHUNK_BYTES = 4 << 20
LOCK_S = 60.0  # longest wait for another run that writes referenced-by.json


@dataclass(frozen=True)
class FileRecord:
    """The size and hash of a file of the checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class KeyRecord:
    """A global tensor in the files; `kind` is None for a whole tensor."""

    shape: tuple[int, ...]
    dtype: str
    kind: str | None


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`."""

    step: int
    files: dict[str, FileRecord]
    keys: dict[str, KeyRecord]
    state: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write the manifest into `folder`, atomically."""
        body = asdict(self)
        text = json.dumps({"format": FORMAT, "sha256": _hash_of(body), "body": body}, separators=(",", ":"))
        write_file(folder / MANIFEST, text + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a checkpoint. Raises UserError with the file and its fault."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        version, body = content["format"], content["body"]
        if version != FORMAT:
            raise UserError(
                f"{path}: format {version}, this version reads format {FORMAT}; use the version that wrote it"
            )
        if content["sha256"] != _hash_of(body):
            raise UserError(f"{path}: damaged (its content does not match its sha256)")
        files = {name: FileRecord(**record) for name, record in body["files"].items()}
        keys = {
            name: KeyRecord(tuple(record["shape"]), record["dtype"], record["kind"])
            for name, record in body["keys"].items()
        }
        manifest = Manifest(int(body["step"]), files, keys, body["state"])
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: unreadable ({type(error).__name__}: {error})") from error
    outside = [name for name in files if Path(name).name != name]
    if outside:  # a path such as ../x would be read and hashed outside the checkpoint
        raise UserError(f"{path}: '{outside[0]}' is not the name of a file in the checkpoint")
    if step_of(folder) not in (None, manifest.step):
        raise UserError(f"{path}: is of step {manifest.step}, but the directory is named {folder.name}")
    return manifest


def check_files(folder: Path, manifest: Manifest, rank: int = 0, size: int = 1) -> None:
    """Check every `size`-th listed file from `rank` on. Raises UserError with the first damaged file and its fault."""
    for name, record in sorted(manifest.files.items())[rank::size]:
        path = folder / name
        try:
            num_bytes = path.stat().st_size
            if num_bytes != record.bytes:
                raise UserError(f"{path}: found {num_bytes} bytes, the manifest has {record.bytes}")
            if sha256_of(path) != record.sha256:
                raise UserError(f"{path}: damaged (sha256 differs from the manifest's)")
        except FileNotFoundError:
            raise UserError(f"{path}: missing") from None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from error


def manifest_hash(folder: Path) -> str:
    """Return the sha256 of the manifest, which identifies the whole content of a checkpoint."""
    read_manifest(folder)
    return sha256_of(folder / MANIFEST)


def protect(folder: Path, by: str) -> None:
    """Note that the run `by` refers to this checkpoint, so that pruning keeps it. Raises UserError if that fails."""
    read_manifest(folder)
    if by in references(folder):
        return
    try:
        # Locked, because runs that start at the same time would overwrite each other's names.
        with (folder / MANIFEST).open("r+") as locked:
            _lock(locked)
            write_file(folder / REFERENCES, json.dumps([*references(folder), by]) + "\n")
    except OSError as error:
        raise UserError(f"{folder / REFERENCES}: {error.strerror or error}") from error


def _lock(file: IO[str]) -> None:
    """Lock a file. Raises UserError if another process holds the lock for LOCK_S."""
    until = time.monotonic() + LOCK_S
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise UserError(
                    f"{file.name}: locked by another process for {LOCK_S:g} s; end the run that hangs there, or start "
                    "again"
                ) from None
        time.sleep(0.05)


def references(folder: Path) -> list[str]:
    """Return the runs that refer to this checkpoint; an unreadable list counts as one unknown run."""
    try:
        names = json.loads((folder / REFERENCES).read_text(encoding="utf-8"))
        return [str(name) for name in names]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError):
        return ["unknown"]


def step_name(step: int) -> str:
    """Return the name of a checkpoint directory, such as `step-00000100`."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """Return the step in the name of a checkpoint directory, or None for another name."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def list_checkpoints(root: Path) -> list[Path]:
    """Return the directories in `root` whose names are those of checkpoints, newest first, intact or damaged."""
    if not root.is_dir():
        return []
    steps = [(step, path) for path in root.iterdir() if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(steps, reverse=True)]


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, reading it in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def check_json(value: Any, place: str) -> None:
    """Raise TypeError, with its dotted key, for the first value that JSON would change (tuple, int key, tensor)."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{place}: the key {key!r} is not a string")
            check_json(item, f"{place}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_json(item, f"{place}[{index}]")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise TypeError(f"{place}: {type(value).__name__} does not survive JSON; use str, int, float, bool, list, dict")


def _hash_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
