"""What each task makes of a sample: the registry that `SampleSpec.task` names.

A task lists the tensors of one sample and fills them from the members of the tar. Its random draws
come from `draws(purpose)`, keyed by (seed, purpose, sample number), never from a worker's state.
A mixture is a set of tasks that fill the same tensors: each source is decoded by the task of its name.
Their lengths may differ between tasks, because a micro-batch holds samples of one source.
"""

from __future__ import annotations

import codecs
import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from parallel.errors import UserError, nearest
from spar_scale.data.images import EXTENSIONS, BadSample, decode, square
from spar_scale.data.patches import UNKNOWN, shown_patches
from spar_scale.data.prompts import (
    Prompt,
    caption_prompt,
    edit_prompt,
    editing_prompt,
    generation_prompt,
    question_prompt,
    text_prompt,
)
from spar_scale.data.spec import SampleSpec

Draws = Callable[[str], np.random.Generator]
Value = TypeVar("Value")
READ_EXTENSIONS = ("txt", "json", *(f"{side}{name}" for side in ("", "input.", "output.") for name in EXTENSIONS))
"""Extensions of the members that a task may read."""
Slots = dict[str, tuple[tuple[int, ...], type]]  # name -> shape without batch, numpy type


@dataclass(frozen=True)
class Members:
    """The members of one sample, read when asked for."""

    extensions: tuple[str, ...]
    read: Callable[[str], bytes]

    def first(self, wanted: Iterable[str]) -> bytes:
        """Return the first wanted member that is there; raise BadSample where none is."""
        wanted = tuple(wanted)
        for extension in wanted:
            if extension in self.extensions:
                return self.read(extension)
        raise BadSample(f"no member {'|'.join(wanted)}; the sample has {', '.join(self.extensions)}")


@dataclass(frozen=True)
class Task:
    """`slots(spec)` are the tensors of one sample, `fill(members, spec, draws)` their values."""

    slots: Callable[[SampleSpec], Slots]
    fill: Callable[[Members, SampleSpec, Draws], Mapping[str, np.ndarray]]


def find_task(name: str) -> Task | Conditioned:
    """Return the task of a name, of a mixture the first of its tasks; an unknown name raises UserError."""
    if name in MIXTURES:
        return TASKS[MIXTURES[name][0]]
    if name not in TASKS:
        known = (*TASKS, *MIXTURES)
        raise UserError(f"sample.task is '{name}'; known: {', '.join(known)}{nearest(name, known)}")
    return TASKS[name]


def source_task(name: str, source: str) -> Task | Conditioned:
    """Return the task that decodes a source: in a mixture the one it is named after, else `name`'s.

    Raises UserError for a source whose name is no task of the mixture.
    """
    if name not in MIXTURES:
        return find_task(name)
    if source not in MIXTURES[name]:
        known = MIXTURES[name]
        raise UserError(
            f"data.sources: '{source}' is no task of this phase ({', '.join(known)}){nearest(source, known)}"
        )
    return TASKS[source]


def _image_slots(spec: SampleSpec) -> Slots:
    return {"images": ((3, spec.image_size, spec.image_size), np.float32)}


def _image(members: Members, spec: SampleSpec, draws: Draws) -> dict[str, np.ndarray]:
    """The picture alone; of an editing triplet the output, where the plain name is missing."""
    picture = decode(members.first((*EXTENSIONS, *(f"output.{extension}" for extension in EXTENSIONS))))
    along = float(draws("crop").random()) if spec.crop == "random" else 0.5
    mirrored = spec.flip and bool(draws("flip").random() < 0.5)
    return {"images": square(picture, spec.image_size, along, mirrored)}


def _language_slots(spec: SampleSpec, length: int) -> Slots:
    """`counts` is 1 where a token is to be predicted; `tokens` is padded on the right with 0.

    `patches` (N, 2) names what the picture shows where each of its N tokens stands, a shape and a colour.
    """
    text: Slots = {"tokens": ((length,), np.int64), "counts": ((length,), np.uint8)}
    return {**_image_slots(spec), **text, "patches": ((spec.image_tokens, 2), np.uint8)}


