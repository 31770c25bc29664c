"""Adversarial objectives: logit maps (B, 1, h, w) in, one fp32 value per sample out (SPAR, tokenizer stage III).

A high logit means that the discriminator classifies a patch as real. The value of a sample is the mean over its own
patches, so the sum over a batch does not depend on the layout. LeCam's square is of means over the whole global batch,
which no micro-batch knows: `stages/adversary.py` sums gradients of the means, and scales them when the step ends. (The
published code squares means over one rank's batch, 32 or 4 samples, which depends on the number of ranks.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Return -mean D(fake) of each sample, (B, 1, h, w) to (B,) in fp32."""
    return -sample_means(fake_logits)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return the hinge loss (mean relu(1 - D(real)) + mean relu(1 + D(fake))) / 2 of each sample, (B,) in fp32."""
    real, fake = F.relu(1 - real_logits.float()), F.relu(1 + fake_logits.float())
    return (sample_means(real) + sample_means(fake)) / 2


class LeCam:
    """Regulariser of the discriminator against the running means of its own logits.

    The two means are 0-d fp32 tensors on the device, so that an update does not synchronise. They are constant within a
    step: `slopes` reads them, and `update` changes them once per global batch, afterwards.
    """

    VERSION = 1

    def __init__(self, decay: float = 0.999, device: torch.device | str = "cpu"):
        self.decay = decay
        self.real_mean = torch.zeros((), device=device)
        self.fake_mean = torch.zeros((), device=device)

    def slopes(self, real_mean: Tensor, fake_mean: Tensor) -> tuple[Tensor, Tensor]:
        """Return the derivatives of the regulariser by the two means of a global batch (0-d, fp32).

        The regulariser is relu(mean D(real) - fake_mean)^2 + relu(real_mean - mean D(fake))^2. Real logits are pulled
        down to the mean of fake ones and vice versa, so that the two do not drift apart if there is little data.
        """
        return 2 * F.relu(real_mean - self.fake_mean), -2 * F.relu(self.real_mean - fake_mean)

    @torch.no_grad()
    def update(self, real_mean: Tensor, fake_mean: Tensor) -> None:
        """Move the running means towards those of one global batch (0-d, equal on all ranks)."""
        self.real_mean.lerp_(real_mean.detach().to(self.real_mean), 1 - self.decay)
        self.fake_mean.lerp_(fake_mean.detach().to(self.fake_mean), 1 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        """Return the version and copies of the two means."""
        return {"version": self.VERSION, "real_mean": self.real_mean.clone(), "fake_mean": self.fake_mean.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the means. Raises ValueError for a state of another version."""
        if state.get("version") != self.VERSION:
            raise ValueError(
                f"LeCam: state version {state.get('version')}, this program reads {self.VERSION};"
                " load it with the program that wrote it, or train a new discriminator"
            )
        self.real_mean.copy_(state["real_mean"])
        self.fake_mean.copy_(state["fake_mean"])


def sample_means(values: Tensor) -> Tensor:
    """Return the mean of each sample's patches, (B, 1, h, w) to (B,) in fp32."""
    return values.float().flatten(1).mean(1)
