"""The tasks that the readers know: labels in the order of the classifier's outputs, and languages.

>>> get_task("xnli").label_id("entailment")
1
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A sentence-pair classification task.

    Args:
        name: what the command line and the data folder call it.
        labels: the labels as the files spell them; the position is the class index.
        languages: ISO 639-1 codes in the order of the paper's tables, the source language (English) first.
    """

    name: str
    labels: tuple[str, ...]
    languages: tuple[str, ...]

    def label_id(self, label: str) -> int:
        """Return the class index of `label`; raises ValueError listing the known labels."""
        try:
            return self.labels.index(label)
        except ValueError:
            raise ValueError(f"unknown label {label!r}: {self.name} has {', '.join(map(repr, self.labels))}") from None


# The label order of XTREME (Hu et al., 2020), so that classifiers trained with its scripts keep their meaning.
XNLI = Task(
    name="xnli",
    labels=("contradiction", "entailment", "neutral"),
    languages=("en", "ar", "bg", "de", "el", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh"),
)
PAWSX = Task(
    name="pawsx",
    labels=("0", "1"),
    languages=("en", "de", "es", "fr", "ja", "ko", "zh"),
)

TASKS: dict[str, Task] = {task.name: task for task in (XNLI, PAWSX)}


def get_task(name: str) -> Task:
    """Return the task called `name`; raises ValueError listing the known names."""
    try:
        return TASKS[name]
    except KeyError:
        raise ValueError(f"unknown task {name!r}: expected one of {', '.join(TASKS)}") from None
