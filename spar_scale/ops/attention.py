"""The entry point of softmax attention, and the selection of its backend.

All softmax attention of this package uses `attention`, so the backend is selected in one place and logged once, with
the reason, for each kind of input. Legend: B samples, N tokens of a sample, T tokens of all samples packed one after
another, H heads, D head width. Dense input is (B, N, H, D), packed input (T, H, D), which is the layout of the
projections' outputs and of the flash kernels.

Backends: `math` (torch's plain products), `sdpa` (torch selects one of its kernels), `flash` (torch's built-in flash
kernels, dense and packed) and `flash_attn_2`, `_3`, `_4` (the packages of that name). `auto` never selects a package
just because it is installed: it prefers predictable behaviour to speed.

On CPU in bf16 `auto` selects `math`: the backward pass of CPU flash attention in bf16 took 58 % of a training step with
76 tokens. Measured forward and backward, batch 64, 4 heads of 32, torch 2.13: with 16 tokens 3.8 ms (math) and 33 ms
(flash), with 65 tokens 27 ms and 77 ms; in fp32 flash is faster.

A query that attends to nothing (a mask row without True, a bottom-right causal row before the first key, a sample
without keys) gives 0 and no gradient under every backend (tested).
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

_PACKAGES = {  # module with the two functions, how to install it, minimum compute capability of the GPU
    "flash_attn_2": ("flash_attn", "pip install flash-attn --no-build-isolation", (8, 0)),
    "flash_attn_3": ("flash_attn_interface", "build it from the folder hopper/ of Dao-AILab/flash-attention", (9, 0)),
    "flash_attn_4": ("flash_attn.cute", "pip install 'flash-attn-4>=4.0.0b36'", (9, 0)),
}
_KERNELS = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}

SHORT = 48
"""Without a packed kernel, samples of up to this many tokens are padded and masked, longer ones run one by one.

