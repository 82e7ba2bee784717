"""Frozen word embeddings: most parameters of a multilingual model then need no gradient and no optimiser state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ear_ops.attachment import attach
from ear_ops.recipes.training.errors import ConfigError


def freeze_word_embeddings(model: Any, regularizers: Sequence[Any], inputs: Mapping[str, Tensor]) -> None:
    """Take the word embeddings out of the training, and check that every term still has a gradient.

    The push then changes the other parameters of the embedding layer alone. In BERT, these are the position embeddings
    and the layer norm.

    Args:
        model: a classifier; it stays in evaluation mode.
        regularizers: of the training.
        inputs: of the model, two views [2B, L], to try the terms on. The random state does not change.

    Raises:
        ConfigError: a term has no gradient, since nothing but word embeddings comes before it.
    """
    model.get_input_embeddings().requires_grad_(False)
    model.eval()
    if not regularizers:
        return
    with attach(model, regularizers) as attached, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* has no gradient")
        model(**inputs)
        try:
            attached.loss()
        except UserWarning as warning:
            raise ConfigError(f"freeze_embeddings: {warning}: train the embeddings, or leave the term out") from None
