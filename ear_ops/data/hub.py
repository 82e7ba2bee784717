"""Read XNLI and PAWS-X from the Hugging Face Hub, through the `datasets` library.

XNLI is the repository `facebook/xnli`, with the columns premise, hypothesis and label. PAWS-X is the repository
`google-research-datasets/paws-x`, with the columns id, sentence1, sentence2 and label. Both have a config for each
language.

The tests download nothing. They read local data sets with the same columns: Parquet folders that are laid out like
the repositories, and data sets that `datasets` saved to disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ear_ops.data.pairs import DataError, PairExample
from ear_ops.data.tasks import PAWSX, XNLI, Task
from ear_ops.installation import install

if TYPE_CHECKING:
    from datasets import Dataset


class _Source(NamedTuple):
    repository: str
    text_columns: tuple[str, str]


_SOURCES = {
    XNLI.name: _Source("facebook/xnli", ("premise", "hypothesis")),
    PAWSX.name: _Source("google-research-datasets/paws-x", ("sentence1", "sentence2")),
}
_HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}


def load_hub_split(task: Task, split: str, language: str) -> list[PairExample]:
    """Read one split in one language. The first call downloads it, and `datasets` keeps it.

    Args:
        task: XNLI or PAWSX.
        split: `train`, `dev` (which the Hub calls validation) or `test`.
        language: a language of the task. Training data in other languages than English is machine-translated.

    Raises:
        ImportError: `datasets` is not installed. The message says how to install it.
        ValueError: the split or the language is unknown.
        DataError: `pairs_from_dataset` raises it.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"reading from the Hub needs the package datasets: {install('train')}, "
            "or pass a folder with files in the XTREME layout"
        ) from error
    if split not in _HUB_SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(_HUB_SPLITS)}")
    if language not in task.languages:
        raise ValueError(f"unknown language {language!r}: {task.name} has {', '.join(task.languages)}")
    return pairs_from_dataset(load_dataset(_SOURCES[task.name].repository, language, split=_HUB_SPLITS[split]), task)


def pairs_from_dataset(dataset: Dataset, task: Task) -> list[PairExample]:
    """Convert a data set with the Hub's columns, in order. `datasets.load_from_disk` gives such a data set, too.

    Labels are matched by name, because the Hub numbers the labels of XNLI in another order than `task`.

    Raises:
        DataError: a column is missing, `label` is not a ClassLabel, or one of its names is not a label of the task.
            Also where a row lacks a text (None) or a label (None or -1).
    """
    columns = (*_SOURCES[task.name].text_columns, "label")
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise DataError(
            f"the data set lacks the column {', '.join(missing)}: expected {', '.join(columns)}, "
            f"got {', '.join(dataset.column_names)}"
        )
    names = getattr(dataset.features["label"], "names", None)
    if names is None:
        raise DataError(
            f"column label: expected a ClassLabel, which names its classes, got {dataset.features['label']}"
        )
    try:
        label_ids = [task.label_id(name) for name in names]
    except ValueError as error:
        raise DataError(f"column label: {error}") from None
    values = dataset.with_format(None)[:]
    rows = list(zip(*(values[column] for column in columns), strict=True))
    for number, row in enumerate(rows):
        if None in row or row[2] < 0:
            raise DataError(f"row {number} of the data set lacks a text or a label, got {columns} = {row}")
    return [PairExample(text1, text2, label_ids[label]) for text1, text2, label in rows]