def _language(
    name: str, picture: str | None, make: Callable[[Mapping[str, Any], np.random.Generator, int], Prompt]
) -> Task:
    """The task of a prompt and the member with its picture (its name before the extension; None: no picture).

    The picture is the middle square, never mirrored: the words name its sides.
    """

    def longest(spec: SampleSpec) -> int:
        return spec.task_tokens[name] + (0 if picture is None else spec.image_tokens)

    def fill(members: Members, spec: SampleSpec, draws: Draws) -> dict[str, np.ndarray]:
        said = _json_record(members)
        prompt = _as_bad_sample(lambda: make(said, draws("words"), spec.image_tokens))
        length, limit = len(prompt.tokens), longest(spec)
        if length > limit:
            raise BadSample(f"{length} tokens; at most {limit} are read")
        slots = _language_slots(spec, limit)
        arrays = {slot: np.zeros(shape, dtype) for slot, (shape, dtype) in slots.items()}
        arrays["tokens"][:length], arrays["counts"][:length] = prompt.tokens, prompt.counts
        arrays["patches"][:] = UNKNOWN
        if picture is not None:
            scene = said.get(f"{picture.replace('.', '_')}scene")
            arrays["patches"] = _as_bad_sample(lambda: shown_patches(scene, spec.image_size, spec.image_tokens))
            image = decode(members.first(f"{picture}{extension}" for extension in EXTENSIONS))
            arrays["images"] = square(image, spec.image_size, along=0.5, mirrored=False)
        return arrays

    return Task(lambda spec: _language_slots(spec, longest(spec)), fill)


def _as_bad_sample(make: Callable[[], Value]) -> Value:
    """What `make` words; whatever is wrong with what it reads is the sample's fault."""
    try:
        return make()
    except (KeyError, IndexError, TypeError, ValueError, UserError) as error:
        raise BadSample(f"its words are nothing to train on ({type(error).__name__}: {error})") from None


def _load_json(members: Members) -> Any:
    try:
        return json.loads(members.first(["json"]))
    except (ValueError, RecursionError) as error:
        raise BadSample(f"its json cannot be read ({error})") from None


def _json_record(members: Members) -> Mapping[str, Any]:
    said = _load_json(members)
    if not isinstance(said, dict):
        raise BadSample(f"its json holds {type(said).__name__}, not an object")
    return said


