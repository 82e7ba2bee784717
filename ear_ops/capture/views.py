"""What a site gives a loss: the tensors and masks of one view, or of both views in one batch ``[2B, ...]``, x first."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class AttentionInputs(NamedTuple):
    """Queries, keys and masks, as the attention losses take them."""

    query: Tensor  # [B, H, L, D]
    key: Tensor  # [B, H_kv, S, D]
    attention_mask: Tensor | None  # [B, S] bool
    query_mask: Tensor | None  # [B, L] bool
    attn_bias: Tensor | None  # broadcastable to [B, H, L, S], a constant
    scale: float | None = None  # None is 1/sqrt(D)
    is_causal: bool = False
    window: int | None = None
    softcap: float | None = None


class HiddenStates(NamedTuple):
    """Hidden states and which of their tokens are real."""

    states: Tensor  # [B, L, C]
    attention_mask: Tensor | None  # [B, L] bool


def align_attention(
    view: AttentionInputs, view_aug: AttentionInputs, what: str
) -> tuple[AttentionInputs, AttentionInputs]:
    """Two views in one dtype, both with masks or both without; ``what`` names the place in errors."""
    if view[5:] != view_aug[5:] or (view.attn_bias is None) != (view_aug.attn_bias is None):
        raise ValueError(f"{what}: the two views attend differently (causal, window or mask), so they do not compare")
    dtype = torch.promote_types(view.query.dtype, view_aug.query.dtype)
    query_masks = _both_or_none(view.query_mask, view_aug.query_mask, view.query, view_aug.query, 2)
    key_masks = _both_or_none(view.attention_mask, view_aug.attention_mask, view.key, view_aug.key, 2)
    first, second = (
        one._replace(query=one.query.to(dtype), key=one.key.to(dtype), attention_mask=key_mask, query_mask=query_mask)
        for one, key_mask, query_mask in zip((view, view_aug), key_masks, query_masks, strict=True)
    )
    return first, second


def align_hidden(view: HiddenStates, view_aug: HiddenStates) -> tuple[HiddenStates, HiddenStates]:
    """Two views in one dtype, both with a mask or both without."""
    dtype = torch.promote_types(view.states.dtype, view_aug.states.dtype)
    mask, mask_aug = _both_or_none(view.attention_mask, view_aug.attention_mask, view.states, view_aug.states, 1)
    return HiddenStates(view.states.to(dtype), mask), HiddenStates(view_aug.states.to(dtype), mask_aug)


def _both_or_none(
    mask: Tensor | None, mask_aug: Tensor | None, tensor: Tensor, tensor_aug: Tensor, dim: int
) -> tuple[Tensor | None, Tensor | None]:
    """Masks ``[B, length]``; all ones for a view without one, ``length`` being dimension ``dim`` of its tensor."""
    if mask is None and mask_aug is None:
        return None, None
    first, second = (
        torch.ones(like.shape[0], like.shape[dim], dtype=torch.bool, device=like.device) if given is None else given
        for given, like in ((mask, tensor), (mask_aug, tensor_aug))
    )
    return first, second
