"""What a site gives a loss: the tensors and masks of one view, or of both views in one batch ``[2B, ...]``, x first."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ear_ops.ops.probabilities import attention_probabilities


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

    @property
    def shape(self) -> torch.Size:
        """B, H, L, S."""
        return torch.Size((*self.query.shape[:3], self.key.shape[2]))

    def probabilities(self, query_mask: Tensor | None = None) -> Tensor:
        """The attention matrix ``[B, H, L, S]``, materialised; rows of queries that ``query_mask`` ``[B, L]`` has not
        are zero."""
        return attention_probabilities(
            self.query,
            self.key,
            self.attention_mask,
            self.attn_bias,
            query_mask,
            scale=self.scale,
            is_causal=self.is_causal,
            window=self.window,
            softcap=self.softcap,
        )


class AttentionMaps(NamedTuple):
    """Attention probabilities and masks, where a module gives no queries and keys."""

    maps: Tensor  # [B, H, L, S]
    attention_mask: Tensor | None  # [B, S] bool
    query_mask: Tensor | None  # [B, L] bool

    @property
    def shape(self) -> torch.Size:
        """B, H, L, S."""
        return self.maps.shape

    def probabilities(self, query_mask: Tensor | None = None) -> Tensor:
        """The attention matrix ``[B, H, L, S]``; with a ``query_mask`` ``[B, L]``, rows of other queries and columns of
        padded keys are zero."""
        if query_mask is None:
            return self.maps
        real = query_mask[:, None, :, None]
        if self.attention_mask is not None:
            real = real & self.attention_mask[:, None, None, :]
        return self.maps.masked_fill(~real, 0.0)


class HiddenStates(NamedTuple):
    """Hidden states and which of their tokens are real."""

    states: Tensor  # [B, L, C]
    attention_mask: Tensor | None  # [B, L] bool


def align_attention(
    view: AttentionInputs, view_aug: AttentionInputs, what: str
) -> tuple[AttentionInputs, AttentionInputs]:
    """Two views in one dtype, both with masks or both without; ``what`` names the place in errors.

    The views of one model differ in nothing else. A teacher may also have heads of another size, scale its scores
    differently or share its keys among other numbers of queries; its attention is then written with the sizes of
    ``view`` and stays the same.
    """
    heads, heads_aug = view.query.shape[1], view_aug.query.shape[1]
    if heads != heads_aug:
        raise ValueError(
            f"{what}: expected equally many heads in both views, got {heads} and {heads_aug}; heads are compared one "
            f"to one, so choose a teacher (or a layer of it) with {heads} heads, use SentencePull, or write a "
            f"regulariser that averages the maps over the heads"
        )
    if view[6:] != view_aug[6:] or (view.attn_bias is None) != (view_aug.attn_bias is None):
        raise ValueError(f"{what}: the two views attend differently (causal, window or mask), so they do not compare")
    view, view_aug = _one_head_size(view, view_aug)
    dtype = torch.promote_types(view.query.dtype, view_aug.query.dtype)
    query_masks = _both_or_none(view.query_mask, view_aug.query_mask, view.query, view_aug.query, 2)
    key_masks = _both_or_none(view.attention_mask, view_aug.attention_mask, view.key, view_aug.key, 2)
    first, second = (
        one._replace(query=one.query.to(dtype), key=one.key.to(dtype), attention_mask=key_mask, query_mask=query_mask)
        for one, key_mask, query_mask in zip((view, view_aug), key_masks, query_masks, strict=True)
    )
    return first, second


def align_maps(view: AttentionMaps, view_aug: AttentionMaps) -> tuple[AttentionMaps, AttentionMaps]:
    """Two views in one dtype, both with masks or both without."""
    dtype = torch.promote_types(view.maps.dtype, view_aug.maps.dtype)
    query_masks = _both_or_none(view.query_mask, view_aug.query_mask, view.maps, view_aug.maps, 2)
    key_masks = _both_or_none(view.attention_mask, view_aug.attention_mask, view.maps, view_aug.maps, 3)
    first, second = (
        AttentionMaps(one.maps.to(dtype), key_mask, query_mask)
        for one, key_mask, query_mask in zip((view, view_aug), key_masks, query_masks, strict=True)
    )
    return first, second


def align_hidden(view: HiddenStates, view_aug: HiddenStates, what: str) -> tuple[HiddenStates, HiddenStates]:
    """Two views in one dtype, both with a mask or both without; ``what`` names the place in errors."""
    if view.states.shape[2] != view_aug.states.shape[2]:
        raise ValueError(
            f"{what}: expected hidden states of one size in both views, got {view.states.shape[2]} and "
            f"{view_aug.states.shape[2]}; choose a teacher of that hidden size, or write a regulariser that projects "
            f"one onto the other"
        )
    dtype = torch.promote_types(view.states.dtype, view_aug.states.dtype)
    mask, mask_aug = _both_or_none(view.attention_mask, view_aug.attention_mask, view.states, view_aug.states, 1)
    return HiddenStates(view.states.to(dtype), mask), HiddenStates(view_aug.states.to(dtype), mask_aug)


def _one_head_size(view: AttentionInputs, view_aug: AttentionInputs) -> tuple[AttentionInputs, AttentionInputs]:
    """Both with one head dimension, one scale and one number of key heads.

    Zeros behind the shorter heads change no product. The second view's queries take up what its scale differs, in
    float32, so that half precision rounds once.
    """
    sizes = [one.query.shape[3] for one in (view, view_aug)]
    scales = [size**-0.5 if one.scale is None else one.scale for one, size in zip((view, view_aug), sizes, strict=True)]
    if scales[0] != scales[1]:
        query_aug = view_aug.query
        wide = torch.promote_types(query_aug.dtype, torch.float32)
        view_aug = view_aug._replace(query=(query_aug.to(wide) * (scales[1] / scales[0])).to(query_aug.dtype))
    if sizes[0] != sizes[1]:
        view, view_aug = (
            one._replace(query=F.pad(one.query, (0, max(sizes) - size)), key=F.pad(one.key, (0, max(sizes) - size)))
            for one, size in zip((view, view_aug), sizes, strict=True)
        )
    if view.key.shape[1] != view_aug.key.shape[1]:
        view, view_aug = (
            one._replace(key=one.key.repeat_interleave(one.query.shape[1] // one.key.shape[1], dim=1))
            for one in (view, view_aug)
        )
    if scales[0] != scales[1] or sizes[0] != sizes[1]:
        view, view_aug = view._replace(scale=scales[0]), view_aug._replace(scale=scales[0])
    return view, view_aug


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
