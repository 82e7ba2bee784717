"""The regulariser on predictions: a divergence between the logits of two views."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ear_ops.arguments import check_choice, check_temperature
from ear_ops.capture.layout import Layout
from ear_ops.capture.logits import Logits
from ear_ops.capture.readings import split_reading
from ear_ops.capture.sites import Site
from ear_ops.ops.blocks import sum_over_blocks
from ear_ops.ops.divergences import DIVERGENCES, divergence_of_scores
from ear_ops.ops.probabilities import compute_dtype
from ear_ops.ops.reductions import reduce_attention
from ear_ops.regularizers.base import Regularizer, Weight


class LogitsPull(Regularizer):
    """Pull the predictions of the two views together: KL between the softmaxes of their logits.

    With a teacher this is distillation (Hinton et al. 2015). Between two views of one model, ``"kl"`` and
    ``"reverse_kl"``, each with half of the weight, are the consistency term of R-Drop (Liang et al. 2021) and, on the
    examples of two languages, of xTune (Zheng et al. 2021).

    Args:
        weight: see :data:`Weight`. No factor temperature^2 is applied: Hinton et al. multiply the weight by it.
        temperature: divides the logits of both views.
        divergence: ``"kl"`` is KL(T || P), where the target T is the teacher, or the second view x^a; ``"reverse_kl"``
            is KL(P || T); ``"js"`` is the Jensen-Shannon divergence.
        reduction: ``"mean"`` divides the sum by the number of rows (of logits ``[B, K]``), or of tokens that are real
            in both views (of ``[B, L, K]``). ``"padded_mean"`` counts padded tokens too, ``"equations"`` divides by B,
            and ``"sum"`` by nothing.
        name: key of the term in ``ear.components()``.

    Of an encoder-decoder, ``decoder_attention_mask`` says which tokens are real; without it all of them count.

    A class whose logit is -inf in both views adds nothing. Where only the target has a class, KL is +inf.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        weight: Weight = 1.0,
        *,
        temperature: float = 1.0,
        divergence: str = "kl",
        reduction: str = "mean",
        name: str = "logits_pull",
    ) -> None:
        check_temperature(temperature)
        check_choice("divergence", divergence, DIVERGENCES)
        super().__init__(name, weight, reduction)
        self.temperature = temperature
        self.divergence = divergence

    def site(self, layout: Layout) -> Site:
        return layout.logits()

    def term(self, reading: Logits, reading_aug: Logits | None) -> Tensor:
        reading, reading_aug = split_reading(reading, reading_aug)
        shape, shape_aug = list(reading.logits.shape), list(reading_aug.logits.shape)
        if shape != shape_aug:
            raise ValueError(
                f"{self.name}: expected logits of one shape in both views, got {shape} and {shape_aug}; both need the "
                f"same classes and equally many tokens"
            )
        if shape[-1] < 2:
            raise ValueError(
                f"{self.name}: expected logits of at least 2 classes, got {shape}: the softmax of one number is always "
                f"1; for the output of a regression, write a Regularizer that compares the numbers themselves"
            )
        dtype = compute_dtype(torch.promote_types(reading.logits.dtype, reading_aug.logits.dtype))
        batch, classes = shape[0], shape[-1]
        scores, scores_aug = (  # [B, 1, L, K], as one head whose keys are the classes
            view.logits.to(dtype).reshape(batch, 1, -1, classes) / self.temperature for view in (reading, reading_aug)
        )
        masks = [view.attention_mask for view in (reading, reading_aug) if view.attention_mask is not None]
        counted = functools.reduce(torch.logical_and, masks) if masks and self.reduction != "padded_mean" else None

        def sums_of(rows: slice) -> Tensor:
            views = scores[:, :, rows], scores_aug[:, :, rows]
            allowed = [view != -math.inf for view in views]  # a class without a probability, as a key without one
            if counted is not None:
                allowed = [classes & counted[:, None, rows, None] for classes in allowed]
            finite = [view.masked_fill(view == -math.inf, 0.0) for view in views]
            return divergence_of_scores(self.divergence, *finite, *allowed)

        length = scores.shape[2]
        sums = sum_over_blocks(sums_of, length, batch * classes)
        return reduce_attention(sums, self.reduction, length, 1, None if counted is None else counted.sum(1))
