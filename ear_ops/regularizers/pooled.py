"""The regularisers on mean-pooled vectors: push embeddings apart, pull sentence vectors together."""

from __future__ import annotations

from torch import Tensor

from ear_ops import functional
from ear_ops.arguments import check_one_layer, is_finite_number
from ear_ops.capture.layout import Layout
from ear_ops.capture.readings import HiddenStates, align_hidden
from ear_ops.capture.sites import Site
from ear_ops.regularizers.base import Regularizer, Weight


class EmbeddingPush(Regularizer):
    """Push the mean-pooled embeddings of the two views apart: minus their squared distance (eq. 1).

    It looks at what enters the first block: the embedding layer's output, LayerNorm and dropout included.

    Args:
        weight: see :data:`Weight`; 1.0 in the paper.
        reduction: see :mod:`ear_ops.ops.reductions`, except ``"none"``.
        margin: the push has no lower bound. With a margin, the term is minus the mean over pairs of ``min(d, margin)``.
            d is a pair's squared distance as ``reduction`` scales it (``"mean"``: over C). ``"sum"`` takes the sum.
        name: key of the term in ``ear.components()``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        weight: Weight = 1.0,
        *,
        reduction: str = "mean",
        margin: float | None = None,
        name: str = "embedding_push",
    ) -> None:
        super().__init__(name, weight, reduction)
        if margin is not None and not (is_finite_number(margin) and margin > 0):
            raise ValueError(f"margin: expected None or a positive number, got {margin!r}")
        self.margin = margin

    def site(self, layout: Layout) -> Site:
        return layout.embeddings()

    def term(self, reading: HiddenStates, reading_aug: HiddenStates | None) -> Tensor:
        if self.margin is None:
            return -_pooled_distance(reading, reading_aug, self.reduction, self.name)
        distances = _pooled_distance(reading, reading_aug, "none", self.name)  # [B]
        if self.reduction in ("mean", "padded_mean"):
            distances = distances / reading.states.shape[2]
        pushed = distances.clamp(max=self.margin).sum()
        return -(pushed if self.reduction == "sum" else pushed / max(distances.numel(), 1))


class SentencePull(Regularizer):
    """Pull the mean-pooled hidden states of the two views together, after block ``layer`` (section 4.3).

    Args:
        layer: block of the model, counted from 1; its output is taken before any final norm of the model.
        weight: see :data:`Weight`.
        reduction: see :mod:`ear_ops.ops.reductions`, except ``"none"``.
        name: key of the term in ``ear.components()``; ``"sentence_pull.LAYER"`` by default.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(self, layer: int, weight: Weight = 1.0, *, reduction: str = "mean", name: str | None = None) -> None:
        check_one_layer(layer, "SentencePull")
        super().__init__(f"sentence_pull.{layer}" if name is None else name, weight, reduction)
        self.layer = layer

    def site(self, layout: Layout) -> Site:
        return layout.hidden_states(self.layer)

    def term(self, reading: HiddenStates, reading_aug: HiddenStates | None) -> Tensor:
        return _pooled_distance(reading, reading_aug, self.reduction, self.name)


def _pooled_distance(reading: HiddenStates, reading_aug: HiddenStates | None, reduction: str, what: str) -> Tensor:
    states_aug = mask_aug = None
    if reading_aug is not None:
        reading, (states_aug, mask_aug) = align_hidden(reading, reading_aug, what)
    return functional.pooled_distance(
        reading.states,
        states_aug,
        attention_mask=reading.attention_mask,
        attention_mask_aug=mask_aug,
        reduction=reduction,
    )
