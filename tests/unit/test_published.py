"""Published directories load exactly, whatever their layout, in the precision and memory that a run needs; others are
refused with what is needed instead."""

from __future__ import annotations

import ctypes
import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from parallel.errors import UserError
from spar_scale.files import random_weights
from spar_scale.models.presets import PRESETS, resized
from spar_scale.models.published import (
    PretrainedPart,
    copy_weights,
    deferred_weights,
    fp32_values,
    read_weights,
    replace_values,
)
from spar_scale.training.encode import frozen_digests

PRESET: Any = resized(
    PRESETS["tiny"],
    name="tiny",
    language={"rope_factor": 2.0},
    autoencoder={"downsample": "Conv", "upsample": "interpolate", "scaling_factor": 0.41407},
)
LOADERS: dict[str, Callable[[PretrainedPart], nn.Module]] = {
    "mllm": lambda part: PRESET.language.load(part, PRESET.vision),
    "vision": lambda part: PRESET.vision.load(part),
    "diffusion": lambda part: PRESET.diffusion.load(part),
    "pixel_autoencoder": lambda part: PRESET.autoencoder.load(part)[0],
}
WRITERS: dict[str, Callable[[Path], None]] = {
    "mllm": lambda folder: random_weights.write_mllm(folder, PRESET),
    "vision": lambda folder: random_weights.write_mllm(folder, PRESET),
    "diffusion": lambda folder: random_weights.write_diffusion(folder, PRESET),
    "pixel_autoencoder": lambda folder: random_weights.write_autoencoder(folder, PRESET),
}
WORDS, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
FILE = "diffusion_pytorch_model.safetensors"