@dataclass(frozen=True)
class Conditioned:
    """The task of a picture and the prompt that it is drawn from. Nothing random but which words are given.

    `sides` are the beginnings of the names of its pictures' members, the target first; more than one makes
    the prompt begin with the others. `texts(members)` are the words of which one sample's are chosen, and
    `prompt(text, spec)` what is made of them.
    """

    sides: tuple[str, ...]
    texts: Callable[[Members], list[str]]
    prompt: Callable[[str, SampleSpec], Prompt]

    @property
    def illustrated(self) -> bool:
        """Whether the prompt shows a picture."""
        return len(self.sides) > 1

    def slots(self, spec: SampleSpec) -> Slots:
        """`images` (M, 3, S, S), the target first; `keep` is 1 where a token is real, padded on the right."""
        return {
            "images": ((len(self.sides), 3, spec.image_size, spec.image_size), np.float32),
            "tokens": ((self.length(spec),), np.int64),
            "keep": ((self.length(spec),), np.uint8),
        }

    def length(self, spec: SampleSpec) -> int:
        """Tokens of the longest prompt."""
        return spec.num_tokens + (spec.image_tokens + 2 if self.illustrated else 0)

    def fill(self, members: Members, spec: SampleSpec, draws: Draws) -> dict[str, np.ndarray]:
        """The prompt and the pictures."""
        return {**self.prompt_slots(members, spec, draws), "images": self.pictures(members, spec)}

    def prompt_slots(self, members: Members, spec: SampleSpec, draws: Draws) -> dict[str, np.ndarray]:
        """`tokens` and `keep` of the prompt that the draws choose; a dropped caption leaves the bare instruction."""
        texts, chosen = self.texts(members), draws("words").random()
        dropped = draws("caption_drop").random() < spec.caption_dropout
        return self.padded(self._tokens("" if dropped else texts[int(chosen * len(texts))], spec), spec)

    def prompts(self, members: Members, spec: SampleSpec) -> list[np.ndarray]:
        """The tokens of every prompt that the draws may choose, the bare instruction last; bad ones are left out."""
        found = []
        for text in (*self.texts(members), ""):
            with contextlib.suppress(BadSample):
                found.append(self._tokens(text, spec))
        return found

    def padded(self, tokens: np.ndarray, spec: SampleSpec) -> dict[str, np.ndarray]:
        """Tokens (n,) as the slots `tokens` and `keep`."""
        behind = (0, self.length(spec) - len(tokens))
        return {"tokens": np.pad(tokens, behind), "keep": np.pad(np.ones(len(tokens), np.uint8), behind)}

    def pictures(self, members: Members, spec: SampleSpec) -> np.ndarray:
        """The middle squares (M, 3, S, S), never mirrored: the words name their sides."""
        data = [members.first(f"{side}{extension}" for extension in EXTENSIONS) for side in self.sides]
        return np.stack([square(decode(picture), spec.image_size, along=0.5, mirrored=False) for picture in data])

    def _tokens(self, text: str, spec: SampleSpec) -> np.ndarray:
        tokens = _as_bad_sample(lambda: self.prompt(text, spec)).tokens
        if len(tokens) > self.length(spec):
            raise BadSample(f"{len(tokens)} tokens; at most {self.length(spec)} are read")
        return np.array(tokens, np.int64)


def _captions(members: Members) -> list[str]:
    """The captions of the json where it is an object that lists some, else the txt."""
    has_text = "txt" in members.extensions
    listed = None
    if "json" in members.extensions:
        content = _load_json(members)
        if isinstance(content, dict):
            listed = content.get("captions")
        elif not has_text:
            raise BadSample(f"its json holds {type(content).__name__}, not an object, and it has no txt")
    if listed is None or listed == []:
        if not has_text and "json" in members.extensions:
            raise BadSample(
                f"no member txt, and its json lists no captions; the sample has {', '.join(members.extensions)}"
            )
        return [_text(members)]
    if not isinstance(listed, list) or not all(isinstance(caption, str) for caption in listed):
        raise BadSample("its captions are no list of texts")
    captions = [_clean(caption) for caption in listed]
    if not all(captions):
        raise BadSample("one of its captions is empty")
    return captions


def _text(members: Members) -> str:
    """The txt, which must be UTF-8 (with or without a byte order mark) and not empty."""
    data = members.first(["txt"])
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data:
        raise BadSample("its txt is no UTF-8 but UTF-16, UTF-32 or no text; write it as UTF-8")
    try:
        text = _clean(data.decode())
    except UnicodeDecodeError as error:
        raise BadSample(f"its txt is no UTF-8 ({error})") from None
    if not text:
        raise BadSample("its txt is empty")
    return text


def _clean(text: str) -> str:
    """A text without byte order marks (each file of Windows begins with one) and without white space around it."""
    return text.replace("\ufeff", "").strip()


TASKS: dict[str, Task | Conditioned] = {
    "images": Task(_image_slots, _image),
    "captions": _language("captions", "", caption_prompt),
    "questions": _language("questions", "", question_prompt),
    "edits": _language("edits", "input.", edit_prompt),
    "texts": _language("texts", None, text_prompt),
    "generation": Conditioned(("",), _captions, lambda text, _: generation_prompt(text)),
    "editing": Conditioned(
        ("output.", "input."),
        lambda members: [_text(members)],  # the instruction; the picture to edit is never dropped
        lambda text, spec: editing_prompt(text, spec.image_tokens),
    ),
}
MIXTURES = {"language": ("captions", "questions", "edits", "texts"), "conditioned": ("generation", "editing")}
