"""One call of a loss as a value: both views, masks, options; run on any backend, in any dtype, in either form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import ear_ops

from . import plain

LOSSES: dict[str, Callable[..., Tensor]] = {name: getattr(ear_ops, name) for name in plain.LOSSES}
LAYOUTS = ("contiguous", "length_first", "slices", "every_second", "expanded")


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values (for ``"expanded"``: those of the first head or token everywhere) under other strides."""
    if layout == "length_first":  # [B, L, H, D] as a projection leaves it, seen as [B, H, L, D]
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "slices":  # a part of something larger in every dimension
        larger = torch.full([n + 3 for n in tensor.shape], torch.nan, dtype=tensor.dtype, device=tensor.device)
        part = larger[tuple(slice(1, n + 1) for n in tensor.shape)]
        return part.copy_(tensor)
    if layout == "every_second":  # the last dimension is not dense
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]
    if layout == "expanded":  # stride 0
        return tensor[:, :1].expand(tensor.shape)
    return tensor.contiguous()


@dataclass(frozen=True)
class Case:
    """``x``, ``x_aug``: (query, key), (attn,) or (hidden,) of each view; the rest as the functional layer takes it."""

    op: str
    x: tuple[Tensor, ...]
    x_aug: tuple[Tensor, ...]
    masks: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    reduction: str = "mean"
    stacked: bool = False
    layout: str = "contiguous"

    def __repr__(self) -> str:  # what a failing example prints
        masks = {name: mask.int().tolist() for name, mask in self.masks.items()}
        shapes = [list(t.shape) for t in self.x]
        biases = {name: list(bias.shape) for name, bias in self.biases.items()}
        return (
            f"Case({self.op}, {shapes}, {self.x[0].dtype}, masks={masks}, biases={biases}, {self.options}, "
            f"reduction={self.reduction!r}, stacked={self.stacked}, layout={self.layout!r})"
        )

    @property
    def pairs(self) -> int:
        return self.x[0].shape[0]

    def to(self, target: torch.dtype | torch.device | str) -> Case:
        """Inputs and float biases in another dtype, or everything on another device."""
        move_all = not isinstance(target, torch.dtype)

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(target) if move_all or tensor.dtype.is_floating_point else tensor

        return replace(
            self,
            x=tuple(map(moved, self.x)),
            x_aug=tuple(map(moved, self.x_aug)),
            masks={name: moved(mask) for name, mask in self.masks.items()},
            biases={name: moved(bias) for name, bias in self.biases.items()},
        )

    def inputs(self) -> list[Tensor]:
        """The tensors as passed, in the layout and the form of the case."""
        if self.stacked:
            tensors = [torch.cat(views) for views in zip(self.x, self.x_aug, strict=True)]
        else:
            tensors = [*self.x, *self.x_aug]
        return [lay_out(tensor, self.layout).detach() for tensor in tensors]

    def arguments(self) -> dict[str, Any]:
        """Everything else that is passed."""
        masks, biases = dict(self.masks), dict(self.biases)
        if self.stacked:
            for name in ("attention_mask", "query_mask"):
                if name in masks:
                    masks[name] = torch.cat([masks[name], masks.pop(f"{name}_aug")])
            if biases:
                biases = {"attn_bias": _both_biases(self.pairs, **biases)}
        return {**masks, **biases, **self.options, "reduction": self.reduction}

    def call(self, inputs: Sequence[Tensor], backend: str | None) -> Tensor:
        """The loss of ``inputs`` (as :meth:`inputs` gives them) under this case's arguments."""
        return LOSSES[self.op](*inputs, **self.arguments(), backend=backend)

    def run(
        self, backend: str | None, needs: Sequence[bool] | None = None, upstream: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The value and the gradients of the inputs that ``needs`` names (default: all), None for the others."""
        inputs = self.inputs()
        needs = [True] * len(inputs) if needs is None else needs
        value = self.call([t.requires_grad_(n) for t, n in zip(inputs, needs, strict=True)], backend)
        return value.detach(), _gradients(value, inputs, upstream)

    def run_plain(self, upstream: Tensor | None = None) -> tuple[Tensor, list[Tensor | None]]:
        """The same in plain PyTorch, gradients in the form of the case."""
        two = replace(self, stacked=False)
        inputs = [t.requires_grad_() for t in two.inputs()]
        value = plain.LOSSES[self.op](*inputs, **two.arguments())
        gradients = _gradients(value, inputs, upstream)
        if self.stacked:
            half = len(self.x)
            gradients = [torch.cat(views) for views in zip(gradients[:half], gradients[half:], strict=True)]  # type: ignore[arg-type]
        return value.detach(), gradients

    def upstream(self, seed: int = 0) -> Tensor:
        """Random upstream gradients (never 1) in the shape of the loss."""
        generator = torch.Generator().manual_seed(seed)
        shape: tuple[int, ...] = ()
        if self.reduction == "none":
            one_each = self.op == "pooled_distance" or self.options.get("heads") == "mean"
            shape = (self.pairs,) if one_each else (self.pairs, self.x[0].shape[1])
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        dtype = torch.float64 if self.x[0].dtype == torch.float64 else torch.float32
        return torch.where(values >= 0, values + 0.3, values - 0.3).to(device=self.x[0].device, dtype=dtype)


def _gradients(value: Tensor, inputs: Sequence[Tensor], upstream: Tensor | None) -> list[Tensor | None]:
    wanted = [t for t in inputs if t.requires_grad]
    if not wanted:
        return [None] * len(inputs)
    upstream = torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
    found = iter(torch.autograd.grad(value, wanted, upstream))
    return [next(found) if t.requires_grad else None for t in inputs]


def _both_biases(pairs: int, attn_bias: Tensor, attn_bias_aug: Tensor | None = None) -> Tensor:
    """The bias of a stacked call: shared as it is where it has no batch dimension, else ``[2B, ...]``."""
    if attn_bias_aug is None and (attn_bias.dim() < 4 or attn_bias.shape[0] == 1):
        return attn_bias
    views = [attn_bias, attn_bias if attn_bias_aug is None else attn_bias_aug]
    if views[0].dtype != views[1].dtype:  # one tensor has one dtype: a bool bias becomes an additive one
        views = [
            torch.zeros(b.shape, device=b.device).masked_fill(~b, -torch.inf) if b.dtype == torch.bool else b
            for b in views
        ]
    views = [bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape)) for bias in views]
    shape = torch.broadcast_shapes(*[bias.shape[1:] for bias in views])
    return torch.cat([bias.expand(pairs, *shape) for bias in views])


# --- making cases -------------------------------------------------------------------------------------------------


def lengths_mask(lengths: Sequence[int], width: int, side: str = "right") -> Tensor:
    """``[B, width]`` int64, ``lengths[b]`` ones and padding on ``side``."""
    position = torch.arange(width)[None, :]
    real = torch.tensor(list(lengths), dtype=torch.int64).reshape(-1, 1)
    return (position < real if side == "right" else position >= width - real).long()


def qk_case(
    queries: int = 17,
    keys: int | None = None,
    dim: int = 16,
    *,
    pairs: int = 2,
    heads: int = 2,
    key_heads: int | None = None,
    lengths: tuple[Sequence[int], Sequence[int]] | None = None,
    side: str = "right",
    seed: int = 0,
    gain: float = 1.0,
    closeness: float | None = None,
    **rest: Any,
) -> Case:
    """A case of ``qk_attention_mse`` with normal random inputs in float64.

    ``lengths``: of each view, for padding masks. ``gain`` scales queries. ``closeness``: the augmented view is the
    original plus noise of that size. ``rest``: fields of :class:`Case`.
    """
    generator = torch.Generator().manual_seed(seed)
    keys = queries if keys is None else keys
    shapes = ((pairs, heads, queries, dim), (pairs, key_heads or heads, keys, dim))
    x = tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    other = tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    if closeness is not None:
        other = tuple(a + closeness * b for a, b in zip(x, other, strict=True))
    x, other = (gain * x[0], x[1]), (gain * other[0], other[1])
    return Case("qk_attention_mse", x, other, _padding(lengths, keys, side, rest.pop("masks", None)), **rest)


def attention_case(
    queries: int = 17,
    keys: int | None = None,
    *,
    pairs: int = 2,
    heads: int = 2,
    lengths: tuple[Sequence[int], Sequence[int]] | None = None,
    side: str = "right",
    seed: int = 0,
    closeness: float = 1.0,
    **rest: Any,
) -> Case:
    """A case of ``attention_mse``: probabilities of random scores."""
    generator = torch.Generator().manual_seed(seed)
    keys = queries if keys is None else keys
    scores, noise = (
        torch.randn((pairs, heads, queries, keys), generator=generator, dtype=torch.float64) for _ in range(2)
    )
    views = [(torch.softmax(s, dim=-1),) for s in (scores, scores + closeness * noise)]
    return Case("attention_mse", *views, _padding(lengths, keys, side, rest.pop("masks", None)), **rest)


def pooled_case(
    length: int = 17,
    features: int = 24,
    *,
    pairs: int = 3,
    lengths: tuple[Sequence[int], Sequence[int]] | None = None,
    side: str = "right",
    seed: int = 0,
    offset: float = 0.0,
    closeness: float = 1.0,
    **rest: Any,
) -> Case:
    """A case of ``pooled_distance``; ``offset`` is the mean of the hidden states."""
    generator = torch.Generator().manual_seed(seed)
    hidden, noise = (torch.randn((pairs, length, features), generator=generator, dtype=torch.float64) for _ in range(2))
    views = [(hidden + offset,), (hidden + offset + closeness * noise,)]
    return Case("pooled_distance", *views, _padding(lengths, length, side, rest.pop("masks", None)), **rest)


def case_of(op: str, *sizes: int, **rest: Any) -> Case:
    """A case of any loss."""
    if op.startswith("qk"):
        return in_comparison(qk_case(*sizes, **rest), op)
    return {"attention_mse": attention_case, "pooled_distance": pooled_case}[op](*sizes, **rest)


def in_comparison(case: Case, op: str, **options: Any) -> Case:
    """A case of an MSE as a case of another comparison of the same inputs.

    KL needs the same keys in both views: the second gets the key mask and the bias of the first.
    """
    case = replace(case, op=op, options={**case.options, **options})
    if not op.endswith("_kl"):
        return case
    masks = {
        name: case.masks[name.removesuffix("_aug")] if name.startswith("attention") else mask
        for name, mask in case.masks.items()
    }
    return replace(case, masks=masks, biases={n: b for n, b in case.biases.items() if n == "attn_bias"})


# The comparisons of averages over heads: the loss, and its options beside heads="mean".
MEAN_FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "mse": ("qk_attention_mse", {}),
    "forward": ("qk_attention_kl", {"direction": "forward"}),
    "reverse": ("qk_attention_kl", {"direction": "reverse"}),
    "js": ("qk_attention_js", {}),
}


def in_form(case: Case, form: str, **options: Any) -> Case:
    """A case of the MSE, head by head, as a case of the averages over the heads."""
    op, of_form = MEAN_FORMS[form]
    return replace(case, op=op, options={**case.options, **of_form, "heads": "mean", **options})


def other_heads(case: Case, heads: int, key_heads: int, dim: int, seed: int = 1) -> Case:
    """The same with other heads in the second view."""
    generator = torch.Generator().manual_seed(seed)
    (pairs, _, queries, _), keys = case.x[0].shape, case.x[1].shape[2]
    shapes = ((pairs, heads, queries, dim), (pairs, key_heads, keys, dim))
    second = tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return replace(case, x_aug=tuple(tensor.to(case.x[0].dtype) for tensor in second), stacked=False)


def mean_case(form: str, *sizes: Any, heads_aug: int | None = 3, **rest: Any) -> Case:
    """A case of averages over two and ``heads_aug`` heads (None: two, of the same size)."""
    case = in_form(qk_case(*sizes, **rest), form)
    return case if heads_aug is None else other_heads(case, heads_aug, 1, 2 * case.x[0].shape[3])


def _padding(
    lengths: tuple[Sequence[int], Sequence[int]] | None, width: int, side: str, masks: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    if lengths is None:
        return masks or {}
    names = ("attention_mask", "attention_mask_aug")
    return {**{n: lengths_mask(found, width, side) for n, found in zip(names, lengths, strict=True)}, **(masks or {})}
