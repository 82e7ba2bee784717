"""Nested tensors: rows of different lengths, which ``nn.TransformerEncoder`` makes of padded ones in evaluation."""

from __future__ import annotations

import torch
from torch import Tensor


def padded(nested: Tensor, length: int | None = None) -> tuple[Tensor, Tensor]:
    """A nested tensor as ``[B, L, C]``, zeros where a row has ended, and its mask ``[B, L]`` bool of real tokens.

    ``length``: L; None takes the longest row.
    """
    lengths = [len(row) for row in nested.unbind()]
    size = (len(lengths), max(lengths) if length is None else length, nested.size(2))
    position = torch.arange(size[1], device=nested.device)
    mask = position < torch.tensor(lengths, device=nested.device)[:, None]
    return torch.nested.to_padded_tensor(nested, 0.0, size), mask
