"""The regulariser on attention: pull the attention matrices of two views together."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ear_ops import functional
from ear_ops.arguments import check_count, is_finite_number
from ear_ops.capture.layers import Layers, check_layers, resolve_layers
from ear_ops.capture.layout import Layout
from ear_ops.capture.readings import AttentionInputs, AttentionMaps, align_attention, align_maps
from ear_ops.capture.sites import Site
from ear_ops.regularizers.base import Regularizer, Weight, scaled
from ear_ops.regularizers.word_alignment import WordIds, word_attention_mse


class AttentionPull(Regularizer):
    """Pull the attention of the two views together: mean squared error of their attention matrices (eq. 2).

    The matrices are recomputed from Q and K inside a fused loss, so the model keeps its own attention kernel. They are
    compared before attention dropout.

    Args:
        layer: block of the model, counted from 1; on an encoder-decoder the encoder's self-attention. Or the path of an
            attention module (as in ``model.named_modules()``: decoder and cross-attention too), a pattern of such paths
            (``"decoder.layers.*.self_attn"``), ``"middle"`` (6 of 12) or ``"all"``. Or several of them in a list, or as
            a mapping to factors of the weight, ``{4: 0.5, 6: 1.0}``. Each is a term of its own.
        weight: see :data:`Weight`, of each layer; 0.1 in the paper.
        query, key: instead of ``layer``, for any ``nn.Module``: paths (as in ``model.named_modules()``) of the two
            projections, whose outputs are ``[B, L, num_heads * D]``. Exact only where nothing but
            ``softmax(Q K^T / sqrt(D))`` follows: no rotary embedding, causality or position bias.
        num_heads, num_key_value_heads: how many heads ``query`` and ``key`` split into; the second is the first by
            default.
        head_weights: a number for each head, which multiplies its part of the term, as in
            :func:`ear_ops.qk_attention_mse`; of every layer alike.
        alignment: ``"token"`` compares position with position; ``"word"`` word with word, for views whose words split
            into different numbers of pieces: ``ear.loss(word_ids=...)``, see
            :mod:`ear_ops.regularizers.word_alignment`. That materialises the maps.
        reduction: see :mod:`ear_ops.ops.reductions`, except ``"none"``.
    """

    def __init__(
        self,
        layer: Layers | None = None,
        weight: Weight = 0.1,
        *,
        query: str | None = None,
        key: str | None = None,
        num_heads: int | None = None,
        num_key_value_heads: int | None = None,
        head_weights: Sequence[float] | None = None,
        alignment: str = "token",
        reduction: str = "mean",
    ) -> None:
        if alignment not in ("token", "word"):
            raise ValueError(f"alignment: expected 'token' or 'word', got {alignment!r}")
        if alignment == "word" and reduction == "padded_mean":
            raise ValueError("reduction: 'padded_mean' counts padded tokens, which words do not have; use 'mean'")
        by_path = (query, key, num_heads)
        if layer is None:
            if any(given is None for given in by_path):
                raise TypeError(
                    "AttentionPull: expected layer=, or query=, key= and num_heads= together, got "
                    + (", ".join(f"{n}={g!r}" for n, g in zip(("query", "key", "num_heads"), by_path, strict=True)))
                )
        elif any(given is not None for given in (*by_path, num_key_value_heads)):
            raise TypeError("AttentionPull: expected either layer= or query=, key= and num_heads=, got both")
        else:
            check_layers(layer)
        for argument, heads in (("num_heads", num_heads), ("num_key_value_heads", num_key_value_heads)):
            if heads is not None:
                check_count(argument, heads)
        if num_heads is not None and num_key_value_heads is not None and num_heads % num_key_value_heads:
            raise ValueError(f"num_key_value_heads: expected a divisor of {num_heads} heads, got {num_key_value_heads}")
        if head_weights is not None and not (len(head_weights) and all(map(is_finite_number, head_weights))):
            raise ValueError(f"head_weights: expected a finite number for each head, got {head_weights!r}")
        super().__init__(f"attention_pull.{query if layer is None else layer}", weight, reduction)
        self.layer = layer
        self.query, self.key = query, key
        self.num_heads, self.num_key_value_heads = num_heads, num_key_value_heads
        self.uses_word_ids = alignment == "word"
        self._head_weights = None if head_weights is None else torch.tensor(head_weights)  # [H]

    def expand(self, layout: Layout) -> list[Regularizer]:
        if self.layer is None or isinstance(self.layer, int):
            return [self]
        pulls: list[Regularizer] = []
        for layer, factor in resolve_layers(self.layer, layout):
            pull = copy.copy(self)
            pull.layer, pull.name = layer, f"attention_pull.{layer}"
            pull.weight = scaled(self.weight, factor)
            pulls.append(pull)
        return pulls

    def site(self, layout: Layout) -> Site:
        if self.layer is not None:
            assert isinstance(self.layer, (int, str)), "attach() expands several layers"
            return layout.attention(self.layer)
        assert self.query is not None and self.key is not None and self.num_heads is not None
        return layout.projections(self.query, self.key, self.num_heads, self.num_key_value_heads)

    def term(
        self,
        view: AttentionInputs | AttentionMaps,
        view_aug: AttentionInputs | AttentionMaps | None,
        word_ids: WordIds | None = None,
    ) -> Tensor:
        if self._head_weights is not None:  # kept there: a copy to the device in every step would wait for it
            self._head_weights = self._head_weights.to(view[0].device)
        if word_ids is not None:
            weights, reduction = self._head_weights, self.reduction
            return word_attention_mse(
                view, view_aug, word_ids, head_weights=weights, reduction=reduction, what=self.name
            )
        if isinstance(view, AttentionMaps) or isinstance(view_aug, AttentionMaps):
            return self._term_of_maps(view, view_aug)
        query_aug = key_aug = mask_aug = query_mask_aug = bias_aug = None
        if view_aug is not None:
            view, view_aug = align_attention(view, view_aug, self.name)
            query_aug, key_aug, mask_aug, query_mask_aug, bias_aug = view_aug[:5]
        return functional.qk_attention_mse(
            view.query,
            view.key,
            query_aug,
            key_aug,
            attention_mask=view.attention_mask,
            attention_mask_aug=mask_aug,
            query_mask=view.query_mask,
            query_mask_aug=query_mask_aug,
            attn_bias=view.attn_bias,
            attn_bias_aug=bias_aug,
            scale=view.scale,
            is_causal=view.is_causal,
            window=view.window,
            softcap=view.softcap,
            head_weights=self._head_weights,
            reduction=self.reduction,
        )

    def _term_of_maps(self, view: Any, view_aug: Any | None) -> Tensor:
        maps_aug = mask_aug = query_mask_aug = None
        if view_aug is not None:
            if type(view) is not type(view_aug):
                raise ValueError(f"{self.name}: the two views compute attention differently, so they do not compare")
            view, (maps_aug, mask_aug, query_mask_aug) = align_maps(view, view_aug)
        return functional.attention_mse(
            view.maps,
            maps_aug,
            attention_mask=view.attention_mask,
            attention_mask_aug=mask_aug,
            query_mask=view.query_mask,
            query_mask_aug=query_mask_aug,
            head_weights=self._head_weights,
            reduction=self.reduction,
        )
