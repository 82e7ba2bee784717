"""What a training step minimises. A method says whether it needs the augmented view, which regularisers it attaches,
and how the logits become a loss; everything else (data, order, optimiser, schedule) is the same for all methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ear_ops.functional import robust_cross_entropy
from ear_ops.regularizers import AttentionPull, EmbeddingPush

if TYPE_CHECKING:
    from ear_ops.training.config import TrainConfig


@dataclass
class StepLoss:
    """The loss of one step, the model's output, and the terms to log (detached scalars, unweighted)."""

    loss: Tensor  # []
    outputs: Any  # the model's output; its logits are [B, K] or [2B, K]
    terms: dict[str, Tensor]


class Method(ABC):
    """One way to fine-tune. `two_views`: batches hold x in rows 0..B-1 and its synonym-replaced x^a in rows B..2B-1."""

    two_views: ClassVar[bool]

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def regularizers(self) -> list[Any]:
        """The regularisers to attach to the model, if any; their sum reaches `step` through `attached.loss()`."""
        return []

    @abstractmethod
    def step(self, model: Any, inputs: Mapping[str, Tensor], labels: Tensor, attached: Any) -> StepLoss:
        """Loss of one batch in training mode.

        Args:
            inputs: the model's inputs, `input_ids` and `attention_mask` [B, L], or [2B, L] with two views.
            labels: [B], of the originals.
            attached: what `ear_ops.attach` returned for `regularizers()`, or None without regularisers.
        """


class FineTune(Method):
    """CE(x): fine-tuning on the English originals alone, the baseline of Ding et al. (COLING 2022), tables 1 and 2."""

    two_views = False

    def step(self, model: Any, inputs: Mapping[str, Tensor], labels: Tensor, attached: Any) -> StepLoss:
        outputs = model(**inputs)
        return StepLoss(F.cross_entropy(outputs.logits, labels), outputs, view_terms(outputs.logits, labels))


class RobustDataAugmentation(Method):
    """RS-DA of Huang et al. (EMNLP 2021): x and x^a are separate examples of one step, so the loss is the mean
    cross-entropy over 2B rows, half of what `ear` without its two regularisers would minimise."""

    two_views = True

    def step(self, model: Any, inputs: Mapping[str, Tensor], labels: Tensor, attached: Any) -> StepLoss:
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels.repeat(2))
        return StepLoss(loss, outputs, view_terms(outputs.logits, labels))


class EmbeddingPushAttentionPull(Method):
    """EAR, equation 5 of Ding et al. (COLING 2022): CE(x) + CE(x^a) + alpha * push + beta * pull."""

    two_views = True

    def regularizers(self) -> list[Any]:
        config = self.config
        return [
            EmbeddingPush(config.alpha, reduction=config.reduction),
            AttentionPull(config.layer, config.beta, reduction=config.reduction),
        ]

    def step(self, model: Any, inputs: Mapping[str, Tensor], labels: Tensor, attached: Any) -> StepLoss:
        outputs = model(**inputs)
        loss = robust_cross_entropy(outputs.logits, labels) + attached.loss()
        return StepLoss(loss, outputs, {**view_terms(outputs.logits, labels), **attached.components()})


METHODS: dict[str, type[Method]] = {
    "finetune": FineTune,
    "rs-da": RobustDataAugmentation,
    "ear": EmbeddingPushAttentionPull,
}


def view_terms(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Mean cross-entropy of each view, for the log. logits [B, K] or [2B, K], labels [B]."""
    with torch.no_grad():
        views = logits.detach().float().split(labels.shape[0])
        names = ("cross_entropy", "cross_entropy_augmented")
        return {name: F.cross_entropy(view, labels) for name, view in zip(names, views, strict=False)}
