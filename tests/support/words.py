"""Attention between words in tests: inputs, the loss, and the same as one writes it in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ear_ops.functional import qk_word_attention

from . import plain
from .rules import check_gradient, check_value


def ids_of(pieces: list[int], length: int, leave_out: tuple[int, ...] = ()) -> list[int]:
    """The ids of words that split into so many pieces, padded with -1; without the words to leave out."""
    ids = [word for word, count in enumerate(pieces) for _ in range(count) if word not in leave_out]
    return ids + [-1] * (length - len(ids))


def words_of(*pieces: list[int], length: int, front: int | None = None) -> Tensor:
    """Ids ``[2B, L]`` of words that split into so many pieces. ``front``: an id that stands before all others."""
    begin = [] if front is None else [front]
    return torch.tensor([begin + ids_of(of_row, length - len(begin)) for of_row in pieces])


def views(ids: Tensor, *, heads: int = 2, key_heads: int = 2, dim: int = 4, closeness: float | None = None) -> Any:
    """Queries and keys ``[2B, H, L, D]`` in float64; the second view is the first plus noise of size ``closeness``."""
    generator = torch.Generator().manual_seed(ids.shape[1])
    inputs = []
    for count in (heads, key_heads):
        both = torch.randn(len(ids), count, ids.shape[1], dim, generator=generator, dtype=torch.float64)
        if closeness is not None:
            first = both[: len(ids) // 2]
            both = torch.cat([first, first + closeness * both[len(ids) // 2 :]])
        inputs.append(both)
    return inputs


def loss_of(query: Tensor, key: Tensor, ids: Tensor, **options: Any) -> Tensor:
    return qk_word_attention(query, key, word_ids=ids, words=int(ids.max()) + 1, **options)


def plain_loss(
    query: Tensor, key: Tensor, ids: Tensor, *, divergence: str = "mse", reduction: str = "mean", **options: Any
) -> Tensor:
    """The same as one writes it: matrices of tokens, products with matrices of ones, a comparison of maps."""
    mask, bias = options.pop("attention_mask", None), options.pop("attn_bias", None)
    ids = ids if mask is None else ids.masked_fill(mask == 0, -1)
    attn = plain.probabilities(query, key, mask, bias, **options)
    member = (ids[:, None] == torch.arange(int(ids.max()) + 1, device=ids.device)[:, None]).to(attn.dtype)[
        :, None
    ]  # [2B, 1, W, L]
    means = member / member.sum(-1, keepdim=True).clamp(min=1)
    maps = (means @ attn @ member.mT).chunk(2)
    masks = dict(zip(("attention_mask", "attention_mask_aug"), member.any(-1)[:, 0].chunk(2), strict=True))
    masks.update({name.replace("attention", "query"): value for name, value in masks.items()})
    if divergence == "mse":
        return plain.attention_mse(*maps, **masks, reduction=reduction)
    name, direction = ("js", {}) if divergence == "js" else ("kl", {"direction": "forward"})
    if divergence == "reverse_kl":
        direction = {"direction": "reverse"}
    return plain.LOSSES[f"attention_{name}"](*maps, **masks, reduction=reduction, **direction)


def results(function: Callable[..., Tensor], inputs: list[Tensor], *rest: Any, **options: Any) -> list[Tensor]:
    """The value and the gradients of the inputs, with an upstream gradient that is not 1."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    value = function(*inputs, *rest, **options)
    upstream = torch.linspace(0.5, 2.0, value.numel(), dtype=value.dtype, device=value.device).view(value.shape)
    return [value.detach(), *torch.autograd.grad(value, inputs, upstream)]


# Both views have the same words, but in other pieces. The second pair has more words than a strip.
FEW = words_of([1, 2, 1, 3, 1, 1], [1, 2, 2] * 8, [1, 1, 4, 1, 1, 2], [2, 1, 1] * 8, length=41, front=30)
MANY = words_of([1, 2] * 20, [2, 1] * 20, length=72)
LARGE = words_of([3, 70, 2, 0, 5, 60], [1, 30, 66, 40, 3, 2], length=150)  # x lacks a word
SCATTERED = torch.tensor([[3, 0, 1, 3, -1, 0, 2, -1], [0, 1, 2, 0, 3, -1, -1, -1]])  # pieces that do not touch
BIAS = torch.randn(1, 1, 41, 41, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

CASES: dict[str, tuple[Tensor, dict[str, Any], dict[str, Any]]] = {
    "padding, groups": (FEW, {"heads": 4, "key_heads": 2, "dim": 17}, {"attention_mask": (FEW >= 0).long()}),
    "tokens without a word": (FEW.masked_fill(FEW == 1, -1), {"dim": 64}, {}),
    "strips": (MANY, {"heads": 1, "key_heads": 1, "dim": 32}, {"attention_mask": (MANY >= 0).long()}),
    "bias": (FEW, {"dim": 16}, {"attn_bias": BIAS.masked_fill(BIAS > 1.5, -30.0).repeat(4, 2, 1, 1)}),
    "chunks": (FEW[::2], {"heads": 1, "key_heads": 1, "dim": 130}, {}),
    "scattered": (SCATTERED, {"dim": 8}, {"scale": -0.7}),
}


def check_words(
    ids: Tensor, sizes: dict[str, Any], options: dict[str, Any], dtype: torch.dtype, device: str = "cpu"
) -> None:
    """The error rule for sums of heads and their gradients, by the kernels of a device."""
    ids = ids.to(device)
    inputs = [view.to(device, dtype) for view in views(ids.cpu(), **sizes)]
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    options = {"reduction": "none", **moved}
    oracle = results(loss_of, [view.double() for view in inputs], ids, **options, backend="reference")
    eager = results(plain_loss, inputs, ids, **options)
    found = results(loss_of, inputs, ids, **options, backend=device)
    check_value(found[0], eager[0], oracle[0], slack=2.0)
    # One rounded score spreads over a whole row of gradients, so the errors of so few rows do not average out.
    for name, actual, plain_one, expected in zip(("query", "key"), found[1:], eager[1:], oracle[1:], strict=True):
        check_gradient(name, actual, plain_one, expected, slack=2.0)
