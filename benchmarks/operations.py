"""Define the three losses for the benchmarks: their inputs, the ways to compute them, and the work that they need.

Every way gets the same inputs and computes the `mean` reduction. The inputs have the strides that they have in models:
both views are in one tensor, and its memory is in the order `[2B, L, H, D]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from presets import Preset
from torch import Tensor

import ear_ops
from ear_ops.ops.probabilities import structure_mask

FEATURES = 768  # C of the hidden states


@dataclass
class Inputs:
    tensors: tuple[Tensor, ...]  # tensors that need a gradient; each holds both views
    mask: Tensor | None = None  # [2B, L] bool
    options: dict[str, bool] = field(default_factory=dict)

    def to(self, target: torch.dtype | str) -> Inputs:
        """Return the inputs in another dtype or on another device."""
        mask = self.mask.to(target) if isinstance(target, str) and self.mask is not None else self.mask
        return Inputs(tuple(t.detach().to(target).requires_grad_() for t in self.tensors), mask, self.options)


@dataclass(frozen=True)
class Work:
    """The least work of a call: multiplications and additions, exponentials, and bytes to read and write."""

    flops: float
    exponentials: float
    bytes: float


Loss = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Operation:
    make: Callable[[Preset, torch.dtype], Inputs]
    eager: Loss
    fused: Loss
    work: Callable[[Preset, int, bool], Work]  # takes the preset, the bytes of an element, whether with backward
    part: Callable[[Inputs], Inputs]  # a part of the inputs, small enough for float64
    eager_bytes: Callable[[Preset], float]  # about how many bytes plain PyTorch holds


def _views(*shape: int) -> Tensor:
    """Return two views `[2B, ...]`. The second is the first with noise, because the views of a model are similar."""
    first = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return torch.cat([first, first + 0.3 * noise])


def _mask(preset: Preset) -> Tensor | None:
    lengths = preset.lengths()
    if lengths is None:
        return None
    both = torch.tensor([a for a, _ in lengths] + [b for _, b in lengths])
    return torch.arange(preset.length) < both[:, None]


def _masks(inputs: Inputs) -> dict[str, Tensor]:
    return {} if inputs.mask is None else {"attention_mask": inputs.mask}


def _cells(preset: Preset) -> float:
    """Return how many (head, query, key) triples of a view a loss must compute."""
    lengths = preset.lengths()
    if lengths is not None:
        return preset.heads * sum(min(a, b) * max(a, b) for a, b in lengths)
    per_head = preset.length * (preset.length + 1) / 2 if preset.is_causal else preset.length**2
    return preset.pairs * preset.heads * per_head


def _tokens(preset: Preset) -> int:
    """Return how many tokens of both views a loss must read."""
    lengths = preset.lengths()
    return sum(a + b for a, b in lengths) if lengths is not None else 2 * preset.pairs * preset.length


def _counted_mean(squared: Tensor, mask: Tensor | None) -> Tensor:  # squared: [B, H, L, L]
    if mask is None:
        return squared.mean()
    first, second = mask.chunk(2)
    queries, keys = first & second, first | second
    count = squared.shape[1] * (queries.sum(-1) * keys.sum(-1)).sum()
    return squared.masked_fill(~queries[:, None, :, None], 0.0).sum() / count


# --- qk_attention_mse ---------------------------------------------------------------------------------------------


def _qk_make(preset: Preset, dtype: torch.dtype) -> Inputs:
    heads = (preset.heads, preset.key_heads or preset.heads)
    tensors = tuple(
        _views(preset.pairs, preset.length, h, preset.dim).to(dtype).transpose(1, 2).requires_grad_() for h in heads
    )
    return Inputs(tensors, _mask(preset), {"is_causal": True} if preset.is_causal else {})


def _qk_eager(inputs: Inputs) -> Tensor:
    query, key = inputs.tensors
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if inputs.mask is not None:
        scores = scores.masked_fill(~inputs.mask[:, None, None, :], -math.inf)
    if inputs.options.get("is_causal"):
        allowed = structure_mask(query.shape[2], key.shape[2], True, None, query.device)
        scores = scores.masked_fill(~allowed, -math.inf)
    first, second = torch.softmax(scores, dim=-1).chunk(2)
    return F.mse_loss(first, second) if inputs.mask is None else _counted_mean((first - second) ** 2, inputs.mask)


def _qk_fused(inputs: Inputs) -> Tensor:
    query, key = inputs.tensors
    return ear_ops.qk_attention_mse(query, key, **_masks(inputs), **inputs.options, backend=query.device.type)


def _qk_work(preset: Preset, element: int, backward: bool) -> Work:
    cells, views = _cells(preset), 2
    read = _tokens(preset) * preset.dim * element * (preset.heads + (preset.key_heads or preset.heads))
    written = 2 * preset.pairs * preset.length * preset.dim * element
    written *= preset.heads + (preset.key_heads or preset.heads)
    products = 8 if backward else 2  # forward: scores of both views; backward: these again, and dQ and dK of both views
    return Work(
        flops=products * 2.0 * cells * preset.dim,
        exponentials=views * cells * (2 if backward else 1),
        bytes=2.0 * read + written if backward else read,
    )


def _qk_part(inputs: Inputs) -> Inputs:
    """Return the inputs, or the first key head and the last 512 queries where the inputs are too large."""
    query, key = inputs.tensors
    if query.shape[:3].numel() * key.shape[2] <= 2**26:
        return inputs
    group = query.shape[1] // key.shape[1]
    part = (query[:, :group, -512:], key[:, :1])
    return Inputs(tuple(t.detach().requires_grad_() for t in part), inputs.mask, inputs.options)


def _maps_bytes(preset: Preset) -> float:
    return 6.0 * 2 * preset.pairs * preset.heads * preset.length**2 * 4


# --- attention_mse ------------------------------------------------------------------------------------------------


def _attention_make(preset: Preset, dtype: torch.dtype) -> Inputs:
    shape = (preset.pairs, preset.heads, preset.length, preset.length)
    return Inputs((torch.softmax(_views(*shape), dim=-1).to(dtype).requires_grad_(),), _mask(preset))


def _attention_eager(inputs: Inputs) -> Tensor:
    attn = inputs.tensors[0]
    if inputs.mask is None:
        return F.mse_loss(*attn.chunk(2))
    first, second = attn.masked_fill(~inputs.mask[:, None, None, :], 0.0).chunk(2)
    return _counted_mean((first - second) ** 2, inputs.mask)


def _attention_fused(inputs: Inputs) -> Tensor:
    return ear_ops.attention_mse(inputs.tensors[0], **_masks(inputs), backend=inputs.tensors[0].device.type)


def _attention_work(preset: Preset, element: int, backward: bool) -> Work:
    maps = 2.0 * _cells(preset) * element
    written = 2.0 * preset.pairs * preset.heads * preset.length**2 * element
    return Work(0, 0, 2 * maps + written if backward else maps)


# --- pooled_distance ----------------------------------------------------------------------------------------------


def _pooled_make(preset: Preset, dtype: torch.dtype) -> Inputs:
    return Inputs((_views(preset.pairs, preset.length, FEATURES).to(dtype).requires_grad_(),), _mask(preset))


def _pooled_eager(inputs: Inputs) -> Tensor:
    hidden = inputs.tensors[0]
    if inputs.mask is None:
        return F.mse_loss(*hidden.mean(dim=1).chunk(2))
    weights = inputs.mask[:, :, None].to(hidden.dtype)
    return F.mse_loss(*((hidden * weights).sum(dim=1) / weights.sum(dim=1)).chunk(2))


def _pooled_fused(inputs: Inputs) -> Tensor:
    return ear_ops.pooled_distance(inputs.tensors[0], **_masks(inputs), backend=inputs.tensors[0].device.type)


def _pooled_work(preset: Preset, element: int, backward: bool) -> Work:
    written = 2.0 * preset.pairs * preset.length * FEATURES * element
    return Work(0, 0, _tokens(preset) * FEATURES * element + (written if backward else 0))


OPERATIONS = {
    "qk_attention_mse": Operation(_qk_make, _qk_eager, _qk_fused, _qk_work, _qk_part, _maps_bytes),
    "attention_mse": Operation(
        _attention_make, _attention_eager, _attention_fused, _attention_work, lambda inputs: inputs, _maps_bytes
    ),
    "pooled_distance": Operation(
        _pooled_make, _pooled_eager, _pooled_fused, _pooled_work, lambda inputs: inputs, lambda preset: 0.0
    ),
}
