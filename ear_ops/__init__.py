"""Attention and embedding regularizers for PyTorch, fused and straight from Q and K."""

from __future__ import annotations

from ear_ops.attachment import Attachment, attach
from ear_ops.diagnostics.gradient_ratios import gradient_ratios
from ear_ops.diagnostics.running_means import RunningMeans
from ear_ops.errors import BackendUnavailableError, EarOpsError
from ear_ops.functional import (
    attention_js,
    attention_kl,
    attention_mse,
    pooled_distance,
    qk_attention_js,
    qk_attention_kl,
    qk_attention_mse,
    qk_scores_mse,
    qk_word_attention,
    repeat_labels,
    robust_cross_entropy,
)
from ear_ops.integrations.transformers import RegularizedTrainerMixin
from ear_ops.losses import (
    AttentionJSLoss,
    AttentionKLLoss,
    AttentionMSELoss,
    PooledDistanceLoss,
    QKAttentionJSLoss,
    QKAttentionKLLoss,
    QKAttentionMSELoss,
    QKScoresMSELoss,
)
from ear_ops.regularizers import (
    AttentionPull,
    CosineSchedule,
    EmbeddingPush,
    HiddenPull,
    LinearWarmupSchedule,
    LogitsPull,
    Regularizer,
    RelationPull,
    SentencePull,
)

__version__ = "0.2.0"

__all__ = [
    "Attachment",
    "AttentionJSLoss",
    "AttentionKLLoss",
    "AttentionMSELoss",
    "AttentionPull",
    "BackendUnavailableError",
    "CosineSchedule",
    "EarOpsError",
    "EmbeddingPush",
    "HiddenPull",
    "LinearWarmupSchedule",
    "LogitsPull",
    "PooledDistanceLoss",
    "QKAttentionJSLoss",
    "QKAttentionKLLoss",
    "QKAttentionMSELoss",
    "QKScoresMSELoss",
    "RegularizedTrainerMixin",
    "Regularizer",
    "RelationPull",
    "RunningMeans",
    "SentencePull",
    "attach",
    "attention_js",
    "attention_kl",
    "attention_mse",
    "gradient_ratios",
    "pooled_distance",
    "qk_attention_js",
    "qk_attention_kl",
    "qk_attention_mse",
    "qk_scores_mse",
    "qk_word_attention",
    "repeat_labels",
    "robust_cross_entropy",
]
