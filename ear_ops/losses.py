"""The losses as modules: :mod:`ear_ops.functional` with its options fixed, no layer of a model and no weight."""

from __future__ import annotations

from torch import Tensor, nn

from . import functional
from .reductions import check_reduction


class QKAttentionMSELoss(nn.Module):
    """:func:`ear_ops.functional.qk_attention_mse` with scale, structure, softcap, reduction and backend fixed."""

    def __init__(
        self,
        *,
        scale: float | None = None,
        is_causal: bool = False,
        window: int | None = None,
        softcap: float | None = None,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        self.scale = scale
        self.is_causal = is_causal
        self.window = window
        self.softcap = softcap
        self.reduction = reduction
        self.backend = backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        query_aug: Tensor | None = None,
        key_aug: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        attention_mask_aug: Tensor | None = None,
        query_mask: Tensor | None = None,
        query_mask_aug: Tensor | None = None,
        attn_bias: Tensor | None = None,
        attn_bias_aug: Tensor | None = None,
        head_weights: Tensor | None = None,
    ) -> Tensor:
        """``query`` ``[B, H, L, D]``, ``key`` ``[B, H_kv, S, D]`` and the augmented view, or both in ``[2B, ...]``."""
        return functional.qk_attention_mse(
            query,
            key,
            query_aug,
            key_aug,
            attention_mask=attention_mask,
            attention_mask_aug=attention_mask_aug,
            query_mask=query_mask,
            query_mask_aug=query_mask_aug,
            attn_bias=attn_bias,
            attn_bias_aug=attn_bias_aug,
            head_weights=head_weights,
            scale=self.scale,
            is_causal=self.is_causal,
            window=self.window,
            softcap=self.softcap,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"scale={self.scale}, is_causal={self.is_causal}, window={self.window}, softcap={self.softcap}, "
            f"reduction={self.reduction!r}"
        )


class AttentionMSELoss(nn.Module):
    """:func:`ear_ops.functional.attention_mse` with ``reduction`` and ``backend`` fixed."""

    def __init__(self, *, reduction: str = "mean", backend: str | None = None) -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction = reduction
        self.backend = backend

    def forward(
        self,
        attn: Tensor,
        attn_aug: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        attention_mask_aug: Tensor | None = None,
        query_mask: Tensor | None = None,
        query_mask_aug: Tensor | None = None,
        head_weights: Tensor | None = None,
    ) -> Tensor:
        """``attn``, ``attn_aug``: ``[B, H, L, S]``, or ``attn`` alone with both views ``[2B, H, L, S]``."""
        return functional.attention_mse(
            attn,
            attn_aug,
            attention_mask=attention_mask,
            attention_mask_aug=attention_mask_aug,
            query_mask=query_mask,
            query_mask_aug=query_mask_aug,
            head_weights=head_weights,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


class PooledDistanceLoss(nn.Module):
    """:func:`ear_ops.functional.pooled_distance` with ``reduction`` and ``backend`` fixed."""

    def __init__(self, *, reduction: str = "mean", backend: str | None = None) -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction = reduction
        self.backend = backend

    def forward(
        self,
        hidden: Tensor,
        hidden_aug: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        attention_mask_aug: Tensor | None = None,
    ) -> Tensor:
        """``hidden``, ``hidden_aug``: ``[B, L, C]``, or ``hidden`` alone with both views ``[2B, L, C]``."""
        return functional.pooled_distance(
            hidden,
            hidden_aug,
            attention_mask=attention_mask,
            attention_mask_aug=attention_mask_aug,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"
