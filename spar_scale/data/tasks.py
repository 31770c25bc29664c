"""The tasks, which turn a sample's tar members into tensors: the registry for `SampleSpec.task`.

A task declares the tensors of one sample and fills them from the members of the tar. Its random draws come from
`draws(purpose)`, keyed by (seed, purpose, sample number), never from a worker's state. A mixture is a set of tasks that
fill the same tensors; each source is decoded by its task.
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
from spar_scale.data.prompts import caption_prompt, edit_prompt, question_prompt, text_prompt
from spar_scale.data.spec import SampleSpec, Source
from spar_scale.data.text import Prompt, TextTokenizer

Draws = Callable[[str], np.random.Generator]
Value = TypeVar("Value")
READ_EXTENSIONS = ("txt", "json", *(f"{side}{name}" for side in ("", "input.", "output.") for name in EXTENSIONS))
"""Extensions of the members that a task may read."""
Slots = dict[str, tuple[tuple[int, ...] | None, type]]
"""Name -> shape without batch, numpy type. None is one number for each token of a prompt: a batch packs them."""


@dataclass(frozen=True)
class Members:
    """The members of one sample; `read(extension)` loads one."""

    extensions: tuple[str, ...]
    read: Callable[[str], bytes]

    def read_first(self, candidates: Iterable[str]) -> bytes:
        """Return the content of the first extension that the sample has. Raises BadSample if it has none of them."""
        candidates = tuple(candidates)
        for extension in candidates:
            if extension in self.extensions:
                return self.read(extension)
        raise BadSample(f"no member {'|'.join(candidates)}; the sample has {', '.join(self.extensions)}")


@dataclass(frozen=True)
class Task:
    """A task: `slots(spec)` returns the tensors of one sample, `fill(members, spec, draws)` their values.

    `length(spec)` is the number of tokens of the longest prompt.
    """

    slots: Callable[[SampleSpec], Slots]
    fill: Callable[[Members, SampleSpec, Draws], Mapping[str, np.ndarray]]
    length: Callable[[SampleSpec], int] = lambda spec: 0


def find_task(name: str) -> Task | Conditioned:
    """Return the task of a name; for a mixture, its first task. Raises UserError for an unknown name."""
    if name in MIXTURES:
        return TASKS[MIXTURES[name][0]]
    if name not in TASKS:
        known = (*TASKS, *MIXTURES)
        raise UserError(f"sample.task is '{name}'; known: {', '.join(known)}{nearest(name, known)}")
    return TASKS[name]


def source_task(name: str, source: Source) -> Task | Conditioned:
    """Return the task that decodes a source: in a mixture that of the source (default: its name), else the task `name`.

    Raises UserError if it is not a task of the phase, and for `texts` of a task whose texts have a fixed place.
    """
    known = MIXTURES.get(name, (name,))
    wanted = source.task or (source.name if name in MIXTURES else name)
    if wanted not in known:
        raise UserError(
            f"data.sources: '{wanted}' is not a task of this phase ({', '.join(known)}){nearest(wanted, known)}; set"
            f" task of source '{source.name}' to one of them"
        )
    task = find_task(wanted)
    if source.texts and not isinstance(task, Conditioned):
        raise UserError(
            f"data.sources: source '{source.name}' has text {', '.join(source.texts)}, but its task '{wanted}' reads no"
            " caption; remove text"
        )
    return task


def packed_slots(spec: SampleSpec) -> frozenset[str]:
    """Return the slots in which the samples of a batch stand one after another."""
    return frozenset(name for name, (shape, _) in find_task(spec.task).slots(spec).items() if shape is None)


def _image_slots(spec: SampleSpec) -> Slots:
    return {"images": ((3, spec.image_size, spec.image_size), np.float32)}


def _image(members: Members, spec: SampleSpec, draws: Draws) -> dict[str, np.ndarray]:
    """Return the picture; for an editing triplet, which has no plain picture, its output."""
    picture = decode(members.read_first((*EXTENSIONS, *(f"output.{extension}" for extension in EXTENSIONS))))
    along = float(draws("crop").random()) if spec.crop == "random" else 0.5
    mirrored = spec.flip and bool(draws("flip").random() < 0.5)
    return {"images": square(picture, spec.image_size, along, mirrored, spec.fit)}


def _language_slots(spec: SampleSpec) -> Slots:
    """Return the slots of a language task.

    `counts` is 1 for tokens that the model must predict; `patches` (N, 2) are the labels (shape, colour) of the
    picture's N tokens.
    """
    text: Slots = {"tokens": (None, np.int64), "counts": (None, np.uint8)}
    return {**_image_slots(spec), **text, "patches": ((spec.image_tokens, 2), np.uint8)}


def _language(
    name: str,
    picture: str | None,
    make: Callable[[TextTokenizer, Mapping[str, Any], np.random.Generator, int], Prompt],
) -> Task:
    """Return the language task `name` with the prompt that `make` builds from the sample's json.

    `picture` is the prefix of the picture member's name ("" or "input."), or None for a task without picture. The
    picture is the middle square, never mirrored, because the words name its sides.
    """

    def longest(spec: SampleSpec) -> int:
        return spec.task_tokens[name] + (0 if picture is None else spec.image_tokens)

    def fill(members: Members, spec: SampleSpec, draws: Draws) -> dict[str, np.ndarray]:
        record = _json_record(members)
        prompt = _as_bad_sample(lambda: make(spec.tokenizer, record, draws("words"), spec.image_tokens))
        if len(prompt.tokens) > longest(spec):
            raise BadSample(f"{len(prompt.tokens)} tokens; the maximum is {longest(spec)}")
        arrays = {
            "tokens": np.array(prompt.tokens, np.int64),
            "counts": np.array(prompt.counts, np.uint8),
            "patches": np.full((spec.image_tokens, 2), UNKNOWN, np.uint8),
            "images": np.zeros((3, spec.image_size, spec.image_size), np.float32),
        }
        if picture is not None:
            scene = record.get(f"{picture.replace('.', '_')}scene")
            arrays["patches"] = _as_bad_sample(lambda: shown_patches(scene, spec.image_size, spec.image_tokens))
            image = decode(members.read_first(f"{picture}{extension}" for extension in EXTENSIONS))
            arrays["images"] = square(image, spec.image_size, along=0.5, mirrored=False, fit=spec.fit)
        return arrays

    return Task(_language_slots, fill, longest)


def _as_bad_sample(make: Callable[[], Value]) -> Value:
    """Return the result of `make`; raise its errors as BadSample, because they come from the sample's texts."""
    try:
        return make()
    except (KeyError, IndexError, TypeError, ValueError, UserError) as error:
        raise BadSample(f"its texts cannot be trained on ({type(error).__name__}: {error})") from None


