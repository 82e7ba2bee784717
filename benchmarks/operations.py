"""Define the losses for the benchmarks: their inputs, the ways to compute them, and the work that they need.

Every way gets the same inputs and computes the `mean` reduction. The inputs have the strides that they have in models:
both views are in one tensor, and its memory is in the order `[2B, L, H, D]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from limits import Work
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
    teacher: tuple[Tensor, ...] = ()  # of `distillation`, where `tensors` hold the student's view alone

    def to(self, target: torch.dtype | str) -> Inputs:
        """Return the inputs in another dtype or on another device."""
        mask = self.mask.to(target) if isinstance(target, str) and self.mask is not None else self.mask
        tensors = tuple(t.detach().to(target).requires_grad_() for t in self.tensors)
        return Inputs(tensors, mask, self.options, tuple(t.to(target) for t in self.teacher))


Loss = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Operation:
    make: Callable[[Preset, torch.dtype], Inputs]
    eager: Loss
    fused: Loss
    work: Callable[[Preset, int, bool], Work]  # takes the preset, the bytes of an element, whether with backward
    part: Callable[[Inputs], Inputs]  # a part of the inputs, where they are too large for float64
    eager_bytes: Callable[[Preset], float]  # about how many bytes plain PyTorch holds
    mse: Loss | None = None  # the squared error of the same inputs, which a divergence is timed beside


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


def _maps(query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, bool]) -> Tensor:
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -math.inf)
    if options.get("is_causal"):
        allowed = structure_mask(query.shape[2], key.shape[2], True, None, query.device)
        scores = scores.masked_fill(~allowed, -math.inf)
    return torch.softmax(scores, dim=-1)


def _map_mse(first: Tensor, second: Tensor, mask: Tensor | None) -> Tensor:
    return F.mse_loss(first, second) if mask is None else _counted_mean((first - second) ** 2, mask)


def _qk_eager(inputs: Inputs) -> Tensor:
    return _map_mse(*_maps(*inputs.tensors, inputs.mask, inputs.options).chunk(2), inputs.mask)


def _qk_fused(inputs: Inputs) -> Tensor:
    query, key = inputs.tensors
    return ear_ops.qk_attention_mse(query, key, **_masks(inputs), **inputs.options, backend=query.device.type)


def _mean_heads_work(preset: Preset, element: int, backward: bool) -> Work:
    """Return the work of the kernels, whose forward makes the gradients from the scores that it has at hand."""
    forward = _qk_work(preset, element, False)
    if not backward:
        return forward
    return Work(
        flops=3 * forward.flops,  # scores, dQ and dK of both views
        exponentials=forward.exponentials,
        bytes=4.0 * forward.bytes,  # inputs are read, and gradients written, read and written
    )


def _mean_heads_eager(inputs: Inputs) -> Tensor:
    """Return the error between the averages over the heads."""
    averages = _maps(*inputs.tensors, inputs.mask, inputs.options).mean(1, keepdim=True)
    return _map_mse(*averages.chunk(2), inputs.mask)


def _mean_heads_fused(inputs: Inputs) -> Tensor:
    query, key = inputs.tensors
    return ear_ops.qk_attention_mse(
        query, key, **_masks(inputs), **inputs.options, heads="mean", backend=query.device.type
    )


def _divergence(name: str, compared: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]) -> Operation:
    """Return the comparison of attention by the function called `name`, over keys that both views have.

    `compared` is its mean in eager PyTorch. It takes the scores `[B, H, L, L]` of both views, which keys a query may
    attend to, and which queries are real. None is all of them.
    """

    def shared(inputs: Inputs) -> Inputs:
        if inputs.mask is None:
            return inputs
        both = torch.logical_and(*inputs.mask.chunk(2)).repeat(2, 1)
        return Inputs(inputs.tensors, both, inputs.options)

    def eager(inputs: Inputs) -> Tensor:
        query, key = inputs.tensors
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        allowed = real = None
        if inputs.options.get("is_causal"):
            allowed = structure_mask(query.shape[2], key.shape[2], True, None, query.device)
        if inputs.mask is not None:
            real = torch.logical_and(*inputs.mask.chunk(2))
            of_keys = real[:, None, None, :]
            allowed = of_keys if allowed is None else of_keys & allowed
        return compared(*scores.chunk(2), allowed, real)

    def fused(inputs: Inputs) -> Tensor:
        query, key = inputs.tensors
        function = getattr(ear_ops, name)
        return function(query, key, **_masks(shared(inputs)), **inputs.options, backend=query.device.type)

    def mse(inputs: Inputs) -> Tensor:
        return _qk_fused(shared(inputs))

    return Operation(_qk_make, eager, fused, _qk_work, _qk_part, _maps_bytes, mse)


def _log_softmax(scores: Tensor, allowed: Tensor | None) -> Tensor:
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    return F.log_softmax(scores, dim=-1)


def _kl_rows(log_p: Tensor, log_t: Tensor) -> Tensor:
    return F.kl_div(log_p, log_t, log_target=True, reduction="none").sum(-1)


def _mean_of_rows(rows: Tensor, real: Tensor | None) -> Tensor:  # rows: [B, H, L]
    return rows.mean() if real is None else rows.transpose(1, 2)[real].mean()


def _kl_eager(scores: Tensor, scores_aug: Tensor, allowed: Tensor | None, real: Tensor | None) -> Tensor:
    return _mean_of_rows(_kl_rows(_log_softmax(scores, allowed), _log_softmax(scores_aug, allowed)), real)


def _js_eager(scores: Tensor, scores_aug: Tensor, allowed: Tensor | None, real: Tensor | None) -> Tensor:
    first, second = _log_softmax(scores, allowed), _log_softmax(scores_aug, allowed)
    log_mean = torch.logaddexp(first, second) - math.log(2.0)
    return _mean_of_rows((_kl_rows(log_mean, first) + _kl_rows(log_mean, second)) / 2.0, real)


def _scores_eager(scores: Tensor, scores_aug: Tensor, allowed: Tensor | None, real: Tensor | None) -> Tensor:
    squared = (scores - scores_aug) ** 2
    if allowed is None:
        return squared.mean()
    counted = allowed if real is None else allowed & real[:, None, :, None]
    counted = counted.expand_as(squared)
    return squared.masked_fill(~counted, 0.0).sum() / counted.sum()


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
    """Return the first key head and the last 512 queries."""
    query, key = inputs.tensors
    group = query.shape[1] // key.shape[1]
    part = (query[:, :group, -512:], key[:, :1])
    return Inputs(tuple(t.detach().requires_grad_() for t in part), inputs.mask, inputs.options)


def _maps_bytes(preset: Preset) -> float:
    return 6.0 * 2 * preset.layers * preset.pairs * preset.heads * preset.length**2 * 4


# --- distillation -------------------------------------------------------------------------------------------------


def _distillation_make(preset: Preset, dtype: torch.dtype) -> Inputs:
    """Return Q and K of all layers of a student, which need a gradient, and those of a teacher, which do not."""
    layers = [_qk_make(preset, dtype) for _ in range(preset.layers)]
    student, teacher = zip(*(t.detach().chunk(2) for layer in layers for t in layer.tensors), strict=True)
    return Inputs(tuple(t.requires_grad_() for t in student), layers[0].mask, layers[0].options, teacher)


def _distillation(inputs: Inputs, of_layer: Callable[..., Tensor]) -> Tensor:
    """Return the sum over the layers of a loss of (query, key, query of the teacher, key of the teacher, masks)."""
    masks = (None, None) if inputs.mask is None else inputs.mask.chunk(2)
    tensors, teacher = inputs.tensors, inputs.teacher
    layers = zip(tensors[::2], tensors[1::2], teacher[::2], teacher[1::2], strict=True)
    return torch.stack([of_layer(*layer, *masks) for layer in layers]).sum()


def _distillation_eager(inputs: Inputs) -> Tensor:
    def of_layer(query, key, query_aug, key_aug, mask, mask_aug):  # type: ignore[no-untyped-def]
        maps = _maps(query, key, mask, inputs.options), _maps(query_aug, key_aug, mask_aug, inputs.options)
        return _map_mse(*maps, inputs.mask)

    return _distillation(inputs, of_layer)


def _distillation_fused(inputs: Inputs) -> Tensor:
    def of_layer(query, key, query_aug, key_aug, mask, mask_aug):  # type: ignore[no-untyped-def]
        masks = {"attention_mask": mask, "attention_mask_aug": mask_aug}
        return ear_ops.qk_attention_mse(
            query, key, query_aug, key_aug, **masks, **inputs.options, backend=query.device.type
        )

    return _distillation(inputs, of_layer)


def _distillation_work(preset: Preset, element: int, backward: bool) -> Work:
    """Return the work of all layers. It is that of `qk_attention_mse` without the gradients of one view."""
    work = _qk_work(preset, element, backward)
    written = preset.pairs * preset.length * preset.dim * element * (preset.heads + (preset.key_heads or preset.heads))
    return Work(
        flops=preset.layers * work.flops * (6 / 8 if backward else 1),
        exponentials=preset.layers * work.exponentials,
        bytes=preset.layers * (work.bytes - (written if backward else 0)),
    )


def _distillation_part(inputs: Inputs) -> Inputs:
    """Return the first layer."""
    tensors = tuple(t.detach().requires_grad_() for t in inputs.tensors[:2])
    return Inputs(tensors, inputs.mask, inputs.options, inputs.teacher[:2])


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
    "qk_attention_kl": _divergence("qk_attention_kl", _kl_eager),
    "qk_attention_js": _divergence("qk_attention_js", _js_eager),
    "qk_scores_mse": _divergence("qk_scores_mse", _scores_eager),
    "heads_mean": Operation(_qk_make, _mean_heads_eager, _mean_heads_fused, _mean_heads_work, _qk_part, _maps_bytes),
    "distillation": Operation(
        _distillation_make,
        _distillation_eager,
        _distillation_fused,
        _distillation_work,
        _distillation_part,
        _maps_bytes,
    ),
    "attention_mse": Operation(
        _attention_make, _attention_eager, _attention_fused, _attention_work, lambda inputs: inputs, _maps_bytes
    ),
    "pooled_distance": Operation(
        _pooled_make, _pooled_eager, _pooled_fused, _pooled_work, lambda inputs: inputs, lambda preset: 0.0
    ),
}
