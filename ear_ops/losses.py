"""The losses as modules: :mod:`ear_ops.functional` with its options fixed, no layer of a model and no weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ear_ops import functional
from ear_ops.ops.reductions import check_reduction


class _Loss(nn.Module):
    """A function of :mod:`ear_ops.functional` whose options are fixed on construction."""

    def __init__(self, *, reduction: str, **options: Any) -> None:
        super().__init__()
        check_reduction(reduction)
        functional.check_divergence_options(**options)
        self.options = {**options, "reduction": reduction}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items() if name != "backend")


class _QKLoss(_Loss):
    """A function of queries and keys."""

    function: Callable[..., Tensor]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        query_aug: Tensor | None = None,
        key_aug: Tensor | None = None,
        **masks: Any,
    ) -> Tensor:
        """The loss of ``query`` ``[B, H, L, D]``, ``key`` ``[B, H_kv, S, D]`` and the augmented view.

        ``masks``: masks, biases and head weights by name, as for :func:`ear_ops.qk_attention_mse`. Both views may also
        come in one ``[2B, ...]``, x first.
        """
        return self.function(query, key, query_aug, key_aug, **masks, **self.options)


class _MapsLoss(_Loss):
    """A function of attention probabilities."""

    function: Callable[..., Tensor]

    def forward(self, attn: Tensor, attn_aug: Tensor | None = None, **masks: Any) -> Tensor:
        """The loss of ``attn``, ``attn_aug``: ``[B, H, L, S]``, or ``attn`` alone with both views ``[2B, H, L, S]``.

        ``masks``: masks and head weights by name, as for :func:`ear_ops.attention_mse`.
        """
        return self.function(attn, attn_aug, **masks, **self.options)


class QKAttentionMSELoss(_QKLoss):
    """:func:`ear_ops.qk_attention_mse` with scale, structure, softcap, heads, reduction and backend fixed."""

    function = staticmethod(functional.qk_attention_mse)

    def __init__(
        self,
        *,
        scale: float | None = None,
        is_causal: bool = False,
        window: int | None = None,
        softcap: float | None = None,
        heads: str = "each",
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(
            scale=scale,
            is_causal=is_causal,
            window=window,
            softcap=softcap,
            heads=heads,
            reduction=reduction,
            backend=backend,
        )


class QKAttentionKLLoss(_QKLoss):
    """:func:`ear_ops.qk_attention_kl` with every argument that is no tensor fixed."""

    function = staticmethod(functional.qk_attention_kl)

    def __init__(
        self,
        *,
        scale: float | None = None,
        is_causal: bool = False,
        window: int | None = None,
        softcap: float | None = None,
        temperature: float = 1.0,
        direction: str = "forward",
        support: str = "all",
        heads: str = "each",
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(
            scale=scale,
            is_causal=is_causal,
            window=window,
            softcap=softcap,
            temperature=temperature,
            direction=direction,
            support=support,
            heads=heads,
            reduction=reduction,
            backend=backend,
        )


class QKAttentionJSLoss(_QKLoss):
    """:func:`ear_ops.qk_attention_js` with every argument that is no tensor fixed."""

    function = staticmethod(functional.qk_attention_js)

    def __init__(
        self,
        *,
        scale: float | None = None,
        is_causal: bool = False,
        window: int | None = None,
        softcap: float | None = None,
        temperature: float = 1.0,
        support: str = "all",
        heads: str = "each",
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(
            scale=scale,
            is_causal=is_causal,
            window=window,
            softcap=softcap,
            temperature=temperature,
            support=support,
            heads=heads,
            reduction=reduction,
            backend=backend,
        )


class QKScoresMSELoss(_QKLoss):
    """:func:`ear_ops.qk_scores_mse` with scale, structure, softcap, reduction and backend fixed."""

    function = staticmethod(functional.qk_scores_mse)

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
        super().__init__(
            scale=scale,
            is_causal=is_causal,
            window=window,
            softcap=softcap,
            reduction=reduction,
            backend=backend,
        )


class AttentionMSELoss(_MapsLoss):
    """:func:`ear_ops.attention_mse` with ``heads``, ``reduction`` and ``backend`` fixed."""

    function = staticmethod(functional.attention_mse)

    def __init__(self, *, heads: str = "each", reduction: str = "mean", backend: str | None = None) -> None:
        super().__init__(heads=heads, reduction=reduction, backend=backend)


class AttentionKLLoss(_MapsLoss):
    """:func:`ear_ops.attention_kl` with ``direction``, ``support``, ``heads``, ``reduction`` and ``backend`` fixed."""

    function = staticmethod(functional.attention_kl)

    def __init__(
        self,
        *,
        direction: str = "forward",
        support: str = "all",
        heads: str = "each",
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(direction=direction, support=support, heads=heads, reduction=reduction, backend=backend)


class AttentionJSLoss(_MapsLoss):
    """:func:`ear_ops.attention_js` with ``support``, ``heads``, ``reduction`` and ``backend`` fixed."""

    function = staticmethod(functional.attention_js)

    def __init__(
        self, *, support: str = "all", heads: str = "each", reduction: str = "mean", backend: str | None = None
    ) -> None:
        super().__init__(support=support, heads=heads, reduction=reduction, backend=backend)


class PooledDistanceLoss(_Loss):
    """:func:`ear_ops.pooled_distance` with ``reduction`` and ``backend`` fixed."""

    def __init__(self, *, reduction: str = "mean", backend: str | None = None) -> None:
        super().__init__(reduction=reduction, backend=backend)

    def forward(self, hidden: Tensor, hidden_aug: Tensor | None = None, **masks: Any) -> Tensor:
        """The loss of ``hidden``, ``hidden_aug``: ``[B, L, C]``, or ``hidden`` alone with both views ``[2B, L, C]``.

        ``masks``: ``attention_mask`` and ``attention_mask_aug``, as for :func:`ear_ops.pooled_distance`.
        """
        return functional.pooled_distance(hidden, hidden_aug, **masks, **self.options)
