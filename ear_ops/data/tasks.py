"""The tasks of the readers: their languages, and their labels in the order of the classifier's outputs.

>>> get_task("xnli").label_id("entailment")
1
"""

from __future__ import annotations

from dataclasses import dataclass

from ear_ops.errors import shown


@dataclass(frozen=True)
class Task:
    """A sentence-pair classification task.

    Args:
        name: the name on the command line and of the data folder.
        labels: the labels as the files spell them. The position of a label is its class index.
        languages: ISO 639-1 codes in the order of the paper's tables. The source language, English, comes first.
    """

    name: str
    labels: tuple[str, ...]
    languages: tuple[str, ...]

    def label_id(self, label: str) -> int:
        """Return the class index of `label`. The ValueError about an unknown label lists the known ones."""
        try:
            return self.labels.index(label)
        except ValueError:
            raise ValueError(
                f"unknown label {shown(label)}: {self.name} has {', '.join(map(repr, self.labels))}"
            ) from None


# XTREME (Hu et al., 2020) has this order of labels. So the outputs of a classifier from its scripts mean the same here.
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
    """Return the task called `name`. The ValueError about an unknown name lists the known ones."""
    try:
        return TASKS[name]
    except KeyError:
        raise ValueError(f"unknown task {name!r}: expected one of {', '.join(TASKS)}") from None
