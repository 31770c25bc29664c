"""SANA's diffusion transformer: diffusers' class, cut into pieces that a list of layers can hold.

Legend: B batch, C latent channels, H x W latent positions, N = H W / patch^2 tokens, W_t width, M caption
tokens of all samples one after another. The model is `SanaTransformer2DModel`, so published weights fit by name and
`Diffusion.transformer.save_pretrained` writes the published layout. The list of layers (`layers.py`) composes
`DiffusionInput`, the blocks (`run_block`) and `DiffusionOutput`, bit-equal to the class's own forward
(tested). The pieces own their parameters' references and are called as modules, because ZeRO-3 gathers
a parameter only for the module that holds it. Only cross-attention is a softmax; it goes through
`ops/attention.py`.
"""

from __future__ import annotations

from typing import Any, cast

from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel, SanaTransformerBlock
from torch import Tensor, nn

from spar_scale.models.sana.shapes import DiffusionShape
from spar_scale.ops.attention import attention
from spar_scale.ops.packing import Packing

_GATES = (2, 5)  # rows of a block's scale_shift_table: gate of self-attention, gate of the feed-forward


class CrossAttention:
    """SANA's cross-attention through `attention`; a diffusers attention processor."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Packing
    ) -> Tensor:
        """Tokens (B, N, W) attend to the captions (M, W) of their sample.

        The packing has the bounds of both. The classes of diffusers (0.38) hand it on unread, in the place of a mask.
        """
        q, k, v = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        q, k, v = (tensor.unflatten(-1, (attn.heads, -1)) for tensor in (q, k, v))
        mixed = attention(q.flatten(0, 1), k, v, packing=attention_mask)
        return attn.to_out[0](mixed.flatten(1)).view_as(hidden_states)


class Diffusion(nn.Module):
    """A SANA diffusion transformer of a shape; weights uninitialised."""

    def __init__(self, shape: DiffusionShape):
        super().__init__()
        self.shape = shape
        self.transformer = SanaTransformer2DModel(**shape.config())
        for block in self.transformer.transformer_blocks:
            cast(Any, block).attn2.set_processor(CrossAttention())

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, SanaTransformer2DModel):
            nn.init.normal_(module.scale_shift_table, std=self.shape.width**-0.5)
        elif isinstance(module, SanaTransformerBlock):
            nn.init.normal_(module.scale_shift_table, std=self.shape.width**-0.5)
            for row in _GATES:
                module.scale_shift_table[row] += self.shape.gate_offset
        elif isinstance(module, RMSNorm):
            nn.init.ones_(cast(Tensor, module.weight))
        elif isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()
            if self.shape.zero_output and module is self.transformer.proj_out:
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)


class DiffusionInput(nn.Module):
    """The parts before the blocks: patches, time, captions. Holds references to a transformer's parts."""

    def __init__(self, transformer: SanaTransformer2DModel):
        super().__init__()
        self.patch_embed, self.time_embed = transformer.patch_embed, transformer.time_embed
        self.caption_projection, self.caption_norm = transformer.caption_projection, transformer.caption_norm

    def forward(self, latents: Tensor, timestep: Tensor, captions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return tokens (B, N, W_t), context (M, W_t), modulation (B, 6 W_t) and embedded time (B, W_t).

        latents (B, C, H, W) are taken in the dtype of the captions; timestep (B,) stays in fp32.
        """
        tokens = self.patch_embed(latents.to(captions.dtype))
        modulation, embedded = self.time_embed(timestep, batch_size=len(tokens), hidden_dtype=tokens.dtype)
        return tokens, self.caption_norm(self.caption_projection(captions)), modulation, embedded


class DiffusionOutput(nn.Module):
    """The parts after the blocks: modulated norm and projection. Holds references to a transformer's parts."""

    def __init__(self, transformer: SanaTransformer2DModel):
        super().__init__()
        self.norm_out, self.proj_out = transformer.norm_out, transformer.proj_out
        self.scale_shift_table = transformer.scale_shift_table
        self.patch_size = cast(Any, transformer.config).patch_size

    def forward(self, tokens: Tensor, embedded: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map tokens (B, N, W_t) on a grid of (rows, columns) to the velocity (B, C, H, W)."""
        patches = self.proj_out(self.norm_out(tokens, embedded, self.scale_shift_table))
        patches = patches.unflatten(1, grid).unflatten(3, (self.patch_size, self.patch_size, -1))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class AlignmentHead(nn.Sequential):
    """phi_a: Linear -> SiLU -> Linear -> SiLU -> Linear, tapped tokens (B, N, W_t) to teacher width (B, N, D_s)."""

    def __init__(self, width: int, hidden: int, teacher_width: int):
        super().__init__(
            nn.Linear(width, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, teacher_width),
        )


def run_block(
    block: nn.Module, tokens: Tensor, context: Tensor, packing: Packing, modulation: Tensor, grid: tuple[int, int]
) -> Tensor:
    """One block: tokens (B, N, W_t) on a grid of (rows, columns), one block further.

    `packing` has the bounds of tokens and context (M, W_t); modulation (B, 6 W_t).
    """
    return block(tokens, None, context, packing, modulation, *grid)
