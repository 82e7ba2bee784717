"""Readings: what a site gives a loss, the tensors and masks of one view.

One reading may also hold both views in one batch ``[2B, ...]``, x first. The fields of a reading are arguments of the
function that compares two of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ear_ops.ops.probabilities import attention_probabilities

Reading = TypeVar("Reading", bound=tuple[Any, ...])


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
        """The attention matrix ``[B, H, L, S]``, materialised; rows of queries outside ``query_mask`` are zero.

        ``query_mask``: ``[B, L]`` bool.
        """
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

    def padded(self, length: int) -> AttentionInputs:
        """A self-attention with padding behind its L tokens, up to ``length``; its attention stays the same."""
        queries, rest = self.shape[2], length - self.shape[2]
        keys = self.attention_mask
        if keys is None:
            keys = torch.ones(self.query.shape[0], queries, dtype=torch.bool, device=self.query.device)
        bias = self.attn_bias
        if bias is not None and rest:
            # Of a bias that is broadcast over queries or keys, that dimension stays.
            sides = [rest if size == queries else 0 for size in bias.shape[-2:]]
            bias = F.pad(bias, [side for after in reversed(sides) for side in (0, after)])
        return self._replace(
            query=F.pad(self.query, (0, 0, 0, rest)),
            key=F.pad(self.key, (0, 0, 0, rest)),
            attention_mask=F.pad(keys, (0, rest)),
            query_mask=None if self.query_mask is None else F.pad(self.query_mask, (0, rest)),
            attn_bias=bias,
        )


class AttentionMaps(NamedTuple):
    """Attention probabilities and masks, where a module gives no queries and keys."""

    attn: Tensor  # [B, H, L, S]
    attention_mask: Tensor | None  # [B, S] bool
    query_mask: Tensor | None  # [B, L] bool

    @property
    def shape(self) -> torch.Size:
        """B, H, L, S."""
        return self.attn.shape

    def probabilities(self, query_mask: Tensor | None = None) -> Tensor:
        """The attention matrix ``[B, H, L, S]``.

        With a ``query_mask`` ``[B, L]``, rows of queries outside it and columns of padded keys are zero.
        """
        if query_mask is None:
            return self.attn
        real = query_mask[:, None, :, None]
        if self.attention_mask is not None:
            real = real & self.attention_mask[:, None, None, :]
        return self.attn.masked_fill(~real, 0.0)


class HiddenStates(NamedTuple):
    """Hidden states and which of their tokens are real."""

    states: Tensor  # [B, L, C]
    attention_mask: Tensor | None  # [B, L] bool


def split_reading(reading: Reading, reading_aug: Reading | None) -> tuple[Reading, Reading]:
    """The readings of two views ``[B, ...]``, out of one with both ``[2B, ...]`` (``reading_aug`` None) or out of two.

    Every field of the reading is a tensor or None.
    """
    if reading_aug is not None:
        return reading, reading_aug
    halves = [(None, None) if value is None else value.chunk(2) for value in reading]
    first, second = (type(reading)(*values) for values in zip(*halves, strict=True))
    return first, second


def align_attention(
    reading: AttentionInputs, reading_aug: AttentionInputs, what: str, heads: str = "each"
) -> tuple[AttentionInputs, AttentionInputs]:
    """The readings of two views in one dtype, both with masks or both without; ``what`` names the place in errors.

    Two views of one model differ in nothing else. A teacher may also have heads of another size, another scale, or keys
    that other numbers of queries share. Its reading is then written with the sizes of ``reading``; its attention stays
    the same. With ``heads="mean"`` its heads are as they are, and only its scale is written with that of ``reading``.
    """
    count, count_aug = reading.query.shape[1], reading_aug.query.shape[1]
    if heads == "each" and count != count_aug:
        raise ValueError(
            f"{what}: expected equally many heads in both views, got {count} and {count_aug}; heads are compared one "
            f"to one, so compare their averages with AttentionPull(layer, heads='mean'), use RelationPull(layer, "
            f"relation_heads=...) or HiddenPull, or choose a teacher (or a layer of it) with {count} heads"
        )
    if not attend_alike(reading, reading_aug):
        described, described_aug = (
            ", ".join(f"{name}={value}" for name, value in _structure_of(view).items())
            for view in (reading, reading_aug)
        )
        raise ValueError(
            f"{what}: expected attention of one structure in both views, got {described} and {described_aug}; "
            f"compare words (alignment='word'), or use RelationPull, HiddenPull or LogitsPull"
        )
    if heads == "each":
        reading, reading_aug = _one_head_size(reading, reading_aug)
    elif all(_scale_of(view) == view.query.shape[3] ** -0.5 for view in (reading, reading_aug)):
        reading, reading_aug = (view._replace(scale=None) for view in (reading, reading_aug))
    else:
        reading, reading_aug = _one_scale(reading, reading_aug)
    dtype = torch.promote_types(reading.query.dtype, reading_aug.query.dtype)
    query_masks = _both_or_none(reading.query_mask, reading_aug.query_mask, reading.query, reading_aug.query, 2)
    key_masks = _both_or_none(reading.attention_mask, reading_aug.attention_mask, reading.key, reading_aug.key, 2)
    first, second = (
        view._replace(query=view.query.to(dtype), key=view.key.to(dtype), attention_mask=keys, query_mask=queries)
        for view, keys, queries in zip((reading, reading_aug), key_masks, query_masks, strict=True)
    )
    return first, second


def attend_alike(reading: AttentionInputs, reading_aug: AttentionInputs) -> bool:
    """Whether two views have one structure: causality, window, softcap, and whether there is a bias."""
    return _structure_of(reading) == _structure_of(reading_aug)


def _structure_of(reading: AttentionInputs) -> dict[str, Any]:
    names = ("is_causal", "window", "softcap")
    return {**{name: getattr(reading, name) for name in names}, "bias": reading.attn_bias is not None}


def align_maps(reading: AttentionMaps, reading_aug: AttentionMaps) -> tuple[AttentionMaps, AttentionMaps]:
    """The readings of two views in one dtype, both with masks or both without."""
    dtype = torch.promote_types(reading.attn.dtype, reading_aug.attn.dtype)
    query_masks = _both_or_none(reading.query_mask, reading_aug.query_mask, reading.attn, reading_aug.attn, 2)
    key_masks = _both_or_none(reading.attention_mask, reading_aug.attention_mask, reading.attn, reading_aug.attn, 3)
    first, second = (
        AttentionMaps(view.attn.to(dtype), key_mask, query_mask)
        for view, key_mask, query_mask in zip((reading, reading_aug), key_masks, query_masks, strict=True)
    )
    return first, second


def align_hidden(reading: HiddenStates, reading_aug: HiddenStates, what: str) -> tuple[HiddenStates, HiddenStates]:
    """The readings of two views in one dtype, both with a mask or both without; ``what`` names the place in errors."""
    states, states_aug = reading.states, reading_aug.states
    if states.shape[2] != states_aug.shape[2]:
        raise ValueError(
            f"{what}: expected hidden states of one size in both views, got {states.shape[2]} and "
            f"{states_aug.shape[2]}; choose a teacher of that hidden size, or use "
            f"HiddenPull(layer, projection='linear')"
        )
    dtype = torch.promote_types(states.dtype, states_aug.dtype)
    mask, mask_aug = _both_or_none(reading.attention_mask, reading_aug.attention_mask, states, states_aug, 1)
    return HiddenStates(states.to(dtype), mask), HiddenStates(states_aug.to(dtype), mask_aug)


def _one_head_size(reading: AttentionInputs, reading_aug: AttentionInputs) -> tuple[AttentionInputs, AttentionInputs]:
    """Both with one head dimension, one scale and one number of key heads.

    Zeros behind the shorter heads change no product.
    """
    sizes = [view.query.shape[3] for view in (reading, reading_aug)]
    if sizes[0] != sizes[1]:
        reading, reading_aug = (view._replace(scale=_scale_of(view)) for view in (reading, reading_aug))
    reading, reading_aug = _one_scale(reading, reading_aug)
    if sizes[0] != sizes[1]:
        reading, reading_aug = (
            view._replace(query=F.pad(view.query, (0, max(sizes) - size)), key=F.pad(view.key, (0, max(sizes) - size)))
            for view, size in zip((reading, reading_aug), sizes, strict=True)
        )
    if reading.key.shape[1] != reading_aug.key.shape[1]:
        reading, reading_aug = (
            view._replace(key=view.key.repeat_interleave(view.query.shape[1] // view.key.shape[1], dim=1))
            for view in (reading, reading_aug)
        )
    return reading, reading_aug


def _scale_of(reading: AttentionInputs) -> float:
    return float(reading.query.shape[3] ** -0.5 if reading.scale is None else reading.scale)


def _one_scale(reading: AttentionInputs, reading_aug: AttentionInputs) -> tuple[AttentionInputs, AttentionInputs]:
    """Both with one scale, or both with None, which is 1/sqrt(D) of each.

    The second view's queries take up the ratio of the scales, in float32, so that half precision rounds once.
    """
    if all(view.scale is None for view in (reading, reading_aug)):
        return reading, reading_aug
    scale, scale_aug = _scale_of(reading), _scale_of(reading_aug)
    if scale != scale_aug:
        query = reading_aug.query
        wide = torch.promote_types(query.dtype, torch.float32)
        reading_aug = reading_aug._replace(query=(query.to(wide) * (scale_aug / scale)).to(query.dtype))
    return reading._replace(scale=scale), reading_aug._replace(scale=scale)


def _both_or_none(
    mask: Tensor | None, mask_aug: Tensor | None, tensor: Tensor, tensor_aug: Tensor, dim: int
) -> tuple[Tensor | None, Tensor | None]:
    """The masks ``[B, length]``, or None twice where both are None.

    A view without a mask gets all ones; ``length`` is dimension ``dim`` of its tensor.
    """
    if mask is None and mask_aug is None:
        return None, None
    first, second = (
        torch.ones(like.shape[0], like.shape[dim], dtype=torch.bool, device=like.device) if of_view is None else of_view
        for of_view, like in ((mask, tensor), (mask_aug, tensor_aug))
    )
    return first, second
