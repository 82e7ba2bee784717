"""Write k variants of every sentence pair to a file, which the training reads.

A line holds one variant in the six columns of Ding et al. (2022): s1^a, s2^a, label, s1, s2, label. The k lines of an
original follow each other.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from ear_ops.data.draws import draw_rng
from ear_ops.data.pairs import DataError, PairExample, parse_label, read_rows
from ear_ops.data.synonyms import SynonymAugmenter
from ear_ops.data.tasks import Task

COLUMNS = ("text1 augmented", "text2 augmented", "label", "text1", "text2", "label")


class VariantGroup(NamedTuple):
    """An original and the texts of its variants. There is at least one variant."""

    original: PairExample
    variants: tuple[tuple[str, str], ...]


def write_variants(
    path: str | Path,
    examples: Iterable[PairExample],
    task: Task,
    augmenter: SynonymAugmenter,
    num_variants: int,
    seed: int = 0,
) -> int:
    """Write `num_variants` lines for each example. The paper has 3 lines for XNLI and 10 for PAWS-X.

    `PairViews` draws variant j in epoch j, if it has the same seed. The file gets its name when it is complete. The
    same input gives the same bytes.

    Args:
        path: the file to write or replace. It is gzipped if its name ends in `.gz`. A missing folder is made.
        examples: the originals.
        task: gives the names of the labels.
        augmenter: augments both texts and counts the words.
        num_variants: k, at least 1.
        seed: the seed of the draws.

    Returns:
        The number of lines.

    Raises:
        DataError: a text holds a tab or a line feed, which a TSV file cannot hold.
        ValueError: `num_variants` is below 1.
    """
    if num_variants < 1:
        raise ValueError(f"num_variants: expected at least 1, got {num_variants}")
    lines = 0
    with _replacing(Path(path)) as file:
        for index, example in enumerate(examples):
            label = task.labels[example.label]
            for variant in range(num_variants):
                rng = draw_rng(seed, variant, index)
                augmented = augmenter.augment(example.text1, rng), augmenter.augment(example.text2, rng)
                fields = (*augmented, label, example.text1, example.text2, label)
                if any("\t" in field or "\n" in field for field in fields):
                    raise DataError(
                        f"{path}: example {index} holds a tab or a line feed, which TSV cannot hold: {fields}"
                    )
                file.write(("\t".join(fields) + "\n").encode("utf-8"))
                lines += 1
    return lines


def read_variants(path: str | Path, task: Task) -> list[VariantGroup]:
    """Read a file of variants, in order. Consecutive lines with the same original form a group.

    The file does not mark where a group ends. So two equal originals that follow each other give one group.

    Raises:
        DataError: the file is not such a file, as in `read_pairs`, or the two labels of a line differ.
    """
    return [
        VariantGroup(original, tuple(augmented for _, augmented in rows))
        for original, rows in groupby(_read_lines(path, task), key=lambda row: row[0])
    ]


def one_row_per_variant(groups: Sequence[VariantGroup]) -> list[VariantGroup]:
    """Make a group of every variant, so that an epoch has k rows for each original, as the paper literally says."""
    return [VariantGroup(group.original, (variant,)) for group in groups for variant in group.variants]


def _read_lines(path: str | Path, task: Task) -> Iterator[tuple[PairExample, tuple[str, str]]]:
    for number, (text1_aug, text2_aug, label_aug, text1, text2, label) in read_rows(path, COLUMNS):
        if label_aug != label:
            raise DataError(f"{path}:{number}: the labels differ: {label_aug!r} augmented, {label!r} original")
        yield PairExample(text1, text2, parse_label(path, number, label, task)), (text1_aug, text2_aug)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` when the block ends. If the block raises, the file is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with unfinished.open("wb") as file:
            if path.suffix == ".gz":
                # The header has no name and no time, so that the same lines give the same bytes.
                with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
                    yield cast(BinaryIO, packed)
            else:
                yield file
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
