"""A trained SPAR for use from Python, loaded from an exported directory or from a run.

    from spar_scale import SparPipeline
    spar = SparPipeline.from_pretrained("my-spar", device="cuda")
    picture = spar.generate("a red bicycle in the rain", seed=3)[0]
    night = spar.edit(picture, "make it night")[0]
    spar.ask(night, "What time of day is it?")

The commands of the command line call the same methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image

from spar_scale.inference import drawing
from spar_scale.inference.ask import answer
from spar_scale.inference.pictures import Picture, fitted, opened, to_image
from spar_scale.inference.runs import TrainedRun, editing_prompt, generation_prompt, load_run, question_prompt
from spar_scale.inference.sampler import seeded_noise
from spar_scale.inference.tiles import reconstruct_image

T = TypeVar("T")


class SparPipeline:
    """Draws, edits, reconstructs and answers. Use `from_pretrained`."""

    def __init__(self, run: TrainedRun):
        self.run, self.forward, self.preset = run, run.forward, run.preset

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> SparPipeline:
        """Load what `spar-scale export` wrote, or a run of phase align/joint or instruct/joint.

        Args:
            directory: the exported directory or the run directory.
            device: by default cuda where torch sees a GPU, else cpu.
            dtype: of the weights; by default fp32 on the CPU, else the precision of the export or the run.

        Raises UserError for a directory of another kind, and for files that are missing or damaged.
        """
        return cls(load_run(Path(directory), "export", device, dtype))

    def generate(
        self, prompts: str | Sequence[str], seed: int = 0, steps: int | None = None, guidance: float | None = None
    ) -> list[Image.Image]:
        """Draw one picture for each prompt, from the noise of the seeds seed, seed + 1, ...

        `steps` and `guidance` are by default the preset's. Raises UserError for a prompt that is empty, too long or has
        words that the model does not know.
        """
        words = [generation_prompt(self.preset, self.forward.text, prompt)[0] for prompt in _listed(prompts)]
        sampling = drawing.sampling_of(self.preset, steps, guidance)
        images = drawing.generate(self.forward, words, self._noise(seed, len(words)), sampling)
        return [to_image(image) for image in images]

    def edit(
        self,
        pictures: Picture | Sequence[Picture],
        instructions: str | Sequence[str],
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> list[Image.Image]:
        """Edit each picture (or picture file) by its instruction; one of either serves all others.

        A picture becomes a square as in training: its middle square, or all of it stretched. The remaining arguments
        and errors are those of `generate`; UserError also for files that are no pictures.
        """
        texts, sources = _paired(_listed(instructions), _listed(pictures))
        words = [editing_prompt(self.preset, self.forward.text, text)[0] for text in texts]
        sampling = drawing.sampling_of(self.preset, steps, guidance)
        squares = torch.stack([fitted(source, self.preset.image_size, self.run.fit) for source in sources])
        images = drawing.edit(self.forward, squares, words, self._noise(seed, len(words)), sampling)
        return [to_image(image) for image in images]

    def reconstruct(self, picture: Picture) -> Image.Image:
        """Pass a picture of any size through the image tokenizer and back, tile by tile."""
        return reconstruct_image(self.forward, opened(picture), self.preset.image_size)

    def ask(self, picture: Picture, question: str) -> str:
        """Answer a question about a picture of any size. Raises UserError as `generate` does."""
        words, _ = question_prompt(self.preset, self.forward.text, question)
        return answer(self.forward, opened(picture), words)

    def _noise(self, seed: int, number: int) -> torch.Tensor:
        return seeded_noise(self.preset.latent_shape, range(seed, seed + number))


def _listed(given: T | Sequence[T]) -> list[T]:
    """Return one value or several as a list; a text is one value."""
    return list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]  # type: ignore[list-item]


def _paired(texts: list[str], pictures: list[Picture]) -> tuple[list[str], list[Picture]]:
    number = max(len(texts), len(pictures))
    if {len(texts), len(pictures)} - {1, number}:
        raise ValueError(f"{len(pictures)} pictures and {len(texts)} instructions; as many of both, or one of either")
    return texts * (number // len(texts)), pictures * (number // len(pictures))
