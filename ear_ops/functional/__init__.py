"""The losses as functions: tensors in, loss out.

Every function takes the two views either as two tensors (``query``, ``query_aug``, ...) or as one tensor ``[2B, ...]``
that holds both, x first, with masks ``[2B, ...]`` too. The ``_aug`` arguments are then left out. One tensor in means
one gradient out, which is cheaper for a model that runs both views in one batch.

``backend`` is ``"auto"`` (kernels for the device where there are any, else the reference), ``"reference"``, ``"cpu"``
or ``"cuda"``. None reads the environment variable ``EAR_OPS_BACKEND``, whose default is ``"auto"``. A backend that is
asked for by name and cannot run raises :class:`ear_ops.BackendUnavailableError` with the reason.
"""

from __future__ import annotations

from ear_ops.functional.cross_entropy import check_labels_of_views, repeat_labels, robust_cross_entropy
from ear_ops.functional.maps import attention_js, attention_kl, attention_mse
from ear_ops.functional.options import check_divergence_options
from ear_ops.functional.pooled import pooled_distance
from ear_ops.functional.queries_and_keys import qk_attention_js, qk_attention_kl, qk_attention_mse, qk_scores_mse
from ear_ops.functional.words import qk_word_attention

__all__ = [
    "attention_js",
    "attention_kl",
    "attention_mse",
    "check_divergence_options",
    "check_labels_of_views",
    "pooled_distance",
    "qk_attention_js",
    "qk_attention_kl",
    "qk_attention_mse",
    "qk_scores_mse",
    "qk_word_attention",
    "repeat_labels",
    "robust_cross_entropy",
]
