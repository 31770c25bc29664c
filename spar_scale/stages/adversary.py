"""The adversarial objective of a stage: two terms at the end of its list, and a discriminator beside the engine.

One step, the same for all layouts: the generator's term uses the discriminator as of this step, the
discriminator's loss is taken on the same fakes without their gradient, and both step once at the end.
Its running means move once per global batch (SPAR, L_GAN and LeCam).

Slots: images, reconstruction (B, 3, S, S); weight (B,); terms adversarial, discriminator (B,).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from parallel.program import Layer
from parallel.replica import Replica
from spar_scale.models.dual_stream import build_discriminator
from spar_scale.models.initialise import initialise
from spar_scale.objectives.adversarial import LeCam, discriminator_loss, generator_loss
from spar_scale.stages import Stage
from spar_scale.stages.parts import preset_of

if TYPE_CHECKING:
    from parallel.topology import Topology
    from spar_scale.config.recipe import Recipe

DISCRIMINATOR = "discriminator"


class Adversary:
    """The discriminator with its optimizer and its running means: a companion of the last pipeline stage."""

    name = DISCRIMINATOR

    def __init__(self, recipe: Recipe):
        preset = preset_of(recipe)
        self.module = build_discriminator(preset.autoencoder, preset.image_size)
        initialise(self.module, recipe.seed)
        self.start_step: int = recipe.objective.adversarial_start
        self.lecam_weight: float = recipe.objective.lecam_weight
        self.global_batch: int = recipe.global_batch
        self.active = False
        self.replica: Replica | None = None

    def bind(self, topology: Topology, device: torch.device, betas: tuple[float, float]) -> None:
        """Create its optimizer on the ranks of the last pipeline stage, which have the reconstructions."""
        if not topology.is_last_stage:
            return
        self.replica = Replica(self.name, self.module, topology, device, betas)
        self.lecam = LeCam(device=device)
        self.seen = torch.zeros(3, device=device)  # sums of the real and the fake logits, samples

    def begin_step(self, step: int) -> None:
        """Before step `step` (1-based): whether the discriminator takes part in it."""
        self.active = step > self.start_step

    def observe(self, real: Tensor, fake: Tensor, weight: Tensor) -> Tensor:
        """Accumulate the discriminator's gradient on one micro-batch; return its loss per sample (B,), detached."""
        with torch.enable_grad():
            real_logits, fake_logits = self.module(real.detach()), self.module(fake.detach())
            value = discriminator_loss(real_logits, fake_logits)
            value = value + self.lecam_weight * self.lecam.loss(real_logits, fake_logits)
            (torch.where(weight > 0, value, 0.0).sum() / self.global_batch).backward()
        means = [logits.detach().float().flatten(1).mean(1) for logits in (real_logits, fake_logits)]
        self.seen += torch.stack([*(torch.where(weight > 0, mean, 0.0).sum() for mean in means), weight.sum()])
        return value.detach()

    def end_step(self, lr: float, clip: float) -> None:
        """After the last micro-batch of a step: update the discriminator, then its running means."""
        if not self.active or self.replica is None:
            return
        self.replica.step(lr, clip)
        real, fake, samples = self.replica.sum(self.seen)
        if torch.isfinite(real + fake):
            self.lecam.update(real / samples.clamp(min=1), fake / samples.clamp(min=1))
        self.seen.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """What the checkpoint holds of it, to be saved and loaded in place; nothing on ranks that do not compute it."""
        if self.replica is None:
            return {}
        means = {f"{self.name}.real_mean": self.lecam.real_mean, f"{self.name}.fake_mean": self.lecam.fake_mean}
        return {**self.replica.tensors(), **means}


class AdversarialLoss(Layer):
    """The terms `adversarial` (-mean D(fake)) and `discriminator` (its own loss, for the log), each (B,)."""

    reads = ("images", "reconstruction", "weight")
    writes = ("adversarial", "discriminator")
    detached = frozenset({"discriminator"})
    recomputes = False  # a second forward would count the discriminator's gradient twice

    def __init__(self, adversary: Adversary):
        super().__init__()
        self._adversary = (adversary,)  # a tuple, so that its weights are not the engine's

    def forward(self, images: Tensor, reconstruction: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Judge the reconstruction; both terms are 0 before the start step."""
        (adversary,) = self._adversary
        if not adversary.active or adversary.replica is None:
            zero = reconstruction.float().flatten(1).sum(1) * 0.0
            return {"adversarial": zero, "discriminator": zero}
        value = generator_loss(adversary.replica.frozen(reconstruction.float()))
        if not torch.is_grad_enabled():
            return {"adversarial": value, "discriminator": torch.zeros_like(value)}
        return {
            "adversarial": value,
            "discriminator": adversary.observe(images.float(), reconstruction.float(), weight),
        }


def add_adversary(stage: Stage, recipe: Recipe) -> None:
    """Put the adversarial terms at the end of a stage's list, with objective.adversarial_weight."""
    adversary = Adversary(recipe)
    stage.companions.append(adversary)
    stage.layers.append(AdversarialLoss(adversary))
    stage.inputs = (*stage.inputs, "weight")
    stage.terms |= {"adversarial": recipe.objective.adversarial_weight, "discriminator": 0.0}
