"""Attention probabilities in plain PyTorch: the definition that every kernel must equal.

The function materialises whole attention matrices, and autograd differentiates it any number of times. Half-precision
inputs are computed in float32, float64 inputs in float64. All masks are ``bool``: True means real, or "may attend".
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are accumulated in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def structure_mask(
    query_length: int,
    key_length: int,
    is_causal: bool,
    window: int | None,
    device: torch.device | None = None,
    first_position: int | None = None,
) -> Tensor | None:
    """``[L, S]`` mask of a causal and/or windowed attention, None where every key may be attended to.

    Query i sits at key position i + S - L (aligned to the bottom right), or at i + ``first_position``. Causal: keys up
    to that position. A window of w: keys less than w positions away.
    """
    if not is_causal and window is None:
        return None
    first_position = key_length - query_length if first_position is None else first_position
    position = torch.arange(query_length, device=device)[:, None] + first_position
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
    """``softmax(scale * Q K^T + mask)`` of one view; a row without any key to attend to is zero.

    Masked positions are never read: even NaN there changes neither values nor gradients.

    Args:
        query: ``[B, H, L, D]``.
        key: ``[B, H_kv, S, D]``; H is a multiple of H_kv (grouped-query attention).
        key_mask: ``[B, S]`` bool, True = real.
        attn_bias: float (added) or bool (True = attend), broadcastable to ``[B, H, L, S]``; ``-inf`` masks.
        query_mask: ``[B, L]`` bool; the rows of other queries are zero.
        scale: 1/sqrt(D) by default.
        softcap: ``c * tanh(scores / c)`` before bias and mask (Gemma 2).

    Returns:
        ``[B, H, L, S]`` in float32 (float64 for float64 inputs).
    """
    scores, allowed = attention_scores(
        query,
        key,
        key_mask,
        attn_bias,
        query_mask,
        scale=scale,
        is_causal=is_causal,
        window=window,
        softcap=softcap,
    )
    return masked_softmax(scores, allowed)


def masked_softmax(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """The softmax over the last dimension of what is ``allowed`` (None: all), 0 elsewhere and in rows without any."""
    if allowed is None:
        return torch.softmax(scores, dim=-1)
    return torch.softmax(fill_masked(scores, allowed), dim=-1).masked_fill(~allowed, 0.0)


def attention_scores(
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
    first_position: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The scores ``[B, H, L, S]`` of one view, and a mask of those that the softmax sees (None: all), broadcastable.

    The scores of finite inputs are finite, also where they are masked. Arguments as for
    :func:`attention_probabilities` and :func:`structure_mask`.
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
    # How a product is rounded depends on strides and on where a tensor begins. Copies make it the same for both views.
    query, key = (tensor.clone(memory_format=torch.contiguous_format) for tensor in (query, key))
    scores = scale * (query @ key.transpose(-1, -2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)

    allowed = attendable_keys(
        query.shape[2], key.shape[2], key_mask, attn_bias, query_mask, is_causal, window, query.device, first_position
    )
    if attn_bias is not None and attn_bias.dtype != torch.bool:
        scores = scores + attn_bias.to(dtype).masked_fill(attn_bias == -math.inf, 0.0)
    return scores, allowed


def attendable_keys(
    query_length: int,
    key_length: int,
    key_mask: Tensor | None,
    attn_bias: Tensor | None,
    query_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    device: torch.device,
    first_position: int | None = None,
) -> Tensor | None:
    """Which keys each query may attend to, broadcastable to ``[B, H, L, S]``; None where it is all of them.

    Arguments as for :func:`attention_probabilities` and :func:`structure_mask`.
    """
    allowed = structure_mask(query_length, key_length, is_causal, window, device, first_position)
    masks = [] if allowed is None else [allowed]
    if key_mask is not None:
        masks.append(key_mask[:, None, None, :])
    if query_mask is not None:
        masks.append(query_mask[:, None, :, None])
    if attn_bias is not None:
        masks.append(attn_bias if attn_bias.dtype == torch.bool else attn_bias != -math.inf)
    return functools.reduce(torch.logical_and, masks) if masks else None


def fill_masked(scores: Tensor, allowed: Tensor) -> Tensor:
    """``scores`` with ``-inf`` where they are masked, but zeros in a row that allows none: its softmax is finite."""
    return scores.masked_fill(~allowed, -math.inf).masked_fill(~allowed.any(-1, keepdim=True), 0.0)
