"""Regularisers: a loss, a place in a model and a weight; :func:`ear_ops.attach` hangs them on a model."""

from ear_ops.regularizers.attention_pull import AttentionPull
from ear_ops.regularizers.base import Regularizer, Weight
from ear_ops.regularizers.hidden_pull import HiddenPull
from ear_ops.regularizers.logits_pull import LogitsPull
from ear_ops.regularizers.pooled import EmbeddingPush, SentencePull
from ear_ops.regularizers.relation_pull import RelationPull
from ear_ops.regularizers.schedules import CosineSchedule, LinearWarmupSchedule
from ear_ops.regularizers.word_alignment import WordIds

__all__ = [
    "AttentionPull",
    "CosineSchedule",
    "EmbeddingPush",
    "HiddenPull",
    "LinearWarmupSchedule",
    "LogitsPull",
    "Regularizer",
    "RelationPull",
    "SentencePull",
    "Weight",
    "WordIds",
]