def _load_json(members: Members, extension: str = "json") -> Any:
    try:
        return json.loads(members.read_first([extension]))
    except (ValueError, RecursionError) as error:
        raise BadSample(f"its {extension} cannot be read ({error})") from None


def _json_record(members: Members, extension: str = "json") -> Mapping[str, Any]:
    record = _load_json(members, extension)
    if not isinstance(record, dict):
        raise BadSample(f"its {extension} holds {type(record).__name__}, not an object")
    return record


@dataclass(frozen=True)
class Conditioned:
    """The task of a target picture and the prompt that conditions it; only the choice of the text is random.

    `sides` are the prefixes of its picture members' names, the target first; the prompt begins with the other pictures.
    `texts(members)` returns the candidate texts of a source that names none; one of the candidates is drawn.
    `prompt(text, spec)` builds the prompt from it.
    """

    sides: tuple[str, ...]
    texts: Callable[[Members], list[str]]
    prompt: Callable[[str, SampleSpec], list[int]]

    @property
    def illustrated(self) -> bool:
        """Whether the prompt contains a picture."""
        return len(self.sides) > 1

    def slots(self, spec: SampleSpec) -> Slots:
        """Return the slots: `images` (M, 3, S, S), the target first, and `tokens`."""
        return {
            "images": ((len(self.sides), 3, spec.image_size, spec.image_size), np.float32),
            "tokens": (None, np.int64),
        }

    def length(self, spec: SampleSpec) -> int:
        """Return the number of tokens of the longest prompt."""
        return spec.num_tokens + (spec.image_tokens + 2 if self.illustrated else 0)

    def fill(self, members: Members, spec: SampleSpec, draws: Draws) -> dict[str, np.ndarray]:
        """Return the prompt and the pictures of a sample."""
        return {"tokens": self.tokens(members, spec, draws), "images": self.pictures(members, spec)}

    def tokens(self, members: Members, spec: SampleSpec, draws: Draws) -> np.ndarray:
        """Return the tokens (n,) of a prompt with a drawn text; caption dropout makes it unconditional."""
        texts, draw = self.candidates(members, spec), draws("words").random()
        dropped = draws("caption_drop").random() < spec.caption_dropout
        return self._tokens("" if dropped else texts[int(draw * len(texts))], spec)

    def prompts(self, members: Members, spec: SampleSpec) -> list[np.ndarray]:
        """Return the tokens of every prompt that can be drawn, the unconditional one last; skip bad texts."""
        prompts = []
        for text in (*self.candidates(members, spec), ""):
            with contextlib.suppress(BadSample):
                prompts.append(self._tokens(text, spec))
        return prompts

    def pictures(self, members: Members, spec: SampleSpec) -> np.ndarray:
        """Return the pictures (M, 3, S, S) as squares, never mirrored, because the words name their sides."""
        data = [members.read_first(f"{side}{extension}" for extension in EXTENSIONS) for side in self.sides]
        return np.stack([square(decode(one), spec.image_size, 0.5, mirrored=False, fit=spec.fit) for one in data])

    def candidates(self, members: Members, spec: SampleSpec) -> list[str]:
        """Return the texts of a sample, one of which is drawn; never an empty one."""
        if not spec.texts:
            return self.texts(members)
        return [text for name in spec.texts for text in _named_texts(members, name)]

    def _tokens(self, text: str, spec: SampleSpec) -> np.ndarray:
        tokens, limit = _as_bad_sample(lambda: self.prompt(text, spec)), self.length(spec)
        while len(tokens) > limit and spec.long_captions == "cut":
            text = spec.tokenizer.shorten(text, len(tokens) - limit)
            if not text:  # the prompt of an empty text is the unconditional one, which the sample must not become
                break
            tokens = self.prompt(text, spec)
        if len(tokens) > limit:
            remedy = "; data.long_captions=cut shortens such texts" if spec.long_captions == "refuse" else ""
            raise BadSample(f"{len(tokens)} tokens; the maximum is {limit}{remedy}")
        return np.array(tokens, np.int64)


