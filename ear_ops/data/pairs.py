"""Sentence pairs from files in the XTREME layout: `{split}-{language}.tsv`, text1 TAB text2 TAB label.

The files are plain TSV. There is no quoting, so a `"` is a character like any other, and only a line feed ends
a line, so that a text may hold a form feed or U+2028. Every line becomes an example or an error.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ear_ops.data.tasks import TASKS, Task
from ear_ops.errors import EarOpsError

_SUFFIXES = (".tsv", ".tsv.gz")
_COLUMNS = ("text1", "text2", "label")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class DataError(EarOpsError, ValueError):
    """A data file that is missing or not what it should be; the message names the file, and the line if possible."""


class PairExample(NamedTuple):
    """One sentence pair: premise and hypothesis (XNLI) or two sentences (PAWS-X), and the class index."""

    text1: str
    text2: str
    label: int


def read_rows(path: str | Path, columns: tuple[str, ...], optional: int = 0) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number from 1, fields) of every line of a tab-separated file, gzipped if its name ends in `.gz`.

    LF or CRLF ends a line and a byte order mark is skipped; fields are otherwise as they stand.

    Args:
        path: the file, UTF-8.
        columns: what the columns are called, for the message about a line with more or fewer.
        optional: how many of the last columns a line may lack.

    Raises:
        DataError: no such file, no line in it, damaged gzip, bytes that are not UTF-8, wrong number of columns.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    accepted = range(len(columns) - optional, len(columns) + 1)
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, start=1):  # a binary file is split at b"\n" alone
                if number == 1:
                    raw = raw.removeprefix(_BYTE_ORDER_MARK)
                try:
                    line = raw.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}:{number}: not UTF-8: {error}") from None
                fields = line.split("\t")
                if len(fields) not in accepted:
                    raise DataError(
                        f"{path}:{number}: expected {' or '.join(map(str, accepted))} tab-separated columns "
                        f"({', '.join(columns)}), got {len(fields)}: {_shorten(line)}"
                    )
                yield number, fields
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}:{number + 1}: damaged gzip file: {error}") from None
    if number == 0:
        raise DataError(f"{path}: the file is empty")


def parse_label(path: str | Path, number: int, label: str, task: Task) -> int:
    """Return the class index of a label that stands on line `number` of `path`.

    Raises:
        DataError: the label is empty or not one of the task's. The message names file and line, and the task that has
            the label.
    """
    if not label:
        raise DataError(f"{path}:{number}: the label is empty; {task.name} has {', '.join(map(repr, task.labels))}")
    try:
        return task.label_id(label)
    except ValueError as error:
        fitting = [f"; the labels of {name} have it: --task {name}" for name in TASKS if label in TASKS[name].labels]
        raise DataError(f"{path}:{number}: {error}{''.join(fitting)}") from None


def read_pairs(path: str | Path, task: Task) -> list[PairExample]:
    """Read one file of `text1 TAB text2 TAB label` lines, in order.

    Raises:
        DataError: whatever `read_rows` finds wrong, an empty label, or a label that the task does not have.
    """
    return [
        PairExample(text1, text2, parse_label(path, number, label, task))
        for number, (text1, text2, label) in read_rows(path, _COLUMNS)
    ]


def load_split(data_dir: str | Path, task: Task, split: str, language: str) -> list[PairExample]:
    """Read `{split}-{language}.tsv` or `.tsv.gz` from `data_dir/{task.name}`, else from `data_dir` itself.

    Args:
        data_dir: folder of the task's files, or the folder above one named like the task.
        task: says which labels there are.
        split: `train`, `dev` or `test` in the XTREME layout.
        language: any code for which there is a file.

    Raises:
        DataError: `data_dir` is not a folder, no such file (the message names the files looked for and the languages
            that the split has), or what `read_pairs` raises.
    """
    return read_pairs(find_split(data_dir, task, split, language), task)


def load_texts(data_dir: str | Path, task: Task, split: str, language: str) -> Iterator[tuple[str, str]]:
    """Yield the texts of the file that `load_split` reads. A line may lack its label, or have one of another task.

    Raises:
        DataError: as `load_split`, but for labels.
    """
    for _, (text1, text2, *_) in read_rows(find_split(data_dir, task, split, language), _COLUMNS, optional=1):
        yield text1, text2


def find_split(data_dir: str | Path, task: Task, split: str, language: str) -> Path:
    """The file that `load_split` reads; raises DataError where there is none."""
    candidates = [folder / f"{split}-{language}{suffix}" for folder in _folders(data_dir, task) for suffix in _SUFFIXES]
    for path in candidates:
        if path.is_file():
            return path
    present = ", ".join(available_languages(data_dir, task, split)) or "none"
    raise DataError(
        f"no {split} data of {task.name} in language {language!r}: looked for {', '.join(map(str, candidates))}; "
        f"languages present in split {split!r}: {present}"
    )


def available_languages(data_dir: str | Path, task: Task, split: str) -> list[str]:
    """Return the languages for which `load_split` finds a file: the task's own in its order, then others by name.

    Raises:
        DataError: `data_dir` is not a folder.
    """
    pattern = re.compile(re.escape(split) + r"-([^.]+)\.tsv(\.gz)?")
    matches = (
        pattern.fullmatch(path.name)
        for folder in _folders(data_dir, task)
        for path in folder.iterdir()
        if path.is_file()
    )
    found = {match[1] for match in matches if match}
    known = [language for language in task.languages if language in found]
    return known + sorted(found.difference(known))


def is_untranslated(example: PairExample) -> bool:
    """Whether a text is the marker `NS` (any case), which PAWS-X holds in place of a missing translation.

    Such rows are read and scored like any other, with the label of the file (0, whatever the English row says);
    evaluation shows the accuracy without them beside it.
    """
    return example.text1.upper() == "NS" or example.text2.upper() == "NS"


def _folders(data_dir: str | Path, task: Task) -> list[Path]:
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise DataError(f"data_dir: {data_dir} is not a folder; expected files such as {task.name}/train-en.tsv in it")
    return [folder for folder in (data_dir / task.name, data_dir) if folder.is_dir()]


def _shorten(text: str, length: int = 60) -> str:
    return repr(text if len(text) <= length else text[:length] + "...")
