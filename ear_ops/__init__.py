"""Attention and embedding regularizers for PyTorch, fused and straight from Q and K."""

from __future__ import annotations

from ._library import BackendUnavailableError
from .functional import attention_mse, pooled_distance, qk_attention_mse, repeat_labels, robust_cross_entropy
from .losses import AttentionMSELoss, PooledDistanceLoss, QKAttentionMSELoss
from .regularizers import AttentionPull, EmbeddingPush, SentencePull, attach
from .running import RunningMeans
from .trainer import RegularizedTrainerMixin
from .weights import Cosine, LinearWarmup

__version__ = "0.1.0"

__all__ = [
    "AttentionMSELoss",
    "AttentionPull",
    "BackendUnavailableError",
    "Cosine",
    "EmbeddingPush",
    "LinearWarmup",
    "PooledDistanceLoss",
    "QKAttentionMSELoss",
    "RegularizedTrainerMixin",
    "RunningMeans",
    "SentencePull",
    "attach",
    "attention_mse",
    "pooled_distance",
    "qk_attention_mse",
    "repeat_labels",
    "robust_cross_entropy",
]