def _captions(members: Members) -> list[str]:
    """Return the `captions` of the json if it is an object that lists some, else the txt, else its `caption`.

    The last is how img2dataset writes it.
    """
    has_text, record = "txt" in members.extensions, {}
    if "json" in members.extensions:
        content = _load_json(members)
        if isinstance(content, dict):
            record = content
        elif not has_text:
            raise BadSample(f"its json holds {type(content).__name__}, not an object, and it has no txt")
    if record.get("captions") not in (None, []):
        return _checked(record["captions"], "captions", only_list=True)
    if has_text or "json" not in members.extensions:
        return [_text(members, "txt")]
    if record.get("caption") is not None:
        return _checked(record["caption"], "caption")
    found = ", ".join(members.extensions)
    raise BadSample(f"no member txt, and its json lists no captions and has no caption; the sample has {found}")


def _named_texts(members: Members, name: str) -> list[str]:
    """Return the texts in a member: `txt` is its content, `json:KEY` a text or a list of texts in its object."""
    extension, _, key = name.partition(":")
    if not key:
        return [_text(members, extension)]
    record = _json_record(members, extension)
    if key not in record:
        raise BadSample(f"its {extension} has no '{key}'{nearest(key, record)}")
    return _checked(record[key], key)


def _checked(value: Any, key: str, only_list: bool = False) -> list[str]:
    """Return the texts in a value of a json. Raises BadSample for another type, and where one of them is empty."""
    texts = [value] if isinstance(value, str) and not only_list else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise BadSample(f"its {key} {'are not' if only_list else 'is neither a text nor'} a list of texts")
    cleaned = [_clean(text) for text in texts]
    if not all(cleaned):
        raise BadSample(f"its {key} is empty" if isinstance(value, str) else f"one of its {key} is empty")
    return cleaned


def _text(members: Members, extension: str) -> str:
    """Return a member's text. Raises BadSample unless it is UTF-8 (a byte order mark is allowed) and not empty."""
    data = members.read_first([extension])
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data:
        raise BadSample(f"its {extension} is not UTF-8 but UTF-16, UTF-32 or binary; write it as UTF-8")
    try:
        text = _clean(data.decode())
    except UnicodeDecodeError as error:
        raise BadSample(f"its {extension} is not UTF-8 ({error})") from None
    if not text:
        raise BadSample(f"its {extension} is empty")
    return text


def _clean(text: str) -> str:
    """Return a text without byte order marks (Windows editors write them) and surrounding white space.

    A text without any character that is visible, such as one of zero-width spaces, is empty.
    """
    stripped = text.replace("\ufeff", "").strip()
    return stripped if any(sign.isprintable() and not sign.isspace() for sign in stripped) else ""


TASKS: dict[str, Task | Conditioned] = {
    "images": Task(_image_slots, _image),
    "captions": _language("captions", "", caption_prompt),
    "questions": _language("questions", "", question_prompt),
    "edits": _language("edits", "input.", edit_prompt),
    "texts": _language("texts", None, text_prompt),
    "generation": Conditioned(("",), _captions, lambda text, spec: spec.tokenizer.generation_prompt(text)),
    "editing": Conditioned(
        ("output.", "input."),
        lambda members: [_text(members, "txt")],  # the instruction; the source picture is never dropped
        lambda text, spec: spec.tokenizer.editing_prompt(text, spec.image_tokens),
    ),
}
MIXTURES = {"language": ("captions", "questions", "edits", "texts"), "conditioned": ("generation", "editing")}
