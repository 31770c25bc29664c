"""The one attention entry point and its resolver.

Every softmax attention of ours comes through `attention`, so that a backend is chosen in one place,
for a stated reason, and said once for each kind of input. Legend: B samples, N tokens of a sample,
T tokens of all samples packed one after another, H heads, D head width. Dense input is (B, N, H, D),
packed input (T, H, D), as the projections give them and as the flash kernels want them.

Backends: `math` (torch's plain products), `sdpa` (torch's own choice among its kernels), `flash`
(torch's built-in flash kernels, dense and packed) and `flash_attn_2`, `_3`, `_4` (the packages of
that name). The trade-off of `auto` is speed for certainty: no package is taken for being there.

On CPU in bf16 `auto` takes `math`: the backward of CPU flash attention in bf16 was 58 % of a
training step at 76 tokens. Measured forward and backward, batch 64, 4 heads of 32, torch 2.13: at 16
tokens 3.8 ms against 33 ms, at 65 tokens 27 ms against 77 ms; in fp32 flash is the faster one.

A query that attends to nothing (a row of the mask without True, a bottom-right causal row before the
first key, a sample without keys) gives 0 and no gradient, under every backend (tests).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from spar_scale.ops.packing import Packing

BACKENDS = ("math", "sdpa", "flash", "flash_attn_2", "flash_attn_3", "flash_attn_4")

_PACKAGES = {  # module that holds the two functions, how to install it, least compute capability of the GPU
    "flash_attn_2": ("flash_attn", "pip install flash-attn --no-build-isolation", (8, 0)),
    "flash_attn_3": ("flash_attn_interface", "build it from the folder hopper/ of Dao-AILab/flash-attention", (9, 0)),
    "flash_attn_4": ("flash_attn.cute", "pip install 'flash-attn-4>=4.0.0b36'", (9, 0)),
}
_KERNELS = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}

_log = logging.getLogger(__name__)
_asked: str = "auto"


class BackendRefused(ValueError):
    """The backend that was asked for cannot compute this input; says why and what to choose instead."""


@contextlib.contextmanager
def use_backend(asked: str, device: str, dtype: torch.dtype) -> Iterator[None]:
    """Have every `attention` of this process take `asked` ("auto" or one of BACKENDS) within the context.

    Raises BackendRefused at once when it is absent or does not fit the device type and dtype.
    """
    global _asked
    resolve(device, dtype, asked=asked)
    before, _asked = _asked, asked
    try:
        yield
    finally:
        _asked = before


@functools.cache
def resolve(
    device: str, dtype: torch.dtype, *, masked: bool = False, packed: bool = False, asked: str = "auto"
) -> tuple[str, str]:
    """Return (backend, reason) for a device type, a dtype and a kind of input, and log it the first time.

    Raises BackendRefused when `asked` is no backend, is absent here, or does not take this input.
    """
    if asked not in ("auto", *BACKENDS):
        raise BackendRefused(f"found '{asked}', must be auto or one of {', '.join(BACKENDS)}")
    if device == "meta":
        return "sdpa", "nothing is computed there but shapes"
    if asked != "auto":
        backend, reason, refusal = asked, "asked for", why_not(asked, device, dtype, masked)
        if refusal:
            raise BackendRefused(f"{asked} {': '.join(refusal)}, or choose auto, which takes another where it must")
    elif device == "cpu" and dtype == torch.bfloat16:
        backend, reason = "math", "the backward of flash attention in bf16 is slow on CPU"
    elif device == "cuda" and not (refusal := why_not("flash", device, dtype, masked)):
        backend, reason = "flash", "torch's built-in kernel"
    else:
        backend, reason = "sdpa", f"torch chooses among its kernels on {device}"
        reason += f"; flash {refusal[0]}" if device == "cuda" and refusal else ""
    if packed and not _takes_packed(backend, device):
        reason += f"; packed input is padded to a masked dense batch, since {backend} has no kernel for it on {device}"
    kind = ", masked" * masked + ", packed" * packed
    _log_once(f"attention on {device} in {str(dtype).removeprefix('torch.')}{kind}: {backend} ({reason})")
    return backend, reason


def why_not(backend: str, device: str, dtype: torch.dtype, masked: bool = False) -> tuple[str, str] | None:
    """Return why one of BACKENDS cannot compute such input here, and what would help; None if it can."""
    if backend in ("math", "sdpa") or (backend, device) == ("flash", "cpu"):
        return None
    if device != "cuda":
        return f"runs on CUDA only, found {device}", "choose math, sdpa or flash"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"does not compute in {str(dtype).removeprefix('torch.')}", "set precision to bf16"
    if masked:
        return "reads no mask, and there is one", "choose sdpa"
    least = (8, 0)
    if backend == "flash":
        if _torch_varlen() is None:
            return f"needs the packed kernel of torch 2.13, found torch {torch.__version__}", "update torch"
    else:
        module, install, least = _PACKAGES[backend]
        try:
            _package(backend)
        except Exception as error:  # a package built for another torch raises whatever its loader does
            return f"is not installed ({module}: {type(error).__name__}: {error})", install
    found = torch.cuda.get_device_capability()
    if found < least:
        return f"needs a GPU of compute capability {least[0]}.{least[1]}, found {found[0]}.{found[1]}", "choose sdpa"
    return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    packing: Packing | None = None,
) -> Tensor:
    """Return softmax(q k^T * scale) v, in the shape of q.

    Dense: q is (B, N_q, H, D), k and v (B, N_k, H_kv, D) with H_kv dividing H. `mask` is boolean, True
    where a query attends, broadcastable to (B, H, N_q, N_k). Packed: q is (T_q, H, D), k and v
    (T_k, H_kv, D), and `packing` tells the samples apart; no query sees another sample. `causal` is
    bottom-right in both: the last query of a sample sees all its keys. `scale` defaults to D ** -0.5.
    Raises BackendRefused for input that the chosen backend cannot read, ValueError for shapes that do not fit.
    """
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"an attention mask is boolean, found {mask.dtype}")
    if packing is None:
        backend, _ = resolve(q.device.type, q.dtype, masked=mask is not None, asked=_asked)
        return _dense(backend, q, k, v, causal, mask, scale)
    if mask is not None:
        raise ValueError("packed attention takes no mask: its lengths say which keys there are")
    packing.check(q, k, v)
    backend, _ = resolve(q.device.type, q.dtype, packed=True, asked=_asked)
    if _takes_packed(backend, q.device.type):
        return _varlen(backend, q, k, v, causal, scale, packing)
    q, k, v, mask = packing.pad(q, k, v, causal)
    return packing.unpad(_dense(backend, q, k, v, False, mask, scale))


def _dense(
    backend: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float | None
) -> Tensor:
    num_q, num_k = q.shape[1], k.shape[1]
    if backend in _PACKAGES:
        return _output(_package(backend).flash_attn_func(q, k, v, softmax_scale=scale, causal=causal))
    if causal and (mask is not None or num_q != num_k):  # torch's is_causal is top-left and excludes a mask
        if backend == "flash" and q.device.type == "cuda":  # its dense kernel reads no mask, its packed one needs none
            packing = Packing.even(q.shape[0], num_q, num_k, q.device)
            out = _varlen(backend, q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), causal, scale, packing)
            return out.unflatten(0, q.shape[:2])
        causal_mask = torch.ones(num_q, num_k, dtype=torch.bool, device=q.device).tril(num_k - num_q)
        mask, causal = causal_mask if mask is None else mask & causal_mask, False
    if mask is not None and q.device.type == "cuda" and (groups := q.shape[2] // k.shape[2]) > 1:
        # With a mask and grouped heads torch 2.13 falls back to the plain products on CUDA.
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    with sdpa_kernel(_KERNELS[backend]) if backend in _KERNELS else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.transpose(1, 2)


def _varlen(
    backend: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, packing: Packing
) -> Tensor:
    """Packed attention by a kernel; all of them align `causal` bottom-right."""
    cu_q, cu_k, max_q, max_k = packing.cu_seqlens_q, packing.cu_seqlens_k, packing.max_q, packing.max_k
    if backend in _PACKAGES:
        sides = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
        return _output(_package(backend).flash_attn_varlen_func(q, k, v, softmax_scale=scale, causal=causal, **sides))
    window, grouped = (-1, 0 if causal else -1), q.shape[1] != k.shape[1]
    return _torch_varlen()(
        q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window, enable_gqa=grouped
    )  # fmt: skip


@functools.cache
def _log_once(line: str) -> None:
    _log.info(line)


def _takes_packed(backend: str, device: str) -> bool:
    return backend in _PACKAGES or (backend == "flash" and device == "cuda")


def _package(backend: str) -> Any:
    """The module of a flash-attn package, known by its functions: FA4 alone leaves an empty `flash_attn`."""
    module = importlib.import_module(_PACKAGES[backend][0])
    for symbol in ("flash_attn_func", "flash_attn_varlen_func"):
        getattr(module, symbol)
    return module


def _output(result: Any) -> Tensor:
    """Some versions of the packages return (output, logsumexp)."""
    return result[0] if isinstance(result, tuple) else result


@functools.cache
def _torch_varlen() -> Any:
    """torch's packed flash kernel, or None where its signature is an older one (before torch 2.13)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys() else None
