"""The losses as one writes them without this package, in the dtype of the inputs.

They serve twice: in float64 as an independent check of the references, and in the dtype under test as the
yardstick, because a kernel is measured by what plain PyTorch loses. Nothing of ear_ops is used here. Two tensors for
the two views; masks as the functional layer takes them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def attendable(
    shape: tuple[int, int, int, int],
    key_mask: Tensor | None,
    attn_bias: Tensor | None,
    is_causal: bool,
    window: int | None,
) -> Tensor:
    """``[B, H, L, S]`` bool: which key each query of one view may attend to."""
    _, _, queries, keys = shape
    device = next((t.device for t in (key_mask, attn_bias) if t is not None), None)
    allowed = torch.ones(shape, dtype=torch.bool, device=device)
    distance = (
        torch.arange(keys, device=device)[None, :] - torch.arange(queries, device=device)[:, None] - keys + queries
    )
    if is_causal:
        allowed = allowed & (distance <= 0)
    if window is not None:
        allowed = allowed & (distance.abs() < window)
    if key_mask is not None:
        allowed = allowed & (key_mask != 0)[:, None, None, :]
    if attn_bias is not None:
        allowed = allowed & (attn_bias if attn_bias.dtype == torch.bool else attn_bias != -torch.inf)
    return allowed


def probabilities(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """``[B, H, L, S]`` attention probabilities the eager way: products in the inputs' dtype, softmax in float32."""
    heads, dim = query.shape[1], query.shape[3]
    key = key[:, torch.arange(heads, device=key.device) // (heads // key.shape[1])]
    scores = torch.matmul(query, key.transpose(2, 3)) * (dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    allowed = attendable(tuple(scores.shape), key_mask, attn_bias, is_causal, window).to(scores.device)
    if attn_bias is not None and attn_bias.dtype != torch.bool:
        scores = scores + torch.where(attn_bias == -torch.inf, 0.0, attn_bias).to(scores.dtype)
    scores = torch.where(allowed, scores, torch.finfo(scores.dtype).min)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return torch.where(allowed, torch.softmax(scores, dim=-1, dtype=wide).to(scores.dtype), 0.0)


def reduce_squares(
    squared: Tensor,
    attention_mask: Tensor | None,
    attention_mask_aug: Tensor | None,
    query_mask: Tensor | None,
    query_mask_aug: Tensor | None,
    reduction: str,
) -> Tensor:
    """Reduce ``[B, H, L, S]`` squares by counting the triples one by one."""
    batch, heads, queries, keys = squared.shape
    if query_mask is None and queries == keys:
        query_mask, query_mask_aug = attention_mask, attention_mask_aug
    counted = torch.ones(squared.shape, dtype=torch.bool, device=squared.device)
    if query_mask is not None and reduction != "padded_mean":
        counted = counted & ((query_mask != 0) & (query_mask_aug != 0))[:, None, :, None]
    if attention_mask is not None:
        counted = counted & ((attention_mask != 0) | (attention_mask_aug != 0))[:, None, None, :]
    sums = torch.where(counted, squared, 0.0).sum(dim=(2, 3))
    if reduction == "none":
        return sums
    parts = {
        "sum": 1,
        "equations": batch * heads,
        "mean": int(counted.sum()),
        "padded_mean": batch * heads * queries * keys,
    }
    return sums.sum() / max(parts[reduction], 1)


def qk_attention_mse(
    query: Tensor,
    key: Tensor,
    query_aug: Tensor,
    key_aug: Tensor,
    *,
    attention_mask: Tensor | None = None,
    attention_mask_aug: Tensor | None = None,
    query_mask: Tensor | None = None,
    query_mask_aug: Tensor | None = None,
    attn_bias: Tensor | None = None,
    attn_bias_aug: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Arguments as :func:`ear_ops.qk_attention_mse`."""
    bias_aug = attn_bias if attn_bias_aug is None else attn_bias_aug
    how = {"scale": scale, "is_causal": is_causal, "window": window, "softcap": softcap}
    attn = probabilities(query, key, attention_mask, attn_bias, **how)
    attn_aug = probabilities(query_aug, key_aug, attention_mask_aug, bias_aug, **how)
    squared = (attn - attn_aug) ** 2
    return reduce_squares(squared, attention_mask, attention_mask_aug, query_mask, query_mask_aug, reduction)


def attention_mse(
    attn: Tensor,
    attn_aug: Tensor,
    *,
    attention_mask: Tensor | None = None,
    attention_mask_aug: Tensor | None = None,
    query_mask: Tensor | None = None,
    query_mask_aug: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Arguments as :func:`ear_ops.attention_mse`."""
    if attention_mask is not None and attention_mask_aug is not None:
        attn = torch.where((attention_mask != 0)[:, None, None, :], attn, 0.0)
        attn_aug = torch.where((attention_mask_aug != 0)[:, None, None, :], attn_aug, 0.0)
    squared = (attn - attn_aug) ** 2
    return reduce_squares(squared, attention_mask, attention_mask_aug, query_mask, query_mask_aug, reduction)


def pooled_distance(
    hidden: Tensor,
    hidden_aug: Tensor,
    *,
    attention_mask: Tensor | None = None,
    attention_mask_aug: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Arguments as :func:`ear_ops.pooled_distance`."""
    batch, _, features = hidden.shape
    means = []
    for states, mask in ((hidden, attention_mask), (hidden_aug, attention_mask_aug)):
        real = torch.ones(states.shape[:2], device=states.device) if mask is None else mask != 0
        real = real.to(states.dtype)
        means.append((states * real[:, :, None]).sum(dim=1) / real.sum(dim=1).clamp(min=1)[:, None])
    sums = ((means[0] - means[1]) ** 2).sum(dim=1)
    if reduction == "none":
        return sums
    parts = {"sum": 1, "equations": batch, "mean": batch * features, "padded_mean": batch * features}
    return sums.sum() / max(parts[reduction], 1)


def _divergence(
    log_attn: Tensor, log_attn_aug: Tensor, allowed: Tensor, allowed_aug: Tensor, name: str, direction: str
) -> Tensor:
    """``[B, H, L, S]`` entries from logarithms that are finite also where a key is masked."""
    p, t = torch.where(allowed, log_attn.exp(), 0.0), torch.where(allowed_aug, log_attn_aug.exp(), 0.0)
    if name == "js":
        mean = (p + t) / 2
        log_mean = torch.where(mean > 0, mean, 1.0).log()
        return (p * (log_attn - log_mean) + t * (log_attn_aug - log_mean)) / 2
    if direction == "reverse":
        log_attn, log_attn_aug, t = log_attn_aug, log_attn, p
    return t * (log_attn_aug - log_attn)


def _reduce_rows(
    entries: Tensor, masks: dict[str, Tensor | None], reduction: str, counted_pairs: Tensor | None = None
) -> Tensor:
    """Reduce ``[B, H, L, S]`` entries over counted rows, or over ``counted_pairs`` (bool), one by one."""
    batch, heads, queries, keys = entries.shape
    name = "query_mask" if masks.get("query_mask") is not None else "attention_mask" if queries == keys else None
    counted = torch.ones(batch, heads, queries, dtype=torch.bool, device=entries.device)
    if masks.get(name or "") is not None and reduction != "padded_mean":
        counted = counted & ((masks[name] != 0) & (masks[f"{name}_aug"] != 0))[:, None]
    sums = torch.where(counted[..., None], entries, 0.0).sum(dim=(2, 3))
    if reduction == "none":
        return sums
    parts = {"sum": 1, "equations": batch * heads, "mean": int(counted.sum()), "padded_mean": batch * heads * queries}
    if counted_pairs is not None:
        parts["mean"] = int((counted_pairs & counted[..., None]).sum())
        parts["padded_mean"] *= keys
    return sums.sum() / max(parts[reduction], 1)


def _scores_and_allowed(
    views: tuple[Tensor, ...], masks: dict[str, Tensor | None], options: dict[str, Any]
) -> list[tuple[Tensor, Tensor]]:
    """Of each view: scores after scale, softcap and bias, in float32 at least, and which of them are allowed."""
    found = []
    for query, key, suffix in ((*views[:2], ""), (*views[2:], "_aug")):
        heads = query.shape[1]
        key = key[:, torch.arange(heads, device=key.device) // (heads // key.shape[1])]
        scale = query.shape[3] ** -0.5 if options.get("scale") is None else options["scale"]
        scores = torch.matmul(query, key.transpose(2, 3)) * scale
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if options.get("softcap") is not None:
            scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
        bias = masks.get("attn_bias_aug" if suffix and masks.get("attn_bias_aug") is not None else "attn_bias")
        structure = options.get("is_causal", False), options.get("window")
        allowed = attendable(tuple(scores.shape), masks.get(f"attention_mask{suffix}"), bias, *structure)
        if bias is not None and bias.dtype != torch.bool:
            scores = scores + torch.where(bias == -torch.inf, 0.0, bias).to(scores.dtype)
        found.append((scores / options.get("temperature", 1.0), allowed.to(scores.device)))
    return found


_TENSORS = ("attention_mask", "query_mask", "attn_bias")


def _split(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    names = [*_TENSORS, *(f"{name}_aug" for name in _TENSORS)]
    return {n: v for n, v in arguments.items() if n in names}, {n: v for n, v in arguments.items() if n not in names}


def _qk_divergence(name: str, *views: Tensor, reduction: str = "mean", **arguments: Any) -> Tensor:
    masks, options = _split(arguments)
    (scores, allowed), (scores_aug, allowed_aug) = _scores_and_allowed(views, masks, options)
    if options.get("support") == "shared":
        allowed = allowed_aug = allowed & allowed_aug
    if name == "scores":
        squared = torch.where(allowed & allowed_aug, scores - scores_aug, 0.0) ** 2
        return _reduce_rows(squared, masks, reduction, allowed & allowed_aug)
    lowest = torch.finfo(scores.dtype).min
    logs = [
        torch.where(mask, view, lowest).log_softmax(-1) for view, mask in ((scores, allowed), (scores_aug, allowed_aug))
    ]
    entries = _divergence(*logs, allowed, allowed_aug, name, options.get("direction", "forward"))
    return _reduce_rows(entries, masks, reduction)


def _maps_divergence(
    name: str, *views: Tensor, reduction: str = "mean", direction: str = "forward", **masks: Any
) -> Tensor:
    allowed = []
    for view, suffix in zip(views, ("", "_aug"), strict=True):
        mask = masks.get(f"attention_mask{suffix}")
        allowed.append((view > 0) if mask is None else (mask != 0)[:, None, None, :] & (view > 0))
    logs = [torch.where(mask, view, 1.0).log() for view, mask in zip(views, allowed, strict=True)]
    entries = _divergence(*logs, *allowed, name, direction)
    if name == "kl":  # rows that a mask has cut do not sum to 1
        p, t = (torch.where(mask, view, 0.0) for view, mask in zip(views, allowed, strict=True))
        difference = p - t if direction == "forward" else t - p
        target = t if direction == "forward" else p
        entries = entries + torch.where(target.sum(-1, keepdim=True) > 0, difference, 0.0)
    return _reduce_rows(entries, masks, reduction)


def mean_heads(
    name: str, *views: Tensor, reduction: str = "mean", head_weights: Tensor | None = None, **arguments: Any
) -> Tensor:
    """The averages over the heads, which may be others in each view, compared by the loss called ``name``."""
    masks, options = _split(arguments)
    scored = _scores_and_allowed(views, masks, options)
    present = [allowed.any(1, keepdim=True) for _, allowed in scored]
    if options.get("support") == "shared":
        shared = present[0] & present[1]
        scored, present = [(scores, allowed & shared) for scores, allowed in scored], [shared, shared]
    logs = []
    for (scores, allowed), has_key in zip(scored, present, strict=True):
        weights = torch.ones(scores.shape[1]) if head_weights is None else head_weights
        log_weights = (weights.double() / weights.sum()).log().to(scores)[:, None, None]
        lowest = torch.finfo(scores.dtype).min
        of_heads = torch.where(allowed, scores, lowest).log_softmax(-1) + log_weights
        of_average = torch.where(allowed, of_heads, lowest / 2).logsumexp(1, keepdim=True)
        logs.append(torch.where(has_key, of_average, lowest / 2))
    p, t = (torch.where(has_key, log.exp(), 0.0) for has_key, log in zip(present, logs, strict=True))
    if name == "mse":
        of_pairs = [
            masks.get(f"{mask}{suffix}") for mask in ("attention_mask", "query_mask") for suffix in ("", "_aug")
        ]
        value = reduce_squares((p - t).square(), *of_pairs, reduction)
    else:
        direction = options.get("direction", "forward")
        entries = _divergence(*logs, *present, name, direction)
        if name == "kl":  # an average does not sum to 1 where a bias leaves a head without keys
            p, t = (p, t) if direction == "forward" else (t, p)
            entries = entries + torch.where(t.sum(-1, keepdim=True) > 0, p - t, 0.0)
        value = _reduce_rows(entries, masks, reduction)
    return value[:, 0] if reduction == "none" else value


def _each_or_mean(each: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    def loss(*views: Tensor, heads: str = "each", **arguments: Any) -> Tensor:
        return mean_heads(name, *views, **arguments) if heads == "mean" else each(*views, **arguments)

    return loss


LOSSES: dict[str, Callable[..., Tensor]] = {
    "qk_attention_mse": _each_or_mean(qk_attention_mse, "mse"),
    "attention_mse": attention_mse,
    "pooled_distance": pooled_distance,
    "qk_attention_kl": _each_or_mean(functools.partial(_qk_divergence, "kl"), "kl"),
    "qk_attention_js": _each_or_mean(functools.partial(_qk_divergence, "js"), "js"),
    "qk_scores_mse": functools.partial(_qk_divergence, "scores"),
    "attention_kl": functools.partial(_maps_divergence, "kl"),
    "attention_js": functools.partial(_maps_divergence, "js"),
}
