"""What conditions the diffusion model: prompt, pictures and dropped captions of the tasks generation and editing."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import packed
import pytest
import torch
from PIL import Image

from parallel.errors import UserError
from spar_scale.data.loader import Loader, Source
from spar_scale.data.order import Order, SourceShape
from spar_scale.data.prompts import TOKENS, miniature_text
from spar_scale.data.spec import Draw, SampleSpec

TEXT = miniature_text()
SPEC = SampleSpec("conditioned", 8, num_tokens=10, image_tokens=2, draws={"noise": Draw((3,), "normal")}, text=TEXT)
decode = TEXT.decode


def encode(words: str) -> list[int]:
    return [TOKENS[word] for word in words.split()]


EDITING_TOKENS = 10 + 2 + 2  # words, the picture's tokens, <img> and </img>
CAPTIONS = ["a red circle", "a blue square", "one cyan circle", "two red squares"]
BARE = {"generation": "<bos> draw : <img>", "editing": "<bos> <img> <IMG_CONTEXT> <IMG_CONTEXT> </img> edit : <img>"}


def columns(start: int) -> bytes:
    """A PNG of 16 x 8 pixels whose columns are start, start + 10, start + 20, ..."""
    row = np.arange(16, dtype=np.uint8) * 10 + start
    buffer = io.BytesIO()
    Image.fromarray(np.broadcast_to(row[None, :, None], (8, 16, 3)).copy()).save(buffer, "png")
    return buffer.getvalue()


def middle(start: int) -> torch.Tensor:
    """The middle square of `columns(start)`, not mirrored."""
    return ((torch.arange(4, 12) * 10.0 + start) / 255).expand(3, 8, 8)


def said(captions: Any = CAPTIONS) -> bytes:
    return json.dumps({"captions": captions}).encode()


GENERATION: dict[str, bytes] = {"png": columns(0), "txt": b"a cyan square\n", "json": said()}
EDITING: dict[str, bytes] = {"input.png": columns(50), "output.png": columns(7), "txt": b"make the circle blue"}
MEMBERS = {"generation": GENERATION, "editing": EDITING}


def read(shard: str, source: str, samples: int = 1, micro_batch: int = 0, seed: int = 0, **changes: Any) -> dict:
    """`samples` sample numbers, all of the one sample of a shard; padding rows are left out."""
    of_source = {name: changes.pop(name) for name in ("texts", "fit") if name in changes}
    spec = dataclasses.replace(SPEC, **changes)
    loader = Loader(
        [Source(source, shard, **of_source)], spec, seed, samples, samples, micro_batch or samples, 0, 1, 0, 0, 1
    )
    batches = list(loader)
    rows = [row for batch in batches for row in packed.samples(batch) if row["sample"] >= 0]
    errors = [error for batch in batches for error in batch["errors"]]
    return {**packed.batch_of(rows), "errors": errors}


def loader_of(sources: list[Source]) -> Loader:
    """A loader of five steps of 40 samples in blocks of 4."""
    return Loader(sources, SPEC, 0, 40, 4, 4, 0, 1, 0, 0, 5)


def prompts(batch: dict) -> list[str]:
    """Each sample's tokens as words."""
    assert not (batch["tokens"] == TOKENS["<pad>"]).any()
    return [decode(row["tokens"].tolist()) for row in packed.samples(batch)]


def test_a_generation_sample_is_its_prompt_and_the_middle_of_its_picture(make_shard):
    batch = read(make_shard({"a": {"png": columns(0), "txt": b" a red circle\n"}}), "generation", flip=True)
    assert batch["tokens"].tolist() == [1, *encode("draw : a red circle <img>")] and batch["lengths"].tolist() == [7]
    assert batch["images"].shape == (1, 1, 3, 8, 8) and torch.equal(batch["images"][0, 0], middle(0))
    assert batch["weight"].tolist() == [1] and batch["errors"] == []


