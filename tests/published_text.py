"""The tokenizer of InternVL3 with its real vocabulary, kept for later sessions: building it takes seconds."""

from __future__ import annotations

from pathlib import Path

from spar_scale.runs.rehearsal.text import RANKS_SHA256, build_tokenizer


def published_tokenizer(cache: Path) -> Path:
    """Return the path of `tokenizer.json` under `cache`; it is built where it is not there."""
    path = cache / RANKS_SHA256[:12] / "tokenizer.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".new")
        build_tokenizer().save(str(temporary))
        temporary.rename(path)
    return path


def write_published(directory: Path, cache: Path) -> None:
    """Put the tokenizer into the directory of a language model."""
    (directory / "tokenizer.json").write_bytes(published_tokenizer(cache).read_bytes())
