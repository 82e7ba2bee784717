"""The classifier of a run: as its training begins, and as it ends with the whole vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import set_seed

from ear_ops.data import PairExample, get_task
from ear_ops.models.classifier import load_classifier
from ear_ops.models.vocabulary import prune_vocabulary, restore_vocabulary
from ear_ops.recipes.training import processes
from ear_ops.recipes.training.errors import ConfigError, refused_settings
from ear_ops.recipes.training.folder import check_initial_model
from ear_ops.recipes.training.stage_settings import ClassifierSettings

_TRIED_PAIRS = 100  # on which a tokenizer is tried


def initial_model(settings: ClassifierSettings, texts: Iterable[str] | None = None) -> tuple[Any, Any]:
    """Model and tokenizer as the training begins, with the head that the seed draws.

    Args:
        settings: of the run.
        texts: the vocabulary is pruned to what these texts use; without them it stays whole.

    Raises:
        ConfigError: the model has other labels or another pooling, or a vocabulary that cannot be pruned.
    """
    set_seed(settings.seed)
    labels = get_task(settings.task).labels
    model: Any
    tokenizer: Any
    with refused_settings():
        model, tokenizer = load_classifier(settings.model, len(labels), pooling=settings.pooling, label_names=labels)
    if texts is not None:
        whole_size = len(tokenizer)
        with refused_settings():
            model, tokenizer = prune_vocabulary(model, tokenizer, sorted(set(texts)))
        processes.say(f"Vocabulary: {len(tokenizer):,} of {whole_size:,} pieces kept.")
    return model, tokenizer


def check_tokenizer(tokenizer: Any, examples: Sequence[PairExample], name: str) -> None:
    """Raise ConfigError where a tokenizer reads most of the first training pairs as unknown.

    Args:
        tokenizer: of the model.
        examples: the training pairs.
        name: of the model.
    """
    texts = [text for pair in examples[:_TRIED_PAIRS] for text in (pair.text1, pair.text2)]
    pieces = [piece for text in texts for piece in tokenizer.tokenize(text) if piece != "▁"]
    known = len(pieces) - pieces.count(tokenizer.unk_token)
    if known < max(len(pieces) / 2, len(texts)):  # some tokenizers leave out what they do not know
        raise ConfigError(
            f"model: the tokenizer of {name} knows {known:,} of the {len(pieces):,} pieces in {len(texts):,} texts of "
            "the training pairs, so the model would read too little: check that its files are complete, or choose a "
            "model that knows the language"
        )


def trained_model(settings: ClassifierSettings, folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a finished run, with the whole vocabulary.

    Where the run pruned its vocabulary, the dropped pieces get their initial embeddings. Training would not have
    changed these: no text holds such a piece, and the configuration refuses weight decay with pruning.

    Raises:
        RunFolderError: the vocabulary is to be restored from a local model whose files have changed since.
    """
    with refused_settings():
        model, tokenizer = load_classifier(str(folder / "model"), len(get_task(settings.task).labels))
    if not settings.prune_vocabulary:
        return model, tokenizer
    check_initial_model(folder, settings.model)
    whole_model, whole_tokenizer = initial_model(settings)
    restore_vocabulary(model, tokenizer, whole_model, whole_tokenizer)
    return whole_model, whole_tokenizer
