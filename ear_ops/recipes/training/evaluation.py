"""The accuracy in each language, with its interval."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import torch

from ear_ops.data.collator import PairCollator
from ear_ops.data.pairs import PairExample, is_untranslated
from ear_ops.data.tasks import get_task
from ear_ops.data.views import PairViews


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion (Wilson, 1927). Raises ValueError without items."""
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"expected 0 <= correct <= total and total > 0, got correct={correct}, total={total}")
    z = NormalDist().inv_cdf(0.975)
    share = correct / total
    center = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, center - half), min(1.0, center + half)


class Score(NamedTuple):
    """How many predictions were correct, and of how many."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% Wilson interval of the accuracy."""
        return wilson_interval(self.correct, self.total)


@dataclass(frozen=True)
class LanguageScore:
    """The score of a language. `translated` leaves out the items without a translation; only PAWS-X has such items."""

    language: str
    all: Score
    translated: Score | None


def score(language: str, examples: Sequence[PairExample], predictions: Sequence[int], *, task: str) -> LanguageScore:
    """Compare predictions with labels. The untranslated items of PAWS-X count with the label in the file, as published.

    The accuracy without these items is in `translated`.
    """
    right = [prediction == example.label for prediction, example in zip(predictions, examples, strict=True)]
    translated = None
    if task == "pawsx":
        kept = [hit for hit, example in zip(right, examples, strict=True) if not is_untranslated(example)]
        translated = Score(sum(kept), len(kept)) if kept else None
    return LanguageScore(language, Score(sum(right), len(right)), translated)


def one_label_notice(split: str, examples: Mapping[str, Sequence[PairExample]], task: str) -> str | None:
    """A warning where all items of a language have the same label, or None.

    Args:
        split: that was read, such as `test`.
        examples: by language.
        task: of the examples.
    """
    labels = {language: {example.label for example in pairs} for language, pairs in examples.items() if len(pairs) > 1}
    alone = [
        f"{language} ({get_task(task).labels[label]!r})" for language, (label, *others) in labels.items() if not others
    ]
    if not alone:
        return None
    return (
        f"all items of {task} {split} have one label in {', '.join(alone)}: these are placeholders, as in test files "
        "that were published without labels, or a part of the data, and numbers from them say nothing"
    )


@torch.inference_mode()
def predict(
    model: Any,
    tokenizer: Any,
    examples: Sequence[PairExample],
    *,
    max_length: int = 128,
    batch_size: int = 128,
    bf16: bool = False,
    progress: str | None = None,
) -> list[int]:
    """The label with the highest logit for each pair, in the order of `examples`.

    Args:
        model: a sequence classifier, logits [B, K]; it is put into evaluation mode.
        tokenizer: of the model.
        examples: the pairs.
        max_length: pieces of a pair; longer pairs are cut.
        batch_size: pairs of a forward.
        bf16: run under bfloat16 autocast.
        progress: the name of a progress bar; None shows no bar.
    """
    model.eval()
    collate = PairCollator(tokenizer, max_length=max_length)
    items = PairViews(examples, None, seed=0)
    # Batches of like length need little padding. The predictions are put back into the order of the pairs.
    order = sorted(range(len(items)), key=lambda i: len(examples[i].text1) + len(examples[i].text2))
    predictions = [0] * len(items)
    for start in _shown(range(0, len(order), batch_size), progress):
        rows = order[start : start + batch_size]
        batch = {name: tensor.to(model.device) for name, tensor in collate([items[i] for i in rows]).items()}
        del batch["labels"]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            logits = model(**batch).logits  # [B, K]
        for i, label in zip(rows, logits.argmax(-1).tolist(), strict=True):
            predictions[i] = label
    return predictions


def _shown(steps: Sequence[int], name: str | None) -> Iterable[int]:
    """The steps, with a progress bar if there is a name and stderr is a terminal."""
    if name is None or not sys.stderr.isatty():
        return steps
    from rich.console import Console
    from rich.progress import track

    return track(steps, name, console=Console(stderr=True), transient=True)
