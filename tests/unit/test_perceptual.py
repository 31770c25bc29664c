"""The perceptual loss: its values are those of the packages `lpips` and torchvision, and only whole files are read.

The stored numbers are of lpips 0.1.4 (`LPIPS(net="vgg", pretrained=False, pnet_rand=True)`, `normalize=True`) and
torchvision 0.28.0 (`convnext_small(weights=None)`), with the weights of `perceptual_networks` copied into both. The
packages are no requirement of the tests, because torchvision demands one exact version and build of torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from parallel.costs import layer_costs
from parallel.errors import UserError
from parallel.program import Apply
from spar_scale.config.recipe import Recipe, load_recipe
from spar_scale.files.random_weights import PERCEPTUAL_FILES, perceptual_networks, write_perceptual
from spar_scale.models.published import PretrainedPart
from spar_scale.objectives.perceptual import PerceptualDistance
from spar_scale.planning.plan import plan
from spar_scale.stages.perceptual import PerceptualLoss, perceptual_loss
from spar_scale.training.admission import refusals
from spar_scale.training.encode import frozen_digests

ROOT = Path(__file__).resolve().parents[2]
LPIPS = [0.14518465101718903, 0.14281395077705383]
ALONG_NOISE = [2.1984853744506836, 2.20072603225708]  # the gradient's scalar product with the noise, and its norm
NORM = 0.06155345216393471
CONVNEXT = [0.013062176294624805, 0.012710525654256344]
AT_448 = 0.006097211502492428  # of ConvNeXt, for a picture of 448 pixels; 0.0092 without antialiasing
BOTH_ALONG_NOISE = [2.2216415405273438, 2.2235207557678223]


@pytest.fixture(scope="module")
def networks() -> dict[str, PerceptualDistance]:
    return {"lpips": perceptual_networks(convnext=False), "lpips_convnext": perceptual_networks()}


@pytest.fixture(scope="module")
def pictures() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(2, 3, 48, 48, generator=generator)
    noise = torch.randn(2, 3, 48, 48, generator=generator)
    return target + 0.1 * noise, target, noise


@pytest.mark.parametrize(
    ("kind", "values", "along_noise"),
    [
        ("lpips", LPIPS, ALONG_NOISE),
        ("lpips_convnext", [a + 0.1 * b for a, b in zip(LPIPS, CONVNEXT, strict=True)], BOTH_ALONG_NOISE),
    ],
)
def test_values_and_gradients_are_those_of_the_published_packages(networks, pictures, kind, values, along_noise):
    prediction, target, noise = pictures
    prediction = prediction.clone().requires_grad_()
    found = networks[kind](prediction, target)
    (gradient,) = torch.autograd.grad(found.sum(), prediction)
    assert found.tolist() == pytest.approx(values, rel=1e-5)
    assert (gradient * noise).sum((1, 2, 3)).tolist() == pytest.approx(along_noise, rel=1e-5)
    if kind == "lpips":
        assert gradient.norm().item() == pytest.approx(NORM, rel=1e-4)


def test_a_sample_has_its_value_beside_any_other(networks, pictures):
    prediction, target, _ = pictures
    network = networks["lpips"]
    torch.testing.assert_close(network(prediction, target)[1:], network(prediction[1:], target[1:]), rtol=1e-5, atol=0)


def test_larger_pictures_reach_convnext_without_aliasing(networks):
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(1, 3, 448, 448, generator=generator)
    prediction = target + 0.1 * torch.randn(1, 3, 448, 448, generator=generator)
    network = networks["lpips_convnext"]
    with torch.no_grad():
        assert network.logits_distance(prediction, target).tolist() == pytest.approx([AT_448], rel=1e-5)


def test_it_costs_what_its_convolutions_cost_and_its_weights_are_no_activations(networks):
    layer = PerceptualLoss(networks["lpips"])
    side, batch = 32, 2
    before = Apply(torch.nn.Conv2d(3, 3, 1), ("images",), "reconstruction")
    slots = {"images": torch.empty(batch, 3, side, side)}
    _, cost = layer_costs([before, layer], slots, layer.writes)
    sides = [side >> level for level in (0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4)]
    convolutions = [weight for weight in networks["lpips"].vgg16.parameters() if weight.dim() == 4]
    heads = 2 * sum(c * (side >> level) ** 2 for level, c in enumerate((64, 128, 256, 512, 512)))
    once = sum(2 * weight.numel() * s**2 for weight, s in zip(convolutions, sides, strict=True))
    assert cost.forward_flops == batch * (2 * once + heads)
    largest = 4 * batch * 64 * side**2
    assert largest in cost.saved.values()
    assert max(cost.saved.values()) == largest
    assert next(networks["lpips"].parameters()).device.type == "cpu"


def recipe(directory: Path | None, **objective: Any) -> Recipe:
    pretrained = {"pixel_autoencoder": "nowhere"} | ({} if directory is None else {"perceptual": str(directory)})
    return Recipe.model_validate(
        {
            "stage": "tokenizer", "phase": "decoder", "run_dir": "runs/x", "global_batch": 2, "train": {"steps": 2},
            "model": {"preset": "tiny", "pretrained": pretrained}, "init_from": "../y", "optimizer": {"lr": 1e-3},
            "objective": {"perceptual": "lpips", "perceptual_weight": 1.0, **objective},
            "data": {"task_block": 2, "sources": [{"name": "images", "shards": "x.tar"}]}, "checkpoint": {"every": 2},
        }
    )  # fmt: skip


def test_a_plan_counts_its_operations_and_the_memory_of_its_weights(tmp_path: Path):
    own, plain = (plan(made, 1, "h200") for made in (recipe(tmp_path), recipe(None, perceptual="gradient_difference")))
    weights = sum(parameter.numel() for parameter in PerceptualDistance(convnext=False).parameters())
    assert own.estimates[0].memory["companions"] == 4 * weights
    assert "companions" not in plain.estimates[0].memory
    assert plain.flops["losses"] == 0 < own.flops["losses"]


def loaded(directory: Path, **objective: Any) -> PerceptualDistance:
    part = PretrainedPart("perceptual", directory, "tiny")
    (network,) = perceptual_loss(recipe(directory, **objective), part).beside
    assert isinstance(network, PerceptualDistance)
    return network


def test_published_files_are_read_in_each_of_their_forms(networks, tmp_path: Path):
    both = networks["lpips_convnext"]
    write_perceptual(tmp_path / "new", both)
    assert frozen_digests(loaded(tmp_path / "new", perceptual="lpips_convnext")) == frozen_digests(both)
    write_perceptual(tmp_path / "old", networks["lpips"])
    vgg16 = tmp_path / "old" / PERCEPTUAL_FILES["vgg16"]
    torch.save(torch.load(vgg16, weights_only=True), vgg16, _use_new_zipfile_serialization=False)  # as is torchvision's
    save_file(both.lpips.state_dict(), tmp_path / "old" / "vgg.safetensors")
    (tmp_path / "old" / PERCEPTUAL_FILES["lpips"]).unlink()
    assert frozen_digests(loaded(tmp_path / "old")) == frozen_digests(networks["lpips"])


class Harmful:
    def __reduce__(self):
        return (open, ("harm", "w"))


def test_files_that_are_missing_doubled_foreign_or_harmful_are_refused(networks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_perceptual(folder := tmp_path / "files", networks["lpips"])
    with pytest.raises(
        UserError, match=r"model.pretrained.perceptual: found none of convnext_small\*.*expected one file"
    ):
        loaded(folder, perceptual="lpips_convnext")
    (folder / "vgg16.pt").touch()
    with pytest.raises(UserError, match=r"found vgg16-397923af\.pth, vgg16\.pt of vgg16"):
        loaded(folder)
    (folder / "vgg16.pt").unlink()
    heads = folder / PERCEPTUAL_FILES["lpips"]
    torch.save({f"lin{i}.model.1.weight": torch.ones(1, 64, 1, 1) for i in range(5)}, heads)  # of another trunk
    with pytest.raises(UserError, match=r"vgg.pth does not hold the weights of lpips: .*size mismatch for lin1"):
        loaded(folder)
    for content in (Harmful(), b"not tensors"):
        torch.save(content, heads)
        with pytest.raises(UserError, match=r"vgg\.pth (cannot be read|does not hold)"):
            loaded(folder)
    heads.write_bytes(b"neither")
    with pytest.raises(UserError, match=r"vgg.pth cannot be read"):
        loaded(folder)
    assert not (tmp_path / "harm").exists()


def test_a_recipe_that_wants_it_is_refused_without_its_files(tmp_path: Path):
    from spar_scale.stages import meta_stage

    with pytest.raises(UserError, match=r"model\.pretrained\.perceptual: stage 'tokenizer', phase 'decoder' starts"):
        meta_stage(recipe(None))
    wants = ["objective.perceptual=lpips", "objective.perceptual_weight=1.0"]
    with pytest.raises(
        UserError, match=r"model\.pretrained\.perceptual: missing, but objective.perceptual \"lpips\" needs"
    ):
        load_recipe(ROOT / "recipes/tiny/tokenizer_init.yaml", wants)  # as every command does, submit too
    assert meta_stage(recipe(tmp_path)).terms == {"mean_squared_error": 1.0, "perceptual": 1.0}
    assert any("perceptual: found none of vgg16*" in text for text in refusals(recipe(tmp_path), 1, None))
    with pytest.raises(ValueError, match=r"objective.perceptual_weight: found 0 with objective.perceptual lpips"):
        recipe(tmp_path, perceptual_weight=0.0)