def test_an_editing_sample_shows_the_target_first_and_the_picture_to_edit_second(make_shard):
    batch = read(make_shard({"a": EDITING}), "editing", flip=True)
    words = "<img> <IMG_CONTEXT> <IMG_CONTEXT> </img> edit : make the circle blue <img>"
    assert batch["tokens"].tolist() == [1, *encode(words)] and batch["lengths"].tolist() == [12]
    assert batch["images"].shape == (1, 2, 3, 8, 8)
    assert torch.equal(batch["images"][0, 0], middle(7)) and torch.equal(batch["images"][0, 1], middle(50))


@pytest.mark.parametrize("source", MEMBERS)
def test_no_draw_moves_or_mirrors_a_picture(make_shard, source):
    batch = read(make_shard({"a": MEMBERS[source]}), source, samples=40, flip=True, crop="random")
    assert all(torch.equal(images, batch["images"][0]) for images in batch["images"])


def test_any_caption_comes_up_and_which_follows_from_seed_and_number(make_shard):
    shard = make_shard({"a": GENERATION})
    told = prompts(read(shard, "generation", samples=80))
    expected = {f"<bos> draw : {caption} <img>" for caption in CAPTIONS}
    assert set(told) == expected and min(told.count(prompt) for prompt in expected) > 8
    assert prompts(read(shard, "generation", samples=80, micro_batch=7)) == told
    assert prompts(read(shard, "generation", samples=80, seed=1)) != told


NO_CAPTIONS = [
    {},
    *({"json": content} for content in (b'{"scene": 1}', said([]), said(None), b"[]", b"[1, 2]", b"7", b"null")),
]


@pytest.mark.parametrize("members", NO_CAPTIONS, ids=str)
def test_the_txt_is_the_caption_where_no_json_lists_any(make_shard, members):
    shard = make_shard({"a": {"png": columns(0), "txt": b"a cyan square\n", **members}})
    assert set(prompts(read(shard, "generation", samples=5))) == {"<bos> draw : a cyan square <img>"}


BOM = "\ufeff"
WRITTEN = {
    "byte order mark": {"txt": f"{BOM}a cyan square".encode()},
    "two of them": {"txt": f"{BOM}{BOM}a cyan square".encode()},
    "byte order mark and line ends of Windows": {"txt": f"{BOM}a cyan\r\nsquare\r\n".encode()},
    "white space around it": {"txt": "\u00a0\t a cyan square \n\n".encode()},
    "json with a byte order mark": {"json": BOM.encode() + said(["a cyan square"])},
    "caption with a byte order mark": {"json": said([f"{BOM} a cyan square"])},
    "json as UTF-16": {"json": said(["a cyan square"]).decode().encode("utf-16")},
}


@pytest.mark.parametrize("case", WRITTEN)
def test_marks_and_line_ends_of_an_editor_are_no_words(make_shard, case):
    batch = read(make_shard({"a": {"png": columns(0), **WRITTEN[case]}}), "generation")
    assert prompts(batch) == ["<bos> draw : a cyan square <img>"] and batch["errors"] == []


@pytest.mark.parametrize("case", ["byte order mark", "byte order mark and line ends of Windows"])
def test_an_instruction_is_read_as_a_caption_is(make_shard, case):
    words = WRITTEN[case]["txt"].decode().replace("a cyan", "make the circle blue").replace("square", "")
    batch = read(make_shard({"a": {**EDITING, "txt": words.encode()}}), "editing")
    assert prompts(batch)[0].endswith("edit : make the circle blue <img>") and batch["errors"] == []


@pytest.mark.parametrize("source", MEMBERS)
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_captions_are_dropped_at_the_rate_asked_for_and_the_picture_to_edit_never(make_shard, source, rate):
    batch = read(make_shard({"a": MEMBERS[source]}), source, samples=600, caption_dropout=rate)
    dropped = [prompt == BARE[source] for prompt in prompts(batch)]
    assert np.mean(dropped) == pytest.approx(rate, abs=3 * (rate * (1 - rate) / 600) ** 0.5)
    assert batch["weight"].all() and batch["images"].flatten(2).any(2).all()


