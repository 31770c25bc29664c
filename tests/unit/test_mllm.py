"""The language model: its layers against the class's own forward, the loss by hand, asking."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from packed import batch_of
from PIL import Image
from tiny_parts import make_parts
from tiny_runs import phase_values
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, InternVLForConditionalGeneration, Qwen2Config

from parallel.errors import UserError
from parallel.program import Program
from spar_scale.config.recipe import Recipe
from spar_scale.data.patches import NUM_LABELS, UNKNOWN
from spar_scale.data.prompts import TOKENS, miniature_text
from spar_scale.inference.ask import answer
from spar_scale.inference.commands import ask
from spar_scale.models.internvl.language import Rotary, merge
from spar_scale.models.internvl.layers import PromptPositions
from spar_scale.models.internvl.model import mllm_config
from spar_scale.models.internvl.vision import normalise
from spar_scale.models.presets import PRESETS, resized
from spar_scale.models.published import PretrainedPart
from spar_scale.objectives.next_token import next_token_loss
from spar_scale.stages import build
from spar_scale.stages.bootstrap_mllm import NamePatches
from spar_scale.stages.forward import Forward

TINY: Any = PRESETS["tiny"]
TEXT = miniature_text()


def opening() -> Any:
    return TEXT.prompt().ask("<bos> {picture}", image_tokens=16)


def new_stage() -> Any:
    model, objective = SimpleNamespace(preset="tiny", image_size=None, pretrained={}), SimpleNamespace()
    recipe: Any = SimpleNamespace(
        stage="bootstrap", phase="mllm", seed=0, run_dir=Path("."), model=model, objective=objective
    )
    return build(recipe)


@pytest.fixture
def stage():
    built = new_stage()
    with torch.no_grad():  # away from the start, where every word is about as likely
        for parameter in built.model.parameters():
            parameter.mul_(2)
    return built


def rows_of(size=3) -> list[dict[str, torch.Tensor]]:
    """Prompts about pictures, of different lengths, each with an answer."""
    generator, rows = torch.Generator().manual_seed(0), []
    for row in range(size):
        start, end = torch.tensor(opening().tokens), 30 + 9 * row
        words = torch.randint(3, 59, (end - len(start),), generator=generator)
        counts = torch.zeros(end, dtype=torch.uint8)
        counts[25::2] = 1
        rows.append({"tokens": torch.cat([start, words]), "counts": counts, "lengths": torch.tensor(end)})
    for row in rows:
        row["patches"] = torch.stack([torch.randint(n, (16,), generator=generator) for n in NUM_LABELS], -1).byte()
        row["images"] = torch.rand(3, 32, 32, generator=generator)
    return rows


def terms_of(stage, rows):
    return Program(stage.layers, stage.inputs, list(stage.terms))(batch_of(rows))[:, 0]


def padded_tokens(rows) -> torch.Tensor:
    return pad_sequence([row["tokens"] for row in rows], batch_first=True)


def pictures_of(rows) -> torch.Tensor:
    return torch.stack([row["images"] for row in rows])


def published(stage):
    """The library's own model with the stage's weights, without the head that is thrown away."""
    own = InternVLForConditionalGeneration(mllm_config(TINY.vision, TINY.language))
    own.set_attn_implementation("eager")
    weights = stage.model.state_dict()
    own.load_state_dict({name: weight for name, weight in weights.items() if not name.startswith("naming_head")})
    return own


def test_words_start_as_far_apart_as_the_preset_says_and_other_weights_as_near(monkeypatch):
    language = new_stage().model.model.language_model
    assert language.embed_tokens.weight.std().item() == pytest.approx(TINY.language.word_range, rel=0.03)
    hidden = language.layers[3].mlp.up_proj.weight
    assert hidden.std().item() == pytest.approx(TINY.language.initializer_range, rel=0.03)
    monkeypatch.setitem(PRESETS, "tiny", resized(TINY, name="tiny", language={"word_range": 0.3}))
    nearer = new_stage().model.model.language_model
    assert nearer.embed_tokens.weight.std().item() == pytest.approx(0.3, rel=0.03)
    assert torch.equal(nearer.layers[3].mlp.up_proj.weight, hidden)


def test_the_layers_equal_the_classs_own_forward_in_loss_and_gradients(stage):
    rows = rows_of()
    terms = terms_of(stage, rows)
    terms.sum().backward()
    own, tokens = published(stage), padded_tokens(rows)
    logits = own(input_ids=tokens, attention_mask=(tokens > 0).long(), pixel_values=normalise(pictures_of(rows))).logits
    losses = []
    for row, of_row in zip(rows, logits, strict=True):
        labels = row["tokens"].masked_fill(row["counts"] == 0, -100)
        losses.append(F.cross_entropy(of_row[: len(labels) - 1], labels[1:]))
    torch.testing.assert_close(terms, torch.stack(losses), rtol=1e-5, atol=1e-6)
    torch.stack(losses).sum().backward()
    compared = 0
    for name, parameter in own.named_parameters():
        assert parameter.grad is not None
        found = stage.model.get_parameter(name).grad
        floor = 1e-7 + 1e-4 * parameter.grad.abs().max().item()  # the keys' biases have no gradient but rounding
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=floor)
        compared += 1
    assert compared == len(list(stage.model.parameters())) - len(list(stage.model.naming_head.parameters()))


def test_the_layers_logits_equal_the_classs_own(stage):
    rows = rows_of()
    forward, own = Forward(stage, TINY), published(stage)
    prompt = {name: value for name, value in batch_of(rows).items() if name in ("images", "tokens", "lengths")}
    found = forward.run("logits", **prompt)["logits"].split([len(row["tokens"]) for row in rows])
    expected = own(input_ids=padded_tokens(rows), pixel_values=normalise(pictures_of(rows))).logits
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its[: len(mine)], rtol=1e-5, atol=1e-4)
    prompts = [row["tokens"][:end].tolist() for row, end in zip(rows, (18, 30, 19), strict=True)]
    next_token = forward.next_token(prompts, forward.features(pictures_of(rows)))
    ends = torch.tensor([len(prompt) for prompt in prompts])
    torch.testing.assert_close(next_token, expected[torch.arange(3), ends - 1], rtol=1e-5, atol=1e-4)


def test_a_samples_loss_depends_on_nothing_but_the_sample(stage):
    rows = rows_of()
    together = terms_of(stage, rows)
    empty = {name: torch.zeros_like(value) for name, value in rows[1].items()}
    empty |= {"tokens": torch.zeros(1, dtype=torch.int64), "counts": torch.zeros(1, dtype=torch.uint8)}
    beside = terms_of(stage, [rows[0], {**empty, "lengths": torch.tensor(1)}, rows[2]])  # no picture, nothing counts
    assert beside[1] == 0
    torch.testing.assert_close(beside[[0, 2]], together[[0, 2]], rtol=1e-6, atol=0)
    torch.testing.assert_close(terms_of(stage, rows[2:]), together[2:], rtol=1e-6, atol=0)


def test_the_picture_and_every_word_before_an_answer_matter(stage):
    (row,) = rows_of(1)
    before = terms_of(stage, [row])
    assert not torch.allclose(terms_of(stage, [{**row, "images": row["images"].flip(2)}]), before, rtol=1e-6)
    tokens = row["tokens"].clone()
    tokens[20] = (tokens[20] - 2) % 56 + 3
    assert not torch.allclose(terms_of(stage, [{**row, "tokens": tokens}]), before, rtol=1e-6)


def test_naming_patches_by_hand(stage):
    (naming,) = [layer for layer in stage.layers if isinstance(layer, NamePatches)]
    biases = torch.zeros(sum(NUM_LABELS))
    biases[0] = 1.0  # the first of the shapes: ground
    naming.head.load_state_dict({"weight": torch.zeros(len(biases), 128), "bias": biases})
    features = torch.rand(3, 16, 128)
    patches = torch.full((3, 16, 2), UNKNOWN, dtype=torch.uint8)
    patches[0], patches[1] = torch.tensor([0, 3]), torch.tensor([2, 0])
    (found,) = naming(features, patches).values()
    colors = math.log(NUM_LABELS[1])
    total = math.log(math.e + NUM_LABELS[0] - 1)
    torch.testing.assert_close(found, torch.tensor([total - 1 + colors, total + colors, 0.0]))


def test_next_token_loss_by_hand():
    logits = torch.zeros(6, 2, dtype=torch.bfloat16)
    logits[0, 1] = 1.0
    logits[1, 0] = 2.0
    logits[2, 1] = 9.0  # before the other sample's first token, which is never predicted
    tokens = torch.tensor([1, 1, 0, 0, 1, 1])
    counts = torch.tensor([1, 1, 1, 1, 0, 0], dtype=torch.uint8)
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-2))) / 2
    loss = next_token_loss(logits, tokens, counts, torch.tensor([3, 3]))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor([expected, 0.0]))


def test_merge_puts_features_in_order_where_the_picture_stands():
    embedded, features = torch.zeros(9, 1), torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]], [[5.0], [6.0]]])
    is_image = torch.tensor([False, True, True, False, False, False, True, False, True])
    lengths = torch.tensor([4, 2, 3])
    assert merge(embedded, features, is_image, lengths)[:, 0].tolist() == [0, 1, 2, 0, 0, 0, 5, 0, 6]


def test_rotary_angles_by_hand():
    config = Qwen2Config(
        hidden_size=4, num_attention_heads=1, rope_parameters={"rope_type": "default", "rope_theta": 100.0}
    )
    slots = PromptPositions(Rotary(config))(torch.zeros(5, dtype=torch.int64), torch.tensor([3, 2]))
    angles = [[p, p / 10, p, p / 10] for p in (0, 1, 2, 0, 1)]
    for name, function in (("rotary_cos", math.cos), ("rotary_sin", math.sin)):
        torch.testing.assert_close(slots[name], torch.tensor([[function(a) for a in row] for row in angles]))
    assert slots["prompt_bounds"].tolist() == [0, 3, 5]


def test_greedy_words_are_those_of_the_librarys_generate(stage):
    model = stage.model.eval()
    images, forward = pictures_of(rows_of(1)), Forward(stage, TINY)
    tokens = opening().ask("describe :").tokens
    found = forward.continue_prompt(tokens, forward.features(images), frozenset(), limit=6)
    expected = model.generate(
        input_ids=torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens), dtype=torch.int64),
        pixel_values=normalise(images), do_sample=False, max_new_tokens=6, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert found == expected[0, len(tokens) :].tolist() and len(found) == 6
    assert forward.continue_prompt(tokens, forward.features(images), frozenset(found[:1]), limit=6) == []


def test_the_published_layout_gives_the_next_stages_their_tower_and_the_words(stage, tmp_path):
    stage.export.write(stage, tmp_path, None)
    encoder: Any = TINY.vision.load(PretrainedPart("mllm", tmp_path, "tiny"))
    found = stage.model.model
    for part, own in ((encoder.vision_tower, found.vision_tower), (encoder.projector, found.multi_modal_projector)):
        assert all(torch.equal(value, own.state_dict()[name]) for name, value in part.state_dict().items())
    model = InternVLForConditionalGeneration.from_pretrained(tmp_path, use_safetensors=True)
    rows = rows_of(1)
    given = {"input_ids": padded_tokens(rows), "pixel_values": normalise(pictures_of(rows))}
    torch.testing.assert_close(model(**given).logits, stage.model(**given).logits, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path)("describe : a cyan circle")["input_ids"] == TEXT.encode(
        "describe : a cyan circle"
    )


def test_an_answer_is_words_about_a_picture_of_any_size(stage):
    stage.model.eval()
    reply = answer(Forward(stage, TINY), Image.new("RGB", (70, 41), "red"), "what color is the circle ?")
    beyond = {f"<{token}>" for token in range(len(TOKENS), TINY.language.vocab_size)}  # a vocabulary is padded
    assert reply and set(reply.split()) <= set(TOKENS) | beyond


QUESTIONS = {
    "What color is the circle?": "what color is the circle ?",
    "how many objects are there": "how many objects are there ?",
    "  is there a RED square ?": "is there a red square ?",
    "a circle, a square": "a circle , a square ?",
}


@pytest.mark.parametrize("typed", QUESTIONS)
def test_a_question_is_read_as_people_type_it(typed):
    assert TEXT.normalize(typed, "question") == QUESTIONS[typed]


def test_an_empty_question_is_refused():
    with pytest.raises(UserError, match=r"^the question is empty"):
        TEXT.normalize("  ", "question")


def write_run(folder, stage="bootstrap", phase="mllm"):
    folder.mkdir()
    (folder / "recipe.yaml").write_text(
        f"stage: {stage}\nphase: {phase}\nmodel: {{preset: tiny}}\nrun_dir: x\nglobal_batch: 4\ntrain: {{steps: 1}}\n"
        "optimizer: {lr: 1.0e-3}\ndata: {task_block: 4, sources: [{name: captions, shards: x}]}\n"
        "checkpoint: {every: 1}\n"
    )
    Image.new("RGB", (40, 50), "red").save(folder / "picture.png")
    return folder


def test_what_cannot_be_asked_is_refused_before_anything_is_loaded(tmp_path):
    other = write_run(tmp_path / "other", phase="autoencoder")
    with pytest.raises(UserError, match=r"'autoencoder', which answers no questions; .* phase 'mllm', or .* is needed"):
        ask(other, other / "picture.png", "what color is the circle?")
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"unknown words: 'colour'; did you mean 'color'\?"):
        ask(run, run / "picture.png", "what colour is the circle?")
    with pytest.raises(UserError, match=r"holds no recipe\.yaml"):
        ask(tmp_path, run / "picture.png", "what color is the circle?")
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        ask(run, run / "picture.png", "what color is the circle?")


def test_within_spar_the_language_model_answers_as_the_librarys_generate(tmp_path):
    """The prompt shows features of the tokenizer's vision tower."""
    values = phase_values(tmp_path / "run", "align/joint", tmp_path, make_parts(tmp_path))
    stage = build(Recipe.model_validate_json(json.dumps(values)))
    spar: Any = stage.model.eval()
    with torch.no_grad():
        for parameter in spar.language_model.parameters():
            parameter.mul_(2)
    whole: Any = InternVLForConditionalGeneration(mllm_config(TINY.vision, TINY.language)).eval()
    whole.model.language_model.load_state_dict(spar.language_model.state_dict())
    whole.lm_head.load_state_dict(spar.lm_head.state_dict())
    whole.model.vision_tower.load_state_dict(spar.tokenizer.vision_tower.state_dict())
    whole.model.multi_modal_projector.load_state_dict(spar.tokenizer.projector.state_dict())
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    tokens = torch.tensor([opening().ask("question : how many objects are there ? answer :").tokens])
    expected = whole.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=16,
        pixel_values=normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255),
        eos_token_id=[TOKENS["."], TOKENS["<eos>"]], pad_token_id=0,
    )[0, tokens.shape[1] :].tolist()  # fmt: skip
    words = TEXT.decode([token for token in expected if token not in (TOKENS["."], TOKENS["<eos>"])])
    assert answer(Forward(stage, TINY), Image.fromarray(pixels), "how many objects are there ?") == words
    assert words
