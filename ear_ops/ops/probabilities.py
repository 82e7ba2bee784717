"""Attention probabilities in plain PyTorch: the definition that every kernel must equal.

The function materialises whole attention matrices, and autograd differentiates it any number of times. Half-precision
inputs are computed in float32, float64 inputs in float64. All masks are ``bool``: True means real, or "may attend".
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
