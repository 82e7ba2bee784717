"""Two views in one tensor or in two, and what their masks mean together: which queries and keys are counted.

Masks are given by users as bool or integer, 1 = real. A query counts when it is real in both views; a key when it is
real in at least one (where only one has it, the other's probability is zero).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ear_ops.arguments import check_tensor


class AttentionMasks(NamedTuple):
    """The masks of both views, resolved; every field is None where nothing is masked."""

    key_mask: Tensor | None  # [2B, S] bool, keys that exist in each view, x first
    counted_queries: Tensor | None  # [B, L] bool, rows that enter the sum
    counted_pairs: Tensor | None  # [B] int, counted queries times counted keys


_OF_HEADS = "where heads differ in number or size, compare their averages (heads='mean')"
_OF_LENGTH = "pad both views to one length, or compare words (alignment='word') where their tokenizers differ"
_ADVICE = {  # by the dimension in which two views differ
    "B": "give both views the same pairs",
    "H": _OF_HEADS,
    "H_kv": _OF_HEADS,
    "D": _OF_HEADS,
    "L": _OF_LENGTH,
    "S": _OF_LENGTH,
    "C": "project one view to the size of the other",
}


def check_two_views(
    name: str, first: Tensor, second: Tensor | None, *, ndim: int, layout: str, may_differ: Sequence[int] = ()
) -> bool:
    """Check the tensor of both views, or the tensors of each; True where both views are in the first.

    ``may_differ``: dimensions in which the second view may have another size than the first.

    Raises:
        ValueError, TypeError: a tensor does not fit; the message calls it ``name``.
    """
    for argument, view in ((name, first), (f"{name}_aug", second)):
        if not isinstance(view, Tensor) and (view is not None or argument == name):
            raise TypeError(f"{argument}: expected a tensor {layout}, got {type(view).__name__}")
    if first.dim() != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions {layout}, got shape {list(first.shape)}")
    if not first.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point tensor, got {first.dtype}")
    if second is None:
        if first.shape[0] % 2:
            raise ValueError(
                f"{name}: expected an even batch that holds both views, x first, because {name}_aug is None; "
                f"got shape {list(first.shape)}"
            )
        return True
    same = [dim for dim in range(ndim) if dim not in may_differ]
    if second.dim() != ndim or any(second.shape[dim] != first.shape[dim] for dim in same):
        others = f" but for dimensions {' and '.join(map(str, may_differ))}" if may_differ else ""
        advice = ""
        if second.dim() == ndim:
            wrong = next(dim for dim in same if second.shape[dim] != first.shape[dim])
            advice = f"; {_ADVICE[layout.strip('[]').split(', ')[wrong]]}"
        raise ValueError(
            f"{name}_aug: expected the shape of {name}, {list(first.shape)}{others}, got {list(second.shape)}{advice}"
        )
    for what in ("dtype", "device"):
        if getattr(second, what) != getattr(first, what):
            raise TypeError(
                f"{name}_aug: expected {what} {getattr(first, what)} like {name}, got {getattr(second, what)}"
            )
    return False


def split_views(both: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor]:
    """The two views ``[B, ...]``, out of one tensor ``[2B, ...]`` (``second`` None) or out of two."""
    return (both[: both.shape[0] // 2], both[both.shape[0] // 2 :]) if second is None else (both, second)


def join_views(
    name: str,
    mask: Tensor | None,
    mask_aug: Tensor | None,
    batch: int,
    length: int,
    stacked: bool,
    device: torch.device,
) -> Tensor | None:
    """``[2B, length]`` bool mask of both views out of what the caller gave, or None.

    Args:
        name: the argument's name, for errors.
        mask: ``[2B, length]`` where ``stacked`` (both views in one tensor), else ``[B, length]`` of x.
        mask_aug: None where ``stacked``, else ``[B, length]`` of x^a.
        device: of the tensors that the masks belong to.
    """
    if stacked and mask_aug is not None:
        raise ValueError(
            f"{name}_aug: expected None, because both views came in one tensor and {name} holds both masks, "
            f"got another one; pass all {2 * batch} rows in {name}"
        )
    if not stacked and (mask is None) != (mask_aug is None):
        present, missing = (name, f"{name}_aug") if mask is not None else (f"{name}_aug", name)
        raise ValueError(
            f"{missing}: expected a mask because {present} was given, got None; "
            f"the views are padded differently, so pass both (all ones where nothing is padded)"
        )
    if mask is None:
        return None
    checked = _as_bool(name, mask, (2 * batch if stacked else batch, length), device)
    if mask_aug is None:
        return checked
    return torch.cat([checked, _as_bool(f"{name}_aug", mask_aug, (batch, length), device)])


def resolve_attention_masks(
    attention_mask: Tensor | None,
    attention_mask_aug: Tensor | None,
    query_mask: Tensor | None,
    query_mask_aug: Tensor | None,
    *,
    batch: int,
    query_length: int,
    key_length: int,
    stacked: bool,
    device: torch.device,
    count_padded_queries: bool,
) -> AttentionMasks:
    """Resolve the user's masks of an attention loss.

    ``attention_mask`` ``[B, S]`` masks keys; ``query_mask`` ``[B, L]`` masks queries and is ``attention_mask`` by
    default where L = S (``[2B, ...]`` where ``stacked``). ``count_padded_queries``: the reduction ``"padded_mean"``.
    """
    key_mask = join_views("attention_mask", attention_mask, attention_mask_aug, batch, key_length, stacked, device)
    both_queries = join_views("query_mask", query_mask, query_mask_aug, batch, query_length, stacked, device)
    if both_queries is None and query_length == key_length:
        both_queries = key_mask
    if count_padded_queries:
        return AttentionMasks(key_mask, None, None)
    counted_queries = None if both_queries is None else both_queries[:batch] & both_queries[batch:]
    if key_mask is None and counted_queries is None:
        return AttentionMasks(None, None, None)
    queries: Tensor | int = query_length if counted_queries is None else counted_queries.sum(dim=1)
    keys: Tensor | int = key_length if key_mask is None else (key_mask[:batch] | key_mask[batch:]).sum(dim=1)
    counted_pairs = queries * keys
    assert isinstance(counted_pairs, Tensor), "one of both has a mask"
    return AttentionMasks(key_mask, counted_queries, counted_pairs)


def _as_bool(name: str, mask: Tensor, shape: tuple[int, int], device: torch.device) -> Tensor:
    check_tensor(name, mask, f"pass a tensor {list(shape)}, 1 = real")
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(mask.shape)}")
    if mask.dtype.is_floating_point or mask.dtype.is_complex:
        raise TypeError(
            f"{name}: expected bool or integer, 1 = real, got {mask.dtype}; an additive float mask goes into attn_bias"
        )
    if mask.device != device:
        raise ValueError(f"{name}: expected a mask on {device}, where the other tensors are, got one on {mask.device}")
    return mask if mask.dtype == torch.bool else mask != 0