On CPU in fp32, forward and backward (torch 2.13): 64 samples of 22 to 30 tokens took 6.6 ms padded and 11.5 ms one by
one, 8 samples of 64 to 128 tokens 32 ms and 26 ms, 4 samples of 356 to 574 tokens 188 ms and 140 ms.
"""

_log = logging.getLogger(__name__)
_requested: str = "auto"


class BackendRefused(ValueError):
    """The requested backend cannot compute this input; the message has the reason and an alternative."""


@contextlib.contextmanager
def use_backend(requested: str, device: str, dtype: torch.dtype) -> Iterator[None]:
    """Make every `attention` of this process use `requested` ("auto" or one of BACKENDS) within the context.

    Raises BackendRefused on entering if the backend is missing or does not support the device type and dtype.
    """
    global _requested
    resolve(device, dtype, requested=requested)
    before, _requested = _requested, requested
    try:
        yield
    finally:
        _requested = before


@functools.cache
def resolve(
    device: str, dtype: torch.dtype, *, masked: bool = False, packed: bool = False, requested: str = "auto"
) -> tuple[str, str]:
    """Return (backend, reason) for a device type, a dtype and a kind of input, and log it the first time.

    Raises BackendRefused if `requested` is unknown, not installed, or does not support this input.
    """
    if requested not in ("auto", *BACKENDS):
        raise BackendRefused(f"found '{requested}', must be auto or one of {', '.join(BACKENDS)}")
    if device == "meta":
        return "sdpa", "only shapes are computed there"
    if requested != "auto":
        backend, reason, refusal = requested, "requested", why_not(requested, device, dtype, masked)
        if refusal:
            raise BackendRefused(f"{requested} {': '.join(refusal)}, or choose auto, which selects a supported one")
    elif device == "cpu" and dtype == torch.bfloat16:
        backend, reason = "math", "the backward pass of flash attention in bf16 is slow on CPU"
    elif device == "cuda" and not (refusal := why_not("flash", device, dtype, masked)):
        backend, reason = "flash", "torch's built-in kernel"
    else:
        backend, reason = "sdpa", f"torch selects one of its kernels on {device}"
        reason += f"; flash {refusal[0]}" if device == "cuda" and refusal else ""
    if packed and not _takes_packed(backend, device):
        reason += (
            f"; {backend} has no packed kernel on {device}: short packed samples are padded, others run one by one"
        )
    kind = ", masked" * masked + ", packed" * packed
    _log_once(f"attention on {device} in {str(dtype).removeprefix('torch.')}{kind}: {backend} ({reason})")
    return backend, reason


def why_not(backend: str, device: str, dtype: torch.dtype, masked: bool = False) -> tuple[str, str] | None:
    """Return why one of BACKENDS cannot compute such input here, and a remedy; None if it can."""
    if backend in ("math", "sdpa") or (backend, device) == ("flash", "cpu"):
        return None
    if device != "cuda":
        return f"runs on CUDA only, found {device}", "choose math, sdpa or flash"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"does not compute in {str(dtype).removeprefix('torch.')}", "set precision to bf16"
    if masked:
        return "does not support the attention mask of this model", "choose sdpa"
    least = (8, 0)
    if backend == "flash":
        if _torch_varlen() is None:
            return f"needs the packed kernel of torch 2.13, found torch {torch.__version__}", "update torch"
    else:
        module, install, least = _PACKAGES[backend]
        try:
            _package(backend)
        except Exception as error:  # a package built for another torch may raise anything when it is loaded
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

    Dense: q is (B, N_q, H, D), k and v are (B, N_k, H_kv, D), and H_kv divides H. `mask` is boolean, True where a query
    attends to a key, and broadcastable to (B, H, N_q, N_k). Packed: q is (T_q, H, D), k and v are (T_k, H_kv, D), and
    `packing` has the bounds of the samples; queries attend only to keys of their own sample. `causal` is aligned
    bottom-right in both cases: the last query of a sample attends to all its keys. `scale` defaults to D ** -0.5.
    Raises BackendRefused for input that the backend does not support, ValueError for shapes that do not match.
    """
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"attention mask: found {mask.dtype}, must be bool")
    if packing is None:
        backend, _ = resolve(q.device.type, q.dtype, masked=mask is not None, requested=_requested)
        return _dense(backend, q, k, v, causal, mask, scale)
    if mask is not None:
        raise ValueError("packed attention takes no mask: the lengths of the packing define the keys")
    packing.check(q, k, v)
    backend, _ = resolve(q.device.type, q.dtype, packed=True, requested=_requested)
    if q.device.type == "meta":  # lengths are unknown there: what is counted are samples of equal length
        return _dense_samples(backend, q, k, v, causal, scale, len(packing.cu_seqlens_q) - 1)
    if _takes_packed(backend, q.device.type):
        return _varlen(backend, q, k, v, causal, scale, packing)
    num_q, num_k = (bounds.diff().tolist() for bounds in (packing.cu_seqlens_q, packing.cu_seqlens_k))
    if max(*num_q, *num_k) <= SHORT:
        q, k, v, mask = packing.pad(q, k, v, max(num_q), max(num_k), causal)
        return packing.unpad(_dense(backend, q, k, v, False, mask, scale))
    samples = zip(q.split(num_q), k.split(num_k), v.split(num_k), strict=True)
    return torch.cat([_dense(backend, a[None], b[None], c[None], causal, None, scale)[0] for a, b, c in samples])


def _dense(
    backend: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float | None
) -> Tensor:
    num_q, num_k = q.shape[1], k.shape[1]
    if backend in _PACKAGES:
        return _output(_package(backend).flash_attn_func(q, k, v, softmax_scale=scale, causal=causal))
    if causal and (mask is not None or num_q != num_k):  # torch's is_causal is top-left and excludes a mask
        if backend == "flash" and q.device.type == "cuda":  # only the packed kernel aligns bottom-right without a mask
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


def _dense_samples(
    backend: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, batch: int
) -> Tensor:
    """Compute packed attention of `batch` samples of equal length."""
    q, k, v = (part.unflatten(0, (batch, -1)) for part in (q, k, v))
    return _dense(backend, q, k, v, causal, None, scale).flatten(0, 1)


def _varlen(
    backend: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, packing: Packing
) -> Tensor:
    """Compute packed attention with a kernel; all kernels align `causal` bottom-right."""
    cu_q, cu_k = packing.cu_seqlens_q.int(), packing.cu_seqlens_k.int()  # what all of them take
    max_q, max_k = packing.max_q, packing.max_k
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
    """Return the module of a flash-attn package.

    It is recognised by its functions, because an installation of only FA4 contains an empty package `flash_attn`.
    """
    module = importlib.import_module(_PACKAGES[backend][0])
    for symbol in ("flash_attn_func", "flash_attn_varlen_func"):
        getattr(module, symbol)
    return module


def _output(result: Any) -> Tensor:
    """Return the output; some versions of the packages return (output, logsumexp)."""
    return result[0] if isinstance(result, tuple) else result


@functools.cache
def _torch_varlen() -> Any:
    """Return torch's packed flash kernel, or None if its signature is older than that of torch 2.13."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys() else None
