"""The manifest of a checkpoint: the only thing a reader trusts.

`manifest.json` lists every file with its size and sha256, every key with its shape and dtype, and holds the
run's state (JSON). It carries a hash of itself. A directory is a checkpoint if it is named `step-00000100`
and its manifest is sound; it is undamaged if every listed file is. `latest` is for people.

`referenced-by.json` beside it names the runs that start from this checkpoint; pruning leaves it alone.
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
LOCK_S = 60.0  # the longest wait for another run that notes its name


@dataclass(frozen=True)
class FileRecord:
    """What a file of the checkpoint must be."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class KeyRecord:
    """A global tensor in the files; `kind` is None for a whole tensor that is no parameter's."""

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
        """Write it into `folder`: temporary name, flush to disk, rename."""
        body = asdict(self)
        text = json.dumps({"format": FORMAT, "sha256": _hash_of(body), "body": body}, separators=(",", ":"))
        write_file(folder / MANIFEST, text + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a checkpoint; raises UserError naming the file and what is wrong with it."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        version, body = content["format"], content["body"]
        if version != FORMAT:
            raise UserError(
                f"{path}: format {version}, this version reads format {FORMAT}; use the version that wrote it"
            )
        if content["sha256"] != _hash_of(body):
            raise UserError(f"{path}: damaged (its sha256 is not the one it states)")
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
    strange = [name for name in files if Path(name).name != name]
    if strange:
        raise UserError(f"{path}: '{strange[0]}' is not the name of a file in the checkpoint")
    if step_of(folder) not in (None, manifest.step):
        raise UserError(f"{path}: is of step {manifest.step}, the directory is named {folder.name}")
    return manifest


def check_files(folder: Path, manifest: Manifest, rank: int = 0, size: int = 1) -> None:
    """Check every `size`-th listed file from `rank` on; raises UserError naming the first damaged one and why."""
    for name, record in sorted(manifest.files.items())[rank::size]:
        path = folder / name
        try:
            found = path.stat().st_size
            if found != record.bytes:
                raise UserError(f"{path}: {found} bytes, the manifest says {record.bytes}")
            if sha256_of(path) != record.sha256:
                raise UserError(f"{path}: damaged (sha256 differs from the manifest's)")
        except FileNotFoundError:
            raise UserError(f"{path}: missing") from None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from error


def manifest_hash(folder: Path) -> str:
    """Return the sha256 of the manifest, which names a checkpoint's whole content."""
    read_manifest(folder)
    return sha256_of(folder / MANIFEST)


def protect(folder: Path, by: str) -> None:
    """Note that the run `by` refers to this checkpoint, so that pruning leaves it; raises UserError if it cannot be."""
    read_manifest(folder)
    if by in references(folder):
        return
    try:
        with (folder / MANIFEST).open("r+") as held:  # runs that start together add their names one after another
            _lock(held)
            write_file(folder / REFERENCES, json.dumps([*references(folder), by]) + "\n")
    except OSError as error:
        raise UserError(f"{folder / REFERENCES}: {error.strerror or error}") from error


def _lock(file: IO[str]) -> None:
    """Lock a file; UserError where another process has held it for LOCK_S."""
    until = time.monotonic() + LOCK_S
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise UserError(
                    f"{file.name}: found locked by another process for {LOCK_S:g} s, must be free; end the run that "
                    "hangs there, or start again"
                ) from None
        time.sleep(0.05)


def references(folder: Path) -> list[str]:
    """Return the runs that refer to this checkpoint; a list that cannot be read counts as one unknown run."""
    try:
        names = json.loads((folder / REFERENCES).read_text(encoding="utf-8"))
        return [str(name) for name in names]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError):
        return ["unknown"]


def step_name(step: int) -> str:
    """`step-00000100`."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """Return the step a checkpoint directory's name states, None for another name."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def list_checkpoints(root: Path) -> list[Path]:
    """Return the directories named like checkpoints in `root`, newest first, undamaged or not."""
    if not root.is_dir():
        return []
    found = [(step, path) for path in root.iterdir() if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def sha256_of(path: Path) -> str:
    """Hash a file without holding it in memory."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def check_json(value: Any, place: str) -> None:
    """Raise TypeError with the dotted place of the first thing JSON would change (tuples, int keys, tensors)."""
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