def load(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return LOADERS[name](PretrainedPart(name, folder, "tiny", dtype))


def edit(folder: Path, **changes: Any) -> None:
    """Set keys of config.json, `__` for a dot; None takes one out."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = config
        for parent in parents:
            place = place[parent]
        place[last] = value
        if value is None:
            del place[last]
    path.write_text(json.dumps(config))


def same(model: nn.Module, other: nn.Module) -> bool:
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


@pytest.mark.parametrize("flag", [None, False, True])
def test_both_layouts_of_the_language_model_load_alike_whatever_the_flag_says(tmp_path: Path, flag: bool | None):
    random_weights.write_mllm(tmp_path / "older", PRESET, "older", tie_flag=flag)
    random_weights.write_mllm(tmp_path / "newer", PRESET, "newer", tie_flag=flag)
    older, newer = load("mllm", tmp_path / "older"), load("mllm", tmp_path / "newer")
    stored = load_file(tmp_path / "newer" / "model.safetensors")
    assert "language_model.lm_head.weight" in load_file(tmp_path / "older" / "model.safetensors")
    assert stored.keys() == newer.state_dict().keys() and same(older, newer)
    assert all(torch.equal(tensor, stored[name].float()) for name, tensor in newer.state_dict().items())
    assert not torch.equal(newer.get_parameter(WORDS), newer.get_parameter(HEAD))
    tower = load("vision", tmp_path / "older")
    assert all(
        torch.equal(tensor, stored[f"model.{name}".replace("model.projector", "model.multi_modal_projector")].float())
        for name, tensor in tower.state_dict().items()
    )


@pytest.mark.parametrize("flag", [None, True])
def test_a_file_without_a_head_has_that_of_its_words(tmp_path: Path, flag: bool | None):
    random_weights.write_mllm(tmp_path, PRESET, tie_flag=flag, with_head=False)
    model = load("mllm", tmp_path)
    words, head = model.get_parameter(WORDS), model.get_parameter(HEAD)
    assert torch.equal(words, head) and words.data_ptr() != head.data_ptr()


def test_a_head_that_is_missing_where_the_config_says_that_it_is_its_own_is_refused(tmp_path: Path):
    random_weights.write_mllm(tmp_path, PRESET, tie_flag=False, with_head=False)
    with pytest.raises(UserError, match=r"missing weight lm_head\.weight in "):
        load("mllm", tmp_path)


def test_several_files_with_an_index_are_one_part(tmp_path: Path):
    random_weights.write_diffusion(tmp_path / "whole", PRESET)
    random_weights.write_diffusion(tmp_path / "shards", PRESET, shards=3)
    assert same(load("diffusion", tmp_path / "whole"), load("diffusion", tmp_path / "shards"))
    (tmp_path / "shards" / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"holds no diffusion_pytorch_model-00002-of-00003\.safetensors, which diffusion"
    ):
        load("diffusion", tmp_path / "shards")
    (tmp_path / "shards" / f"{FILE}.index.json").write_text('{"weight_map": {"x": "../whole/x.safetensors"}}')
    with pytest.raises(UserError, match=r"holds no \.\./whole/x\.safetensors, which"):
        load("diffusion", tmp_path / "shards")
    (tmp_path / "shards" / f"{FILE}.index.json").write_text("[]")
    with pytest.raises(UserError, match="cannot be read as an index of weights"):
        load("diffusion", tmp_path / "shards")


def test_an_autoencoder_s_convolutions_may_be_spelled_either_way(tmp_path: Path):
    for spelling in ("Conv", "conv"):
        random_weights.write_autoencoder(tmp_path / spelling, PRESET, conv=spelling)
        assert json.loads((tmp_path / spelling / "config.json").read_text())["downsample_block_type"] == spelling
    assert same(load("pixel_autoencoder", tmp_path / "Conv"), load("pixel_autoencoder", tmp_path / "conv"))
    edit(tmp_path / "conv", downsample_block_type="pixel_unshuffle")
    with pytest.raises(UserError, match="downsample_block_type = pixel_unshuffle, preset 'tiny' needs Conv"):
        load("pixel_autoencoder", tmp_path / "conv")


NUMBERS: list[tuple[str, dict[str, Any], str]] = [
    ("mllm", {"text_config__rms_norm_eps": 1e-5}, "has text_config.rms_norm_eps = 1e-05, preset 'tiny' needs 1e-06"),
    ("mllm", {"text_config__rope_theta": 1e6}, "rope_parameters.rope_theta = 1000000.0, preset 'tiny' needs 10000.0"),
    ("mllm", {"text_config__rope_scaling__factor": 4.0}, "rope_parameters.factor = 4.0, preset 'tiny' needs 2.0"),
    ("mllm", {"text_config__rope_scaling": None}, "rope_parameters.rope_type = default, preset 'tiny' needs dynamic"),
    ("mllm", {"text_config__hidden_act": "gelu"}, "text_config.hidden_act = gelu, preset 'tiny' needs silu"),
    ("mllm", {"text_config__use_sliding_window": True}, "text_config.use_sliding_window = True, preset"),
    ("mllm", {"text_config__max_position_embeddings": 64}, "max_position_embeddings = 64, preset 'tiny' needs 128"),
    ("vision", {"vision_config__layer_norm_eps": 1e-5}, "has vision_config.layer_norm_eps = 1e-05, preset 'tiny'"),
    ("vision", {"vision_config__attention_bias": None}, "has no vision_config.attention_bias, which means False, pre"),
    ("vision", {"vision_config__use_qk_norm": True}, "vision_config.use_qk_norm = True, preset 'tiny' needs False"),
    ("vision", {"vision_config__patch_size": 14}, r"vision_config.patch_size = 14, preset 'tiny' needs \[8, 8\]"),
    ("vision", {"vision_feature_layer": -2}, "vision_feature_layer = -2, preset 'tiny' needs -1"),
    ("vision", {"projector_hidden_act": "relu"}, "projector_hidden_act = relu, preset 'tiny' needs gelu"),
    ("vision", {"downsample_ratio": None}, "has no downsample_ratio, which means 0.5, preset 'tiny' needs 1.0"),
    ("diffusion", {"norm_eps": 1e-5}, "has norm_eps = 1e-05, preset 'tiny' needs 1e-06"),
    ("diffusion", {"timestep_scale": 1e-3}, "has timestep_scale = 0.001, preset 'tiny' needs 1.0"),
    (
        "diffusion",
        {"qk_norm": "rms_norm_across_heads"},
        "has qk_norm = rms_norm_across_heads, preset 'tiny' needs None",
    ),
    ("diffusion", {"sample_size": None}, "has no sample_size, which means 32, preset 'tiny' needs 4"),
    ("pixel_autoencoder", {"scaling_factor": 0.5}, "has scaling_factor = 0.5, preset 'tiny' needs 0.41407"),
    ("pixel_autoencoder", {"scaling_factor": None}, "has no scaling_factor, which means 1.0, preset 'tiny' needs"),
    ("pixel_autoencoder", {"decoder_act_fns": "relu"}, "has decoder_act_fns = relu, preset 'tiny' needs silu"),
]


@pytest.mark.parametrize(("name", "change", "message"), NUMBERS)
def test_a_number_that_changes_the_output_is_held_against_the_preset(
    tmp_path: Path, name: str, change: dict[str, Any], message: str
):
    WRITERS[name](tmp_path)
    edit(tmp_path, **change)
    with pytest.raises(UserError, match=message) as refusal:
        load(name, tmp_path)
    assert str(refusal.value).startswith(f"model.pretrained.{name}: {tmp_path / 'config.json'} has ")


def _rename(folder: Path, name: str) -> None:
    (folder / FILE).rename(folder / name)


KINDS: list[tuple[str, Callable[[Path], object], str]] = [
    (
        "mllm", lambda d: edit(d, model_type="internvl_chat"),
        "model_type = internvl_chat, 'internvl' is needed: .* whose name ends in -hf .OpenGVLab/InternVL3-1B-hf",
    ),
    ("vision", lambda d: edit(d, model_type="internvl_chat"), "whose name ends in -hf"),
    (
        "diffusion", lambda d: edit(d, _class_name="FluxTransformer2DModel"),
        "_class_name = FluxTransformer2DModel, 'SanaTransformer2DModel' is needed: the folder `transformer`",
    ),
    ("pixel_autoencoder", lambda d: edit(d, _class_name="AutoencoderKL"), "'AutoencoderDC' is needed"),
    (
        "diffusion", lambda d: _rename(d, "diffusion_pytorch_model.fp16.safetensors"),
        "holds the variant 'fp16' only .*; diffusion_pytorch_model.safetensors is needed, the weights in full",
    ),
    (
        "pixel_autoencoder", lambda d: _rename(d, "diffusion_pytorch_model.bin"),
        "holds pickled weights only .diffusion_pytorch_model.bin., which are never read; diffusion_pytorch_model.safet",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "message"), KINDS)
def test_a_directory_of_another_kind_is_told_what_is_needed(
    tmp_path: Path, name: str, damage: Callable[[Path], object], message: str
):
    WRITERS[name](tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as refusal:
        load(name, tmp_path)
    assert str(refusal.value).startswith(f"model.pretrained.{name}: ")


@pytest.mark.parametrize("name", LOADERS)
def test_headers_alone_are_held_against_the_preset_where_nothing_has_values(tmp_path: Path, name: str):
    WRITERS[name](tmp_path)
    part = PretrainedPart(name, tmp_path, "tiny", headers_only=True)
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in LOADERS[name](part).parameters())
    (path,) = tmp_path.glob("*.safetensors")
    weights = load_file(path)
    last = max(weights)  # one of the vision tower, where there is one
    save_file({**weights, last: torch.zeros(3)}, path)
    with torch.device("meta"):
        LOADERS[name](replace(part, headers_only=False))
        with pytest.raises(UserError, match=rf"{path.name} has {last} of shape \(3,\), preset 'tiny' needs"):
            LOADERS[name](part)


@pytest.mark.parametrize("name", LOADERS)
def test_weights_come_in_the_run_s_precision_and_buffers_keep_theirs(tmp_path: Path, name: str):
    WRITERS[name](tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    save_file({key: tensor.float() + 1e-3 for key, tensor in load_file(path).items()}, path)  # no values of bf16
    whole, half = load(name, tmp_path), load(name, tmp_path, torch.bfloat16)
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}
    for key, parameter in half.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(key).bfloat16()) and parameter.requires_grad, key
    assert all(torch.equal(buffer, whole.get_buffer(key)) for key, buffer in half.named_buffers())


def test_weights_that_are_deferred_are_read_where_they_are_kept(tmp_path: Path):
    random_weights.write_diffusion(tmp_path, PRESET)
    with deferred_weights():
        model = load("diffusion", tmp_path)
    blocks = model.transformer.transformer_blocks
    before = blocks[0].attn1.to_q.weight
    assert all(parameter.is_meta for parameter in model.parameters())
    read_weights(blocks[0])
    assert before is blocks[0].attn1.to_q.weight and not any(value.is_meta for value in blocks[0].parameters())
    assert all(parameter.is_meta for parameter in blocks[1].parameters())
    read_weights(model)
    assert same(model, load("diffusion", tmp_path))


def test_a_deferred_copy_is_read_like_its_source_and_what_a_parent_trained_replaces_both(tmp_path: Path):
    random_weights.write_diffusion(tmp_path, PRESET)
    other, whole = PRESET.diffusion.build(), load("diffusion", tmp_path)
    with deferred_weights():
        model = load("diffusion", tmp_path, torch.bfloat16)
        copy_weights(other, model)
    assert all(parameter.is_meta for parameter in other.parameters())  # what it had before takes no memory
    bias = "transformer.proj_out.bias"
    trained = torch.full_like(whole.get_parameter(bias), 1 / 3)
    replace_values(other.get_parameter(bias), trained)
    read_weights(other)
    read_weights(model)
    replace_values(model.get_parameter(bias), trained)
    assert same(model, other) and {tensor.dtype for tensor in other.parameters()} == {torch.bfloat16}
    assert torch.equal(other.get_parameter(bias), trained.bfloat16())
    assert torch.equal(fp32_values(model.get_parameter(bias)), trained.bfloat16().float())  # its file's no longer


def test_a_digest_is_of_what_is_in_the_files_whatever_the_precision(tmp_path: Path):
    random_weights.write_diffusion(tmp_path, PRESET)
    with deferred_weights():
        models = [load("diffusion", tmp_path, dtype) for dtype in (torch.float32, torch.bfloat16)]
    models += [load("diffusion", tmp_path, dtype) for dtype in (torch.float32, torch.bfloat16)]
    models.append(PRESET.diffusion.build())
    models[-1].load_state_dict(models[2].state_dict())  # which no file stands behind
    for model in models:
        model.requires_grad_(False)
    first, *others = (frozen_digests(model) for model in models)
    assert first.keys() == {"transformer"} and all(other == first for other in others)


def _peak_bytes(act: Callable[[], Any]) -> tuple[Any, int]:
    """What a call gives, and the memory that it took at its peak above what there was before."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests have freed would be used again, unseen
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    return act(), status("VmHWM") - before


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """A diffusion transformer of 50 million parameters, in bf16."""
    preset = resized(PRESET, name="large", diffusion={"heads": 24, "cross_heads": 24, "layers": 8})
    folder = tmp_path_factory.mktemp("large")
    random_weights.write_diffusion(folder, preset, torch.bfloat16)
    yield preset, folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_loading_holds_little_more_than_the_weights(large: tuple[Any, Path], dtype: torch.dtype):
    preset, folder = large
    part = PretrainedPart("diffusion", folder, "large", dtype)
    with torch.device("meta"):
        preset.diffusion.load(part)
    model, peak = _peak_bytes(lambda: preset.diffusion.load(part))
    kept = sum(tensor_bytes(parameter) for parameter in model.parameters())
    assert kept > 80e6 and peak <= 1.3 * kept


def tensor_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