def test_what_is_dropped_follows_from_seed_and_number_alone(make_shard):
    shard = make_shard({"a": GENERATION})

    def words(**given: Any) -> list[str]:
        return prompts(read(shard, "generation", samples=100, **given))

    def dropped(told: list[str]) -> list[bool]:
        return [prompt == BARE["generation"] for prompt in told]

    some, more = words(caption_dropout=0.3), words(caption_dropout=0.6)
    assert words(caption_dropout=0.3, micro_batch=9) == some
    assert dropped(words(caption_dropout=0.3, seed=1)) != dropped(some)
    assert all(later or not sooner for sooner, later in zip(dropped(some), dropped(more), strict=True))
    kept = [(one, other) for one, other in zip(some, words(), strict=True) if one != BARE["generation"]]
    assert all(one == other for one, other in kept)
    assert len({one for one, _ in kept}) == len(CAPTIONS)  # the draw that drops is not the one that chooses


def without(members: dict[str, bytes], *names: str) -> dict[str, bytes]:
    return {name: data for name, data in members.items() if name not in names}


LONGEST = " ".join(["a"] * 6)  # with <bos>, draw, : and <img> ten tokens
BAD = {
    "unknown words": ("generation", {**GENERATION, "json": said(["a mauve circle"])}, "unknown words: 'mauve'"),
    "too long": ("generation", {**GENERATION, "json": said([f"{LONGEST} a"])}, "11 tokens; the maximum is 10"),
    "captions are one text": (
        "generation",
        {**GENERATION, "json": said("a red circle")},
        "captions are not a list of texts",
    ),
    "a caption is no text": ("generation", {**GENERATION, "json": said([["a"]])}, "captions are not a list of texts"),
    "a caption of marks": ("generation", {**GENERATION, "json": said(["a <IMG_CONTEXT>"])}, "words: '<IMG_CONTEXT>'"),
    "no words": ("generation", {"png": columns(0)}, "no member txt; the sample has png"),
    "no picture": ("generation", without(GENERATION, "png"), "no member png|jpg|jpeg|webp; the sample has json, txt"),
    "json": ("generation", {**GENERATION, "json": b"{"}, "its json cannot be read"),
    "json that nests without end": ("generation", {**GENERATION, "json": b"[" * 10**5}, "its json cannot be read"),
    "json of other bytes": ("generation", {**GENERATION, "json": b'{"a": "\xff"}'}, "its json cannot be read"),
    "txt of other bytes": ("generation", {"png": columns(0), "txt": b"a \xff"}, "its txt is not UTF-8"),
    "a list without a txt": (
        "generation",
        {"png": columns(0), "json": b"[]"},
        "its json holds list, not an object, and",
    ),
    "no captions and no txt": (
        "generation",
        {"png": columns(0), "json": said([])},
        "txt, and its json lists no captions",
    ),
    "null captions and no txt": ("generation", {"png": columns(0), "json": said(None)}, "its json lists no captions"),
    "captions are an object": (
        "generation",
        {**GENERATION, "json": said({"en": "a"})},
        "captions are not a list of texts",
    ),
    "an empty caption": ("generation", {**GENERATION, "json": said(["a red circle", " "])}, "its captions is empty"),
    "empty txt": ("generation", {"png": columns(0), "txt": b""}, "its txt is empty"),
    "txt of white space": ("generation", {"png": columns(0), "txt": b" \r\n\t"}, "its txt is empty"),
    "txt of a byte order mark": ("generation", {"png": columns(0), "txt": BOM.encode()}, "its txt is empty"),
    "txt as UTF-16": ("generation", {"png": columns(0), "txt": "a circle".encode("utf-16")}, "not UTF-8 but UTF-16"),
    "txt as UTF-16 without a mark": (
        "generation",
        {"png": columns(0), "txt": "a circle".encode("utf-16-le")},
        "not UTF-8 but UTF-16",
    ),
    "edit: empty txt": ("editing", {**EDITING, "txt": b"\n"}, "its txt is empty"),
    "edit: unknown words": ("editing", {**EDITING, "txt": b"make it mauve"}, "unknown words: 'it'"),
    "edit: too long": ("editing", {**EDITING, "txt": f"{LONGEST} a".encode()}, "15 tokens; the maximum is 14"),
    "edit: a mark": ("editing", {**EDITING, "txt": b"make <IMG_CONTEXT> blue"}, "unknown words: '<IMG_CONTEXT>'"),
    "edit: no target": ("editing", without(EDITING, "output.png"), "no member output.png|output.jpg|"),
    "edit: no picture": ("editing", without(EDITING, "input.png"), "no member input.png|input.jpg|"),
    "edit: no instruction": ("editing", without(EDITING, "txt"), "no member txt; the sample has"),
    "edit: txt of other bytes": ("editing", {**EDITING, "txt": b"\xff"}, "its txt is not UTF-8"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_sample_weighs_nothing_and_says_why(make_shard, case):
    source, members, reason = BAD[case]
    batch = read(make_shard({"a": members}), source, long_captions="refuse")
    assert batch["weight"].tolist() == [0] and batch["sample"].tolist() == [0]
    assert batch["tokens"].tolist() == [0] and not batch["images"].any()
    assert [error["key"] for error in batch["errors"]] == ["a"] and reason in batch["errors"][0]["reason"]


@pytest.mark.parametrize("source", MEMBERS)
def test_the_longest_prompt_is_read_whole(make_shard, source):
    members = {**without(MEMBERS[source], "json"), "txt": LONGEST.encode()}
    batch = read(make_shard({"a": members}), source)
    assert batch["lengths"].tolist() == [10 if source == "generation" else EDITING_TOKENS]


def test_a_source_that_neither_draws_nor_edits_is_refused(make_shard):
    shard = make_shard({"a": GENERATION})
    known = r"is not a task of this phase \(generation, editing\)"
    for task, refusal in (
        (None, f"'images' {known}"),
        ("edit", f"'edit' {known}; did you mean 'editing'"),
        ("texts", known),
    ):
        with pytest.raises(
            UserError, match=f"^data.sources: .*{refusal}.*; set task of source 'images' to one of them$"
        ):
            loader_of([Source("images", shard, task=task)])


def test_one_task_alone_takes_a_source_of_any_name(make_shard):
    batch = read(make_shard({"a": GENERATION}), "images", task="generation")
    assert batch["weight"].tolist() == [1] and batch["images"].shape[1] == 1


LONG = {
    "generation": ("a red circle above a blue square", "draw : a red circle above a blue"),
    "editing": ("make the circle blue and the square red", "edit : make the circle blue and the"),
}


@pytest.mark.parametrize("source", MEMBERS)
def test_a_text_over_the_limit_is_cut_at_its_end_and_the_marks_behind_it_stay(make_shard, source):
    text, prompt = LONG[source]
    members = {**without(MEMBERS[source], "json"), "txt": text.encode()}
    batch = read(make_shard({"a": members}), source)
    assert batch["errors"] == [] and batch["lengths"].tolist() == [10 if source == "generation" else EDITING_TOKENS]
    assert prompts(batch)[0].endswith(f"{prompt} <img>") and batch["tokens"][-1] == TOKENS["<img>"]


def test_a_text_of_which_nothing_fits_is_a_bad_sample_and_no_unconditional_one(make_shard):
    batch = read(make_shard({"a": {"png": columns(0), "txt": b"a red circle"}}), "generation", num_tokens=4)
    assert batch["weight"].tolist() == [0] and "7 tokens; the maximum is 4" in batch["errors"][0]["reason"]


RECORD = {
    "short": "a circle",
    "long": "a red circle",
    "all": ["one cyan circle", "two red squares"],
    "caption": "a square",
}
TEXTS: dict[str, tuple[dict[str, bytes], tuple[str, ...], set[str]]] = {
    "a key": ({"json": json.dumps(RECORD).encode(), "txt": b"a triangle"}, ("json:long",), {"a red circle"}),
    "two keys": ({"json": json.dumps(RECORD).encode()}, ("json:long", "json:short"), {"a red circle", "a circle"}),
    "a key and a list": (
        {"json": json.dumps(RECORD).encode()},
        ("json:short", "json:all"),
        {"a circle", *RECORD["all"]},
    ),
    "another member": ({"txt": b"a triangle", "alt.txt": b"a circle"}, ("alt.txt",), {"a circle"}),
    "a key of another member": ({"meta.json": b'{"c": " a circle\\n"}'}, ("meta.json:c",), {"a circle"}),
    "txt beside captions": ({"json": said(), "txt": b"a circle"}, ("txt",), {"a circle"}),
    "txt beside a json that cannot be read": ({"json": b"{", "txt": b"a circle"}, ("txt",), {"a circle"}),
    "as img2dataset writes it": ({"json": json.dumps(RECORD).encode()}, (), {"a square"}),
    "as img2dataset writes it, with a txt": (
        {"json": json.dumps(RECORD).encode(), "txt": b"a circle"},
        (),
        {"a circle"},
    ),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_source_names_the_members_with_its_captions(make_shard, case):
    members, texts, expected = TEXTS[case]
    batch = read(make_shard({"a": {"JPEG": columns(0), **members}}), "generation", samples=40, texts=texts)
    assert batch["errors"] == [] and set(prompts(batch)) == {f"<bos> draw : {text} <img>" for text in expected}


def test_a_source_of_edits_names_the_member_with_its_instruction(make_shard):
    shard = make_shard({"a": {**without(EDITING, "txt"), "json": b'{"instruction": "make the circle blue"}'}})
    batch = read(shard, "editing", texts=("json:instruction",))
    assert prompts(batch)[0].endswith("edit : make the circle blue <img>") and batch["errors"] == []


BAD_TEXTS = {
    "no such key": ({"json": b'{"capton": "a"}'}, "json:caption", "its json has no 'caption'; did you mean 'capton'?"),
    "no such member": ({"txt": b"a circle"}, "alt.txt", "no member alt.txt; the sample has png, txt"),
    "null": ({"json": b'{"c": null}'}, "json:c", "its c is neither a text nor a list of texts"),
    "an empty text": ({"json": b'{"c": " \\n"}'}, "json:c", "its c is empty"),
    "an empty list": ({"json": b'{"c": []}'}, "json:c", "its c is neither a text nor a list of texts"),
    "a list with an empty text": ({"json": b'{"c": ["a", ""]}'}, "json:c", "one of its c is empty"),
    "nothing that is visible": ({"alt": "\u200b\u2060".encode()}, "alt", "its alt is empty"),
    "a list instead of an object": ({"json": b'["a"]'}, "json:c", "its json holds list, not an object"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_a_text_that_is_not_where_the_source_names_it_is_a_bad_sample(make_shard, case):
    members, text, reason = BAD_TEXTS[case]
    batch = read(make_shard({"a": {"png": columns(0), **members}}), "generation", texts=(text,))
    assert batch["weight"].tolist() == [0] and [error["reason"] for error in batch["errors"]] == [reason]


def test_a_text_of_a_task_without_prompts_is_refused(make_shard):
    with pytest.raises(UserError, match=r"source 'a' has text json:c, but its task 'images' reads no caption"):
        read(make_shard({"a": GENERATION}), "a", task="images", texts=("json:c",))


def test_a_stretched_picture_shows_all_of_itself(make_shard):
    shard = make_shard({"a": EDITING})
    whole, middles = (read(shard, "editing", fit=fit)["images"][0] for fit in ("stretch", "crop"))
    assert whole.shape == middles.shape == (2, 3, 8, 8)
    for picture, start in zip(whole, (7, 50), strict=True):
        # Half as many columns, each the mean of its neighbours: 20 apart and symmetric about the picture's middle.
        expected = (torch.arange(8) * 20.0 + 5 + start) / 255
        torch.testing.assert_close(picture[:, :, 1:-1], expected[1:-1].expand(3, 8, 6), atol=1.5 / 255, rtol=0)
    assert not torch.equal(whole, middles)


STEPS, GLOBAL_BATCH, TASK_BLOCK = 4, 22, 5  # blocks of 5, 5, 5, 5 and 2
WORLD = dataclasses.replace(SPEC, num_tokens=14, image_tokens=4, caption_dropout=0.2)
SHAPES = {"generation": (1, 3, 8, 8), "editing": (2, 3, 8, 8)}


def stream(world: Path, micro_batch=TASK_BLOCK, size=1, workers=0, first_step=0) -> dict[int, dict[str, torch.Tensor]]:
    """Sample number -> its tensors, over all ranks; each micro-batch has the shapes of its own task."""
    sources = [
        Source("generation", str(world / "scenes-*.tar"), 0.4),
        Source("more", str(world / "scenes-*.tar"), 0.2, task="generation", texts=("txt",), fit="stretch"),
        Source("editing", str(world / "edits-*.tar"), 0.4),
    ]
    found: dict[int, dict[str, torch.Tensor]] = {}
    for rank in range(size):
        batches = (GLOBAL_BATCH, TASK_BLOCK, micro_batch)
        loader = Loader(sources, WORLD, 0, *batches, rank, size, workers, first_step, STEPS - first_step)
        for batch in loader:
            assert batch["errors"] == []
            for values in packed.samples(batch):
                number = int(values.pop("sample"))
                if number < 0:
                    assert values.pop("lengths") == 1 and not any(value.any() for value in values.values())
                    continue
                task = loader.order.sources[loader.order.locate(number).source].name
                assert values["images"].shape == SHAPES[task] and len(values["tokens"]) == values["lengths"]
                assert number not in found and values["weight"] == 1
                found[number] = values
    return found


SHAPES |= {"more": SHAPES["generation"]}  # a second source of the same task


@pytest.fixture(scope="module")
def golden(tiny_world):
    whole = stream(tiny_world)
    assert sorted(whole) == list(range(STEPS * GLOBAL_BATCH))
    assert {len(values["images"]) for values in whole.values()} == {1, 2}
    return whole


LAYOUTS = [(1, 2, 0, 0), (2, 2, 0, 0), (3, 1, 0, 0), (2, 3, 2, 0), (1, 5, 2, 2), (3, 2, 0, 1), (2, 4, 0, 3)]


@pytest.mark.parametrize(("size", "micro_batch", "workers", "first_step"), LAYOUTS)
def test_the_mixture_is_one_stream_under_every_layout(tiny_world, golden, size, micro_batch, workers, first_step):
    found = stream(tiny_world, micro_batch, size, workers, first_step)
    assert sorted(found) == list(range(first_step * GLOBAL_BATCH, STEPS * GLOBAL_BATCH))
    for number, values in found.items():
        assert values.keys() == golden[number].keys()
        assert all(torch.equal(value, golden[number][name]) for name, value in values.items())


def test_two_sources_of_one_task_share_the_batch_by_their_weights(make_shard):
    """Each keeps the order that it has alone, and its own text and fit."""
    long, short = ({"png": columns(0), "txt": text} for text in (b"a red circle", b"a circle"))
    shards = [
        make_shard({f"{name}{number}": one for number in range(7)}, f"{name}.tar")
        for name, one in (("long", long), ("short", short), ("edits", EDITING))
    ]
    sources = [
        Source("long", shards[0], 0.5, task="generation"),
        Source("short", shards[1], 0.3, task="generation", fit="stretch"),
        Source("edits", shards[2], 0.2, task="editing"),
    ]
    loader = loader_of(sources)
    found: dict[str, list[str]] = {source.name: [] for source in sources}
    for batch in loader:
        assert batch["errors"] == [] and batch["weight"].all()
        (name,) = {loader.order.sources[loader.order.locate(number).source].name for number in batch["sample"].tolist()}
        found[name] += prompts(batch)
        assert len(batch["images"][0]) == (2 if name == "edits" else 1)
        assert torch.equal(batch["images"][0, 0], middle(7 if name == "edits" else 0)) == (name != "short")
    assert set(found["long"]) == {"<bos> draw : a red circle <img>"} and set(found["short"]) == {
        "<bos> draw : a circle <img>"
    }
    alone = {source.name: Order(0, [SourceShape(source.name, 1, (7,))], 40, 4) for source in sources}
    for name, order in alone.items():
        index = [source.name for source in sources].index(name)
        numbers = [n for n in range(200) if loader.order.locate(n).source == index]
        taken = [(place.epoch, place.member) for place in map(loader.order.locate, numbers)]
        assert taken == [(place.epoch, place.member) for place in map(order.locate, range(len(numbers)))]
    blocks = Counter(loader.order.source(block) for block in range(1000))
    assert [blocks[index] for index in range(3)] == [500, 300, 200]
