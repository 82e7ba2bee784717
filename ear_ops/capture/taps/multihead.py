"""``nn.MultiheadAttention``: its queries and keys, projected once more from what it was given.

The module projects inside one torch function, or inside one kernel, so no hook sees queries and keys. The tap notes
the arguments and the weights of a call, and :meth:`MultiheadCall.heads` projects them when a loss asks. The tap itself
computes nothing: gradient checkpointing, which runs the module again without a record, would miss it there.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ear_ops.capture.records import tensor_version
from ear_ops.capture.taps.hooks import ModelHook

_PARAMETERS = list(inspect.signature(nn.MultiheadAttention.forward).parameters)[1:]


def is_multihead(module: nn.Module) -> bool:
    """Whether ``module`` is an ``nn.MultiheadAttention`` whose forward is that of torch."""
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


class MultiheadCall:
    """The arguments and weights of one call of an ``nn.MultiheadAttention``.

    Attributes:
        query, key: the inputs, ``[B, L, E]`` and ``[B, S, E_k]``, or ``[L, B, E]`` and ``[S, B, E_k]``.
        batch_first: the batch is their first dimension.
        of_same_tokens: both are the very same tensor.
        key_padding_mask: ``[B, S]`` or None; bool, True is padding, or numbers that are added to the scores.
        attn_mask: ``[L, S]``, ``[B * H, L, S]`` or None; bool, True forbids, or numbers that are added.
        is_causal: the hint of the caller that ``attn_mask`` is causal.
        takes_hint: the module then attends causally and leaves ``attn_mask`` aside.
        versions: how often each of ``taken`` had been changed in place by then.
        grad_enabled: the grad mode of the call.
    """

    def __init__(
        self,
        module: nn.MultiheadAttention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> None:
        self.query, self.key = query, key
        self.batch_first = module.batch_first
        self.of_same_tokens = query is key
        self.key_padding_mask, self.attn_mask = key_padding_mask, attn_mask
        self.is_causal = is_causal and attn_mask is not None
        self.takes_hint = self.is_causal and key_padding_mask is None and not need_weights
        self.num_heads = module.num_heads
        self.weight: Tensor | None = module.in_proj_weight
        self.query_weight, self.key_weight = module.q_proj_weight, module.k_proj_weight
        self.bias: Tensor | None = module.in_proj_bias
        device = query.device.type
        self.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.versions = tuple(tensor_version(tensor) for _, tensor in self.taken)
        self.grad_enabled = torch.is_grad_enabled()

    @property
    def tensor(self) -> MultiheadCall:
        """By which a call that is reported twice is recognised: two calls may get the very same queries."""
        return self

    @property
    def taken(self) -> tuple[tuple[str, Any], ...]:
        """What the loss is computed of, by the names for errors."""
        return (
            ("input of the queries", self.query),
            ("input of the keys", self.key),
            ("key_padding_mask", self.key_padding_mask),
            ("attn_mask", self.attn_mask),
            ("weight of the projections", self.query_weight if self.weight is None else self.weight),
        )

    def heads(self, query: Tensor, key: Tensor, what: str) -> tuple[Tensor, Tensor]:
        """Queries ``[B, H, L, D]`` and keys ``[B, H, S, D]`` of the inputs, in the precision and grad mode of the call.

        Args:
            query, key: the inputs, ``[B, L, E]`` and ``[B, S, E_k]``.
            what: names the place in errors.

        Raises:
            RuntimeError: the memory of the weights was freed after the forward.
        """
        if not (self.query_weight if self.weight is None else self.weight).untyped_storage().size():
            raise RuntimeError(
                f"{what}: the weights of the nn.MultiheadAttention were freed after the forward, so its queries and "
                f"keys cannot be projected again; with FSDP, shard its block with reshard_after_forward=False"
            )
        weights = (self.query_weight, self.key_weight) if self.weight is None else self.weight.chunk(3)[:2]
        biases = (None, None) if self.bias is None else self.bias.chunk(3)[:2]
        with (
            torch.set_grad_enabled(self.grad_enabled and torch.is_grad_enabled()),
            torch.autocast(query.device.type, self.autocast, enabled=self.autocast is not None),
        ):
            projected, projected_key = (
                F.linear(states, weight, bias).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
                for states, weight, bias in zip((query, key), weights, biases, strict=True)
            )
        return projected, projected_key

    def mask(self, rows: int) -> Tensor | None:
        """Both masks in one, ``[rows or 1, H or 1, L or 1, S]``, or None.

        Bool, True where a query may attend, where both are bool. Otherwise numbers that are added to the scores.
        """
        padding, mask = self.key_padding_mask, self.attn_mask
        if padding is not None:
            padding = padding[:, None, None, :]
        if mask is not None:
            mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (rows, self.num_heads))
        masks = [part for part in (padding, mask) if part is not None]
        if all(part.dtype == torch.bool for part in masks):
            masks = [~part for part in masks]
            return masks[0] & masks[-1] if masks else None
        numbers = [
            torch.zeros_like(part, dtype=self.query.dtype).masked_fill(part, -torch.inf)
            if part.dtype == torch.bool
            else part
            for part in masks
        ]
        return numbers[0] if len(numbers) == 1 else numbers[0] + numbers[1]


class MultiheadTap(ModelHook):
    """Forward pre-hook of the module."""

    def __init__(self, listener: Any, key: str) -> None:
        self.listener, self.key = listener, key

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        record = self.listener.record
        if record is not None:
            arguments: Any = {**dict(zip(_PARAMETERS, args, strict=False)), **kwargs}
            assert isinstance(module, nn.MultiheadAttention)
            record.add(self.key, MultiheadCall(module, **arguments))
