"""Changed cases (padding filled, pairs picked) and bitwise comparison, for the tests of properties."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ear_ops.ops import blocks

from .cases import Case


def bits_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))


def same_results(a: tuple[Tensor, list[Tensor | None]], b: tuple[Tensor, list[Tensor | None]]) -> bool:
    return bits_equal(a[0], b[0]) and all(bits_equal(x, y) for x, y in zip(a[1], b[1], strict=True))


def check_blocks_change_nothing(case: Case) -> None:
    """The reference gives the same in one block of queries and in many."""
    value, gradients = case.run("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_ENTRIES", 500)
        in_blocks, block_gradients = case.run("reference")
    torch.testing.assert_close(in_blocks, value)
    for gradient, expected in zip(block_gradients, gradients, strict=True):
        torch.testing.assert_close(gradient, expected)


def padding_of(case: Case) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """For each input of each view: True where nothing of it may be looked at, broadcastable to the input."""
    views: list[list[Tensor | None]] = []
    for suffix in ("", "_aug"):
        mask = case.masks.get(f"attention_mask{suffix}")
        keys = None if mask is None else mask == 0
        if case.op == "pooled_distance":
            views.append([None if keys is None else keys[:, :, None]])
            continue
        query_mask, query_mask_aug = case.masks.get("query_mask"), case.masks.get("query_mask_aug")
        width = case.x[-1].shape[2 if case.op.startswith("qk_") else 3]
        if query_mask is None and case.x[0].shape[2] == width:
            query_mask, query_mask_aug = case.masks.get("attention_mask"), case.masks.get("attention_mask_aug")
        rows = None
        if query_mask is not None and query_mask_aug is not None and case.reduction != "padded_mean":
            rows = (query_mask == 0) | (query_mask_aug == 0)
        row_part = None if rows is None else rows[:, None, :, None]
        if case.op.startswith("qk_"):
            views.append([row_part, None if keys is None else keys[:, None, :, None]])
        else:
            parts = [part for part in (row_part, None if keys is None else keys[:, None, None, :]) if part is not None]
            views.append([None if not parts else parts[0] if len(parts) == 1 else parts[0] | parts[1]])
    return views[0], views[1]


def fill_padding(case: Case, value: float) -> Case:
    x, x_aug = (
        tuple(t if where is None else t.masked_fill(where, value) for t, where in zip(view, padding, strict=True))
        for view, padding in zip((case.x, case.x_aug), padding_of(case), strict=True)
    )
    return replace(case, x=x, x_aug=x_aug)


def pairs_of(case: Case, index: Tensor) -> Case:
    """The same case with these pairs, in this order."""

    def picked(given: dict[str, Tensor], own: int) -> dict[str, Tensor]:
        return {name: t[index] if t.dim() == own and t.shape[0] == case.pairs else t for name, t in given.items()}

    x, x_aug = (tuple(t[index] for t in view) for view in (case.x, case.x_aug))
    biases = {
        name: bias[index] if bias.dim() == 4 and bias.shape[0] != 1 else bias for name, bias in case.biases.items()
    }
    return replace(case, x=x, x_aug=x_aug, masks=picked(case.masks, 2), biases=biases)
