"""The definitions, in plain PyTorch: what every kernel of the package must equal.

These functions are the oracle of the tests (in float64), the fallback where nothing is compiled, and the documentation.
They materialise whole attention matrices and are differentiable by autograd, any number of times. Half-precision inputs
are computed in float32, float64 inputs in float64; results are float32 (float64).

All masks are ``bool``, True = real (or "may attend").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are accumulated in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def structure_mask(
    query_length: int, key_length: int, is_causal: bool, window: int | None, device: torch.device | None = None
) -> Tensor | None:
    """``[L, S]`` mask of a causal and/or windowed attention, None where every key may be attended to.

    Query i sits at key position i + S - L (aligned to the bottom right). Causal: keys up to that position. A window of
    w: keys less than w positions away.
    """
    if not is_causal and window is None:
        return None
    position = torch.arange(query_length, device=device)[:, None] + (key_length - query_length)
    key_position = torch.arange(key_length, device=device)[None, :]
    allowed = torch.ones(query_length, key_length, dtype=torch.bool, device=device)
    if is_causal:
        allowed &= key_position <= position
    if window is not None:
        allowed &= (position - key_position).abs() < window
    return allowed


def attention_probabilities(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    query_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """``softmax(scale * Q K^T + mask)`` of one view, a row without any key to attend to being zero.

    What masked positions hold is nobody's business, not even when it is NaN: it reaches neither values nor gradients.

    Args:
        query: ``[B, H, L, D]``.
        key: ``[B, H_kv, S, D]``, H a multiple of H_kv (grouped-query attention).
        key_mask: ``[B, S]`` bool, True = real.
        attn_bias: float (added) or bool (True = attend), broadcastable to ``[B, H, L, S]``; ``-inf`` masks.
        query_mask: ``[B, L]`` bool; the rows of other queries are zero.
        scale: 1/sqrt(D) by default.
        softcap: ``c * tanh(scores / c)`` before bias and mask (Gemma 2).

    Returns:
        ``[B, H, L, S]`` in float32 (float64).
    """
    dtype = compute_dtype(query.dtype)
    query, key = query.to(dtype), key.to(dtype)
    if key_mask is not None:
        key = key.masked_fill(~key_mask[:, None, :, None], 0.0)
    if query_mask is not None:
        query = query.masked_fill(~query_mask[:, None, :, None], 0.0)
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = scale * (query @ key.transpose(-1, -2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)

    allowed = structure_mask(query.shape[2], key.shape[2], is_causal, window, query.device)
    if key_mask is not None:
        real = key_mask[:, None, None, :]
        allowed = real if allowed is None else allowed & real
    if query_mask is not None:
        real = query_mask[:, None, :, None]
        allowed = real if allowed is None else allowed & real
    if attn_bias is not None:
        attend = attn_bias if attn_bias.dtype == torch.bool else attn_bias != -math.inf
        allowed = attend if allowed is None else allowed & attend
        if attn_bias.dtype != torch.bool:
            scores = scores + attn_bias.to(dtype).masked_fill(~attend, 0.0)
    if allowed is None:
        return torch.softmax(scores, dim=-1)
    scores = scores.masked_fill(~allowed, -math.inf).masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    return torch.softmax(scores, dim=-1).masked_fill(~allowed, 0.0)


def squared_difference_sums(attn: Tensor, attn_aug: Tensor, counted_queries: Tensor | None = None) -> Tensor:
    """``[B, H]`` sums over counted queries and all keys of ``(P - T)^2``; ``attn``, ``attn_aug``: ``[B, H, L, S]``.

    ``counted_queries``: ``[B, L]`` bool. Keys that are padding have probability zero in their view and need no mask.
    """
    difference = attn - attn_aug
    if counted_queries is not None:  # before squaring, so that NaN in a row that does not count has no gradient
        difference = difference.masked_fill(~counted_queries[:, None, :, None], 0.0)
    return difference.square().sum(dim=(-2, -1))


def qk_attention_mse(
    query: Tensor,
    key: Tensor,
    query_aug: Tensor,
    key_aug: Tensor,
    key_mask: Tensor | None = None,
    key_mask_aug: Tensor | None = None,
    counted_queries: Tensor | None = None,
    attn_bias: Tensor | None = None,
    attn_bias_aug: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """``[B, H]`` sums of ``(P - T)^2``, P and T the attention probabilities of the two views (Ding et al. 2022, eq. 2).

    Args:
        query, query_aug: ``[B, H, L, D]``.
        key, key_aug: ``[B, H_kv, S, D]``.
        key_mask, key_mask_aug: ``[B, S]`` bool of each view.
        counted_queries: ``[B, L]`` bool, the rows that enter the sum.
        attn_bias, attn_bias_aug: of each view, see :func:`attention_probabilities`, as for the rest.
    """
    options = {"scale": scale, "is_causal": is_causal, "window": window, "softcap": softcap}
    rows = counted_queries  # the others are zero in both views
    attn = attention_probabilities(query, key, key_mask, attn_bias, rows, **options)  # type: ignore[arg-type]
    attn_aug = attention_probabilities(query_aug, key_aug, key_mask_aug, attn_bias_aug, rows, **options)  # type: ignore[arg-type]
    return squared_difference_sums(attn, attn_aug)


def attention_mse(
    attn: Tensor,
    attn_aug: Tensor,
    key_mask: Tensor | None = None,
    key_mask_aug: Tensor | None = None,
    counted_queries: Tensor | None = None,
) -> Tensor:
    """``[B, H]`` sums of ``(P - T)^2`` of given probabilities ``[B, H, L, S]``; padded keys have probability zero."""
    dtype = compute_dtype(attn.dtype)
    attn, attn_aug = attn.to(dtype), attn_aug.to(dtype)
    if key_mask is not None:
        attn = attn.masked_fill(~key_mask[:, None, None, :], 0.0)
    if key_mask_aug is not None:
        attn_aug = attn_aug.masked_fill(~key_mask_aug[:, None, None, :], 0.0)
    return squared_difference_sums(attn, attn_aug, counted_queries)


def masked_mean(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """``[B, C]`` mean over the real tokens of ``hidden`` ``[B, L, C]``; a sequence without any is the zero vector."""
    hidden = hidden.to(compute_dtype(hidden.dtype))
    if mask is None:
        return hidden.sum(dim=1) / max(hidden.shape[1], 1)
    total = hidden.masked_fill(~mask[:, :, None], 0.0).sum(dim=1)
    return total / mask.sum(dim=1, keepdim=True).clamp(min=1)


def pooled_distance(
    hidden: Tensor, hidden_aug: Tensor, mask: Tensor | None = None, mask_aug: Tensor | None = None
) -> Tensor:
    """``[B]`` sums over C of ``(M(E) - M(E^a))^2``, M the masked mean (Ding et al. 2022, eq. 1 without its sign).

    ``hidden``, ``hidden_aug``: ``[B, L, C]``; ``mask``, ``mask_aug``: ``[B, L]`` bool.
    """
    return (masked_mean(hidden, mask) - masked_mean(hidden_aug, mask_aug)).square().sum(dim=-1)
