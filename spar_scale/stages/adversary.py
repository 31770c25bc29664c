"""The adversarial objective of a stage: two terms at the end of its list, and a discriminator beside the engine.

One step, the same for all layouts: the generator's term uses the discriminator as of this step, the
discriminator's loss is taken on the same fakes without their gradient, and both step once at the end.
Its running means move once per global batch (SPAR, L_GAN and LeCam). With discriminator.lr it has a rate of its own,
which is a function of the step alone: the authors' grew from 0 with the steps since it took part.

Slots: images, reconstruction (B, 3, S, S); weight (B,); terms adversarial, discriminator (B,).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from parallel.errors import UserError
from parallel.program import Layer
from parallel.replica import Replica
from spar_scale.config.schedule import learning_rate
from spar_scale.models.dual_stream import build_discriminator
from spar_scale.models.initialise import initialise
from spar_scale.objectives.adversarial import LeCam, discriminator_loss, generator_loss, sample_means
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
        self.settings, self.steps = recipe.discriminator, recipe.train.steps
        if self.settings.lr is not None and self.name in recipe.optimizer.groups:
            raise UserError(
                f"optimizer.groups.{self.name}: found {recipe.optimizer.groups[self.name]}, but discriminator.lr"
                " sets the rate; remove one of them"
            )
        self.step = self.start_step + 1  # until a step begins: costs are counted with the discriminator
        self.replica: Replica | None = None
        self.seen: Tensor | None = None  # sums of the real and of the fake logits, and of the samples
        self.slopes: list[list[Tensor]] = []  # by the mean of the real and of the fake logits, of each parameter

    def bind(self, topology: Topology, device: torch.device, betas: tuple[float, float]) -> None:
        """Create its optimizer on the ranks of the last pipeline stage, which have the reconstructions."""
        if not topology.is_last_stage:
            return
        self.replica = Replica(self.name, self.module, topology, device, betas, self.settings.weight_decay)
        self.lecam = LeCam(device=device)

    @property
    def active(self) -> bool:
        """Whether the discriminator takes part in this step."""
        return self.step > self.start_step

    def begin_step(self, step: int) -> None:
        """Note the number of a step (from 1) that begins."""
        self.step = step

    def judge(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) to logits with the weights of this step; gradients reach the images alone."""
        weights = {name: parameter.detach() for name, parameter in self.module.named_parameters()}
        return torch.func.functional_call(self.module, weights, (images,))

    def observe(self, real: Tensor, fake: Tensor, weight: Tensor) -> Tensor:
        """Accumulate the discriminator's gradient on one micro-batch; return its hinge loss per sample (B,), detached.

        LeCam needs two more backward passes, of the sums of the real and of the fake logits: 3 % of the operations of
        a step of spar_1b's phase encoder.
        """
        good, regularised = weight > 0, self.lecam_weight > 0
        with torch.enable_grad():
            logits = [self.module(images.detach()) for images in (real, fake)]
            value = discriminator_loss(*logits)
            (torch.where(good, value, 0.0).sum() / self.global_batch).backward(retain_graph=regularised)
            sums = [torch.where(good, sample_means(some), 0.0).sum() for some in logits]
        if regularised:
            parameters = list(self.module.parameters())
            before = self.slopes or [[torch.zeros_like(parameter) for parameter in parameters]] * 2
            self.slopes = [
                [old + new for old, new in zip(kept, torch.autograd.grad(some, parameters), strict=True)]
                for kept, some in zip(before, sums, strict=True)
            ]
        seen = torch.stack([*(some.detach() for some in sums), weight.sum()])
        self.seen = seen if self.seen is None else self.seen + seen
        return value.detach()

    def end_step(self, lr: float, clip: float) -> None:
        """After the last micro-batch of a step: update the discriminator, then its running means."""
        if not self.active or self.replica is None:
            return
        assert self.seen is not None
        real, fake, samples = self.replica.sum(self.seen)
        samples = samples.clamp(min=1)
        for slope, gradients in zip(self.lecam.slopes(real / samples, fake / samples), self.slopes, strict=False):
            for parameter, gradient in zip(self.module.parameters(), gradients, strict=True):
                assert parameter.grad is not None
                parameter.grad += self.lecam_weight * slope / samples * gradient
        own = self.settings.lr is not None
        since, steps = self.step - self.start_step, self.steps - self.start_step
        self.replica.step(learning_rate(self.settings, since, steps) if own else lr, clip)
        if torch.isfinite(real + fake):
            self.lecam.update(real / samples, fake / samples)
        self.seen, self.slopes = None, []

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
        self.beside = (adversary.module,)

    def forward(self, images: Tensor, reconstruction: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Judge the reconstruction; both terms are 0 before the start step."""
        (adversary,) = self._adversary
        if not adversary.active:
            zero = reconstruction.float().flatten(1).sum(1) * 0.0
            return {"adversarial": zero, "discriminator": zero}
        value = generator_loss(adversary.judge(reconstruction.float()))
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
