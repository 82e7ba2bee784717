"""The training methods: what a training step minimises.

A method decides whether batches hold the augmented view, which regularisers are attached, and how the logits become a
loss. The data, their order, the optimiser and its learning rates are the same for all methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ear_ops.capture import unwrap
from ear_ops.functional import robust_cross_entropy
from ear_ops.integrations.transformers import StepLoss
from ear_ops.recipes.training.perturbation import (
    Draws,
    mean_norm,
    shifted,
    uniform_in_ball,
    word_embeddings,
    worst_in_ball,
)
from ear_ops.recipes.training.stage_settings import ObjectiveSettings
from ear_ops.regularizers import AttentionPull, EmbeddingPush, SentencePull

AUGMENTATION = frozenset({"synonyms", "match", "dictionary_scale"})
PUSH = frozenset({"alpha", "push_ratio", "reduction"})
PULL = frozenset({"beta", "pull_ratio", "layer", "reduction"})


class Method(ABC):
    """A way to fine-tune.

    Attributes:
        two_views: whether batches hold x in rows 0..B-1 and its synonym-replaced x^a in rows B..2B-1, or x alone.
        uses: the settings that change the result of this method, of those that not every method looks at.
    """

    two_views: ClassVar[bool]
    uses: ClassVar[frozenset[str]]

    def __init__(self, settings: ObjectiveSettings) -> None:
        self.settings = settings

    def regularizers(self) -> list[Any]:
        """The regularisers to attach to the model. `step` gets the sum of their terms from `attached.loss()`."""
        return []

    @abstractmethod
    def step(self, model: Any, inputs: Mapping[str, Tensor], labels: Tensor, attached: Any, batch: int) -> StepLoss:
        """The loss of one batch in training mode.

        Args:
            model: in its wrappers, if it has any.
            inputs: the model's inputs, `input_ids` and `attention_mask` [B, L], or [2B, L] with two views.
            labels: of the originals, [B].
            attached: what `ear_ops.attach` returned for `regularizers()`, or None without regularisers.
            batch: the number of the batch since training began. The random numbers of a row depend on this number, the
                seed, and the place of the row among those of all processes.
        """

    def _draws(self, batch: int) -> Draws:
        return Draws(self.settings.seed, batch, self.settings.max_length)


class FineTune(Method):
    """CE(x): fine-tuning on the English originals alone, the baseline of Ding et al. (COLING 2022), tables 1 and 2."""

    two_views, uses = False, frozenset()

    def step(self, model: Any, inputs: Mapping[str, Tensor], labels: Tensor, attached: Any, batch: int) -> StepLoss:
        outputs = model(**inputs)
        return StepLoss(F.cross_entropy(outputs.logits, labels), outputs, view_terms(outputs.logits, labels))


class RobustDataAugmentation(Method):
    """RS-DA of Huang et al. (EMNLP 2021): x and x^a are separate examples of one step.

    The loss is the mean cross-entropy over 2B rows. This is half of the loss of `ear` without its two regularisers
    (`ear-no-both`).
    """

    two_views, uses = True, AUGMENTATION

    def step(self, model: Any, inputs: Mapping[str, Tensor], labels: Tensor, attached: Any, batch: int) -> StepLoss:
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels.repeat(2))
        return StepLoss(loss, outputs, view_terms(outputs.logits, labels))


class RandomPerturbation(Method):
    """RS-RP of Huang et al. (EMNLP 2021): CE of x with its word embeddings moved to a random place in a ball.

    The vector of each token is drawn uniformly from the Euclidean ball around it, whose radius is `perturbation` times
    the mean word-embedding norm. A step has the B originals alone.
    """

    two_views, uses = False, frozenset({"perturbation"})

    def step(self, model: Any, inputs: Mapping[str, Tensor], labels: Tensor, attached: Any, batch: int) -> StepLoss:
        embeddings = word_embeddings(model, inputs)  # [B, L, C]
        radius = self.settings.perturbation * mean_norm(embeddings, inputs["attention_mask"])
        with shifted(model, uniform_in_ball(embeddings, radius, self._draws(batch))):
            outputs = model(**inputs)
        return StepLoss(F.cross_entropy(outputs.logits, labels), outputs, view_terms(outputs.logits, labels))


class AdversarialTraining(Method):
    """Adversarial training of Huang et al. (EMNLP 2021): CE of x at the worst place in a ball around its embeddings.

    `adversarial_steps` projected gradient steps (Madry et al., ICLR 2018) find the place in the Euclidean ball of each
    token. The radius is `perturbation` times the mean word-embedding norm. Each step costs a forward and a backward.
    """

    two_views, uses = False, frozenset({"perturbation", "adversarial_steps"})

    def step(self, model: Any, inputs: Mapping[str, Tensor], labels: Tensor, attached: Any, batch: int) -> StepLoss:
        inner = unwrap(model)  # the search needs no gradients of parameters, so processes exchange nothing in it
        embeddings = word_embeddings(model, inputs)  # [B, L, C]
        radius = self.settings.perturbation * mean_norm(embeddings, inputs["attention_mask"])

        def loss(delta: Tensor) -> Tensor:
            with shifted(model, delta):
                return F.cross_entropy(inner(**inputs).logits, labels)

        with shifted(model, worst_in_ball(loss, embeddings, radius, self.settings.adversarial_steps)):
            outputs = model(**inputs)
        return StepLoss(F.cross_entropy(outputs.logits, labels), outputs, view_terms(outputs.logits, labels))


class RobustTargets(Method):
    """`ear` without push and pull, the ablation of Ding et al. (COLING 2022), table 3: CE(x) + CE(x^a), equation 4.

    The loss is twice that of `rs-da`: a sum over the views instead of a mean. AdamW divides the factor out again,
    except for its epsilon. The factor does change how gradients are clipped.
    """

    two_views, uses = True, AUGMENTATION

    def step(self, model: Any, inputs: Mapping[str, Tensor], labels: Tensor, attached: Any, batch: int) -> StepLoss:
        outputs = self._forward(model, inputs, batch)
        loss, terms = robust_cross_entropy(outputs.logits, labels), view_terms(outputs.logits, labels)
        if attached is not None:
            loss = loss + attached.loss()
            terms.update(attached.components())
        return StepLoss(loss, outputs, terms)

    def _forward(self, model: Any, inputs: Mapping[str, Tensor], batch: int) -> Any:
        return model(**inputs)

    def _push(self) -> EmbeddingPush:
        return EmbeddingPush(_measured(self.settings.alpha), reduction=self.settings.reduction)

    def _pull(self) -> AttentionPull:
        return AttentionPull(self.settings.layer, _measured(self.settings.beta), reduction=self.settings.reduction)


class EmbeddingPushAttentionPull(RobustTargets):
    """EAR, equation 5 of Ding et al. (COLING 2022): CE(x) + CE(x^a) + alpha * push + beta * pull."""

    two_views, uses = True, AUGMENTATION | PUSH | PULL

    def regularizers(self) -> list[Any]:
        return [self._push(), self._pull()]


class WithoutPush(RobustTargets):
    """`ear` without the embedding push, the ablation of Ding et al. (COLING 2022), table 3."""

    two_views, uses = True, AUGMENTATION | PULL

    def regularizers(self) -> list[Any]:
        return [self._pull()]


class WithoutPull(RobustTargets):
    """`ear` without the attention pull, the ablation of Ding et al. (COLING 2022), table 3."""

    two_views, uses = True, AUGMENTATION | PUSH

    def regularizers(self) -> list[Any]:
        return [self._push()]


class NoisePull(WithoutPush):
    """NT + APT of Ding et al. (COLING 2022), section 4.2 and table 4: noise on x^a in place of the push.

    x^a is still the text with synonyms. Noise of N(0, sigma^2) is added to every component of its word embeddings.
    sigma is `perturbation` times the mean word-embedding norm, so a noise vector is about sqrt(C) sigma long.
    """

    two_views, uses = True, AUGMENTATION | PULL | {"perturbation"}

    def _forward(self, model: Any, inputs: Mapping[str, Tensor], batch: int) -> Any:
        embeddings = word_embeddings(model, inputs)  # [2B, L, C]
        sigma = self.settings.perturbation * mean_norm(embeddings, inputs["attention_mask"])
        noise = sigma * self._draws(batch).normal(embeddings[len(embeddings) // 2 :])  # [B, L, C]
        with shifted(model, torch.cat([torch.zeros_like(noise), noise])):
            return model(**inputs)


class PushSentencePull(RobustTargets):
    """EPT + SRPT of Ding et al. (COLING 2022), section 4.3 and table 4: sentence pull in place of the attention pull.

    CE(x) + CE(x^a) + alpha * push + beta * sentence pull. The sentence pull acts on the mean-pooled output of block
    `layer`.
    """

    two_views, uses = True, AUGMENTATION | PUSH | PULL

    def regularizers(self) -> list[Any]:
        return [
            self._push(),
            SentencePull(self.settings.layer, _measured(self.settings.beta), reduction=self.settings.reduction),
        ]


METHODS: dict[str, type[Method]] = {
    "finetune": FineTune,
    "rs-da": RobustDataAugmentation,
    "rs-rp": RandomPerturbation,
    "adv": AdversarialTraining,
    "ear": EmbeddingPushAttentionPull,
    "ear-no-ept": WithoutPush,
    "ear-no-apt": WithoutPull,
    "ear-no-both": RobustTargets,
    "nt+apt": NoisePull,
    "ept+srpt": PushSentencePull,
}

# Every method looks at the settings that are not in here.
METHOD_SETTINGS = frozenset[str]().union(*(method.uses for method in METHODS.values()))


def _measured(weight: float | None) -> float:
    assert weight is not None, "the weight for a ratio is measured before the method is made"
    return weight


def view_terms(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The mean cross-entropy of each view, for the log.

    Args:
        logits: [B, K], or [2B, K] of two views.
        labels: [B].
    """
    with torch.no_grad():
        views = logits.detach().float().split(labels.shape[0])
        names = ("cross_entropy", "cross_entropy_augmented")
        return {name: F.cross_entropy(view, labels) for name, view in zip(names, views, strict=False)}
