"""The regulariser on relations between the queries, keys or values of one attention."""

from __future__ import annotations

from torch import Tensor

from ear_ops import functional
from ear_ops.arguments import check_choice, check_count
from ear_ops.capture.layers import check_layers
from ear_ops.capture.layout import Layout
from ear_ops.capture.readings import AttentionInputs, align_attention
from ear_ops.capture.sites import Site
from ear_ops.regularizers.base import Regularizer, Weight


class RelationPull(Regularizer):
    """Pull the relations between the queries, keys or values of the two views together (MiniLMv2, Wang et al. 2021).

    The relations of queries are ``softmax(Q Q^T / sqrt(d))`` over the real tokens, likewise those of keys and values.
    All heads are joined and split anew into ``relation_heads`` of d numbers, so models with different numbers of heads
    compare. The term is KL(T || P), where the target T is the teacher, or the second view x^a. The paper adds up three
    of these: of queries, of keys and of values.

    Args:
        layer: block of the model, counted from 1, or the path of an attention module.
        weight: see :data:`Weight`.
        of: ``"query"``, ``"key"`` or ``"value"``, as the attention gets them: after a rotary embedding. Values are
            taken from models that call the attention interface of transformers.
        relation_heads: how many heads to split into; a divisor of the joined size of both models. None keeps the heads.
        reduction: as for :func:`ear_ops.qk_attention_kl`, except ``"none"``.
        name: key of the term in ``ear.components()``; ``"relation_pull.OF.LAYER"`` by default.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        layer: int | str,
        weight: Weight = 1.0,
        *,
        of: str = "value",
        relation_heads: int | None = None,
        reduction: str = "mean",
        name: str | None = None,
    ) -> None:
        if not isinstance(layer, (int, str)):
            raise TypeError(f"layer: expected a number or a path, got {layer!r}; write a RelationPull for each layer")
        check_layers(layer)
        if layer in ("all", "middle"):
            raise ValueError(f"layer: expected a number or a path, got {layer!r}; write a RelationPull for each layer")
        check_choice("of", of, ("query", "key", "value"))
        if relation_heads is not None:
            check_count("relation_heads", relation_heads)
        super().__init__(f"relation_pull.{of}.{layer}" if name is None else name, weight, reduction)
        self.layer = layer
        self.of = of
        self.relation_heads = relation_heads

    def site(self, layout: Layout) -> Site:
        return layout.relations(self.layer, self.of)

    def term(self, reading: AttentionInputs, reading_aug: AttentionInputs | None) -> Tensor:
        reading = self._regrouped(reading)
        query_aug = key_aug = mask_aug = None
        if reading_aug is not None:
            reading, aligned = align_attention(reading, self._regrouped(reading_aug), self.name)
            query_aug, key_aug, mask_aug = aligned.query, aligned.key, aligned.attention_mask
        return functional.qk_attention_kl(
            reading.query,
            reading.key,
            query_aug,
            key_aug,
            attention_mask=reading.attention_mask,
            attention_mask_aug=mask_aug,
            scale=reading.scale,
            support="shared",
            reduction=self.reduction,
        )

    def _regrouped(self, reading: AttentionInputs) -> AttentionInputs:
        states = reading.query.transpose(1, 2).flatten(2)  # [B, L, H * D]
        heads = reading.query.shape[1] if self.relation_heads is None else self.relation_heads
        if states.shape[2] % heads:
            raise ValueError(
                f"{self.name}: relation_heads: expected a divisor of the {states.shape[2]} numbers of each token's "
                f"{self.of}, got {heads}"
            )
        states = states.unflatten(2, (heads, -1)).transpose(1, 2)  # [B, relation_heads, L, d]
        return reading._replace(query=states, key=states)
