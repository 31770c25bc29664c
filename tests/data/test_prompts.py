"""What the language model reads: prompts word by word, the tokenizer, and tasks mixed by source."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from packed import samples

from parallel.errors import UserError
from spar_scale.data.loader import Loader, Source
from spar_scale.data.order import draw_generator
from spar_scale.data.prompts import (
    TOKENS,
    build_tokenizer,
    caption_prompt,
    edit_prompt,
    miniature_text,
    question_prompt,
    text_prompt,
)
from spar_scale.data.spec import SampleSpec
from spar_scale.models.presets import PRESETS
from spar_scale.stages.bootstrap_mllm import NUM_TOKENS

TEXT = miniature_text()
SPEC = SampleSpec("language", 16, task_tokens=NUM_TOKENS, image_tokens=16, text=TEXT)
decode = TEXT.decode
PICTURE = "<img> <IMG_CONTEXT> <IMG_CONTEXT> </img>"
SAID = {
    "captions": ["a red circle on the left"],
    "output_captions": ["a blue circle on the left"],
    "instruction": "make the circle blue",
    "questions": [{"type": "color", "question": "what color is the circle ?", "answer": "red"}],
}
PROMPTS = {
    "caption": (
        caption_prompt,
        f"<bos> {PICTURE} describe : [a red circle on the left <eos>]",
    ),
    "question": (
        question_prompt,
        f"<bos> {PICTURE} question : what color is the circle ? answer : [red .]",
    ),
    "edit": (
        edit_prompt,
        f"<bos> {PICTURE} edit : make the circle blue describe : [a blue circle on the left <eos>]",
    ),
    "text": (
        text_prompt,
        "<bos> draw : a red circle on the left question : what color is the circle ? answer : [red .] describe : "
        "[a red circle on the left <eos>]",
    ),
}
MEMBERS = {"questions": "scenes", "captions": "scenes", "edits": "edits", "texts": "scenes"}


def draws(number=0):
    return draw_generator(0, "words", number)


def read(world, micro_batch=10, rank=0, size=1, sources=("captions", "questions", "edits", "texts")):
    given = [Source(name, str(world / f"{MEMBERS.get(name, 'scenes')}-*.tar")) for name in sources]
    return list(Loader(given, SPEC, 0, 40, 10, micro_batch, rank, size, 0, 0, 3))


@pytest.mark.parametrize("case", PROMPTS)
def test_a_prompt_says_this_and_counts_what_stands_in_brackets(case):
    make, expected = PROMPTS[case]
    prompt = make(TEXT, SAID, draws(), 2)
    counts, inside = [], 0
    for word in expected.split():
        inside |= word.startswith("[")
        counts.append(int(inside))
        inside &= not word.endswith("]")
    assert decode(prompt.tokens) == expected.replace("[", "").replace("]", "")
    assert prompt.counts == counts


def test_three_questions_are_of_three_types_and_all_come_up():
    kinds = [("color", "red"), ("where", "left"), ("exist", "yes"), ("exist", "no"), ("exist", "one")]
    listed = [{"type": kind, "question": "where is the circle ?", "answer": answer} for kind, answer in kinds]
    asked = [question_prompt(TEXT, {"questions": listed}, draws(n), 0) for n in range(60)]
    answers = [
        {word for word in decode(p.tokens).split() if word in {"red", "left", "yes", "no", "one"}} for p in asked
    ]
    assert all(len(said) == 3 and {"red", "left"} < said for said in answers)
    assert set.union(*answers) == {"red", "left", "yes", "no", "one"}
    assert len({decode(p.tokens) for p in asked}) > 3  # their order is drawn too


def test_a_caption_is_one_of_those_that_say_most():
    said = {"captions": ["a red circle above a cyan square", "a cyan square below a red circle", "red", "cyan"]}
    seen = {decode([t for t, c in zip(p.tokens, p.counts, strict=True) if c]) for n in range(30)
            for p in [caption_prompt(TEXT, said, draws(n), 0)]}  # fmt: skip
    assert seen == {f"{caption} <eos>" for caption in said["captions"][:2]}


def test_the_saved_tokenizer_reads_as_the_loader_does(tmp_path):
    from transformers import AutoTokenizer

    build_tokenizer().save_pretrained(str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    text = PROMPTS["text"][1].replace("[", "").replace("]", "").replace("<bos>", f"<bos> {PICTURE}")
    tokens = [TOKENS[word] for word in text.split()]
    assert tokenizer(text)["input_ids"] == tokens
    assert tokenizer.decode(tokens) == text
    assert tokenizer.get_vocab() == TOKENS
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    with pytest.raises(Exception, match="UNK"):  # no word is silently another
        tokenizer("a mauve circle")


def test_unknown_words_are_named_with_the_nearest_known():
    with pytest.raises(UserError, match=r"^unknown words: 'colour'; did you mean 'color'\?, 'zzz'; known are circle "):
        TEXT.encode("what colour is the zzz zzz")


def test_the_preset_has_room_for_every_word_and_knows_the_image_token():
    assert PRESETS["tiny"].language.image_token_id == TOKENS["<IMG_CONTEXT>"]
    assert len(TOKENS) <= PRESETS["tiny"].language.vocab_size


def test_each_source_is_decoded_by_the_task_of_its_name(tiny_world):
    marks = {"describe": "captions", "question": "questions", "edit": "edits", "draw": "texts"}
    seen = set()
    for batch in read(tiny_world):
        assert batch["errors"] == [] and batch["tokens"].dtype == torch.int64 and batch["counts"].dtype == torch.uint8
        tasks = set()
        for sample in samples(batch):
            words = decode(sample["tokens"].tolist()).split()
            pictured = words.count("<IMG_CONTEXT>")
            tasks.add(marks[words[19 if pictured else 1]])
            assert pictured == (16 if sample["images"].any() else 0) and sample["counts"].any()
        assert len(tasks) == 1  # a block is of one task, so every micro-batch runs one branch
        seen |= tasks
    assert seen == set(marks.values())


def test_an_edit_shows_the_picture_before_and_describes_the_one_after(make_shard):
    png, other = solid(0), solid(255)
    said = json.dumps(SAID).encode()
    shard = make_shard({"a": {"input.png": png, "output.png": other, "json": said}})
    (batch,) = Loader([Source("edits", shard)], SPEC, 0, 1, 1, 1, 0, 1, 0, 0, 1)
    assert not batch["images"].any()
    assert decode(batch["tokens"][batch["counts"] == 1].tolist()) == "a blue circle on the left <eos>"


def test_the_words_are_the_same_under_every_layout(tiny_world):
    def stream(micro_batch, size):
        found = {}
        for rank in range(size):
            for batch in read(tiny_world, micro_batch, rank, size):
                for sample in samples(batch):
                    if sample["sample"] >= 0:
                        found[int(sample["sample"])] = (sample["tokens"].tolist(), sample["counts"].tolist())
                    else:
                        assert sample["tokens"].tolist() == sample["counts"].tolist() == [0]
        return found

    golden = stream(10, 1)
    assert len(golden) == 120
    assert stream(3, 2) == golden


def test_no_sentence_of_the_world_is_too_long_or_says_an_unknown_word(tiny_world):
    for name in MEMBERS:
        longest = 0
        given = [Source(name, str(tiny_world / f"{MEMBERS[name]}-*.tar"))]
        for batch in Loader(given, SPEC, 0, 40, 40, 40, 0, 1, 0, 0, 6):
            assert batch["errors"] == []
            longest = max(longest, int(batch["lengths"].max()))
        most = NUM_TOKENS[name] + (0 if name == "texts" else SPEC.image_tokens)
        assert most - 2 <= longest <= most


BAD = {
    "no json": (None, "no member json"),
    "not json": (b"{", "its json cannot be read"),
    "a list": (b"[]", "its json holds list"),
    "no captions": ({}, "KeyError: 'captions'"),
    "empty captions": ({"captions": []}, "its texts cannot be trained on"),
    "one text": ({"captions": "a red circle"}, "its captions are one text"),
    "a mark": ({"captions": ["a <eos> circle"]}, "unknown words: '<eos>'"),
    "unknown word": ({"captions": ["a mauve circle"]}, "unknown words: 'mauve'"),
    "too long": ({"captions": ["a " * 90]}, r"112 tokens; the maximum is 30"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_sample_that_says_nothing_usable_is_bad_and_weighs_nothing(make_shard, case):
    said, reason = BAD[case]
    members = {"png": solid(9)}
    if said is not None:
        members["json"] = said if isinstance(said, bytes) else json.dumps(said).encode()
    shard = make_shard({"a": members})
    (batch,) = Loader([Source("captions", shard)], SPEC, 0, 1, 1, 1, 0, 1, 0, 0, 1)
    assert batch["weight"].tolist() == [0.0] and not batch["tokens"].any()
    assert reason in batch["errors"][0]["reason"]


def test_a_source_that_is_no_task_of_the_mixture_is_refused(tiny_world):
    with pytest.raises(UserError, match=r"^data\.sources: 'caption' is not a task .*did you mean 'captions'\?"):
        read(tiny_world, sources=("questions", "caption"))


def solid(value: int) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(buffer, "png")
    return buffer.getvalue()
