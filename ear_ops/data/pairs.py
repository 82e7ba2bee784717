"""Read sentence pairs from files in the XTREME layout: `{split}-{language}.tsv`, text1 TAB text2 TAB label.

The files are plain TSV. Nothing is quoted, so a `"` is a character like any other. Only a line feed ends a line, so a
text may hold a form feed or U+2028. Every line becomes an example or raises an error.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ear_ops.data.tasks import TASKS, Task
from ear_ops.errors import EarOpsError, shown

_SUFFIXES = (".tsv", ".tsv.gz")
_COLUMNS = ("text1", "text2", "label")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UNTRANSLATED = "because a text is empty or the marker NS in place of its translation"  # why training leaves a pair out
_HEADER_WORDS = {"premise", "hypothesis", "hypo", "sentence1", "sentence2", "label", "gold_label"}


class DataError(EarOpsError, ValueError):
    """A data file is missing or has a wrong content. The message names the file, and the line where there is one."""


class PairExample(NamedTuple):
    """A sentence pair and its class index: premise and hypothesis in XNLI, two sentences in PAWS-X."""

    text1: str
    text2: str
    label: int


def read_rows(path: str | Path, columns: tuple[str, ...], optional: int = 0) -> Iterator[tuple[int, list[str]]]:
    """Yield the number, from 1, and the fields of every line of a tab-separated file.

    A line ends with LF or CRLF, and a byte order mark is skipped. The fields are otherwise unchanged.

    Args:
        path: the file, in UTF-8. It is gzipped if its name ends in `.gz`.
        columns: the names of the columns. The message about a wrong number of fields shows them.
        optional: how many of the last columns a line may lack.

    Raises:
        DataError: the file is missing, empty, damaged or not UTF-8, or a line has a wrong number of fields.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    accepted = range(len(columns) - optional, len(columns) + 1)
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, start=1):  # a binary file is split at b"\n" only
                if number == 1:
                    raw = raw.removeprefix(_BYTE_ORDER_MARK)
                try:
                    line = raw.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}:{number}: not UTF-8: {error}") from None
                fields = line.split("\t")
                if len(fields) not in accepted:
                    hints = _columns_hint(fields, columns) + _header_hint(number, fields)
                    raise DataError(
                        f"{path}:{number}: expected {' or '.join(map(str, accepted))} tab-separated columns "
                        f"({', '.join(columns)}), got {len(fields)}: {shown(line)}{hints}"
                    )
                yield number, fields
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}:{number + 1}: damaged gzip file: {error}") from None
    if number == 0:
        raise DataError(f"{path}: the file is empty")


def parse_label(path: str | Path, number: int, label: str, task: Task) -> int:
    """Return the class index of the label on line `number` of `path`.

    Raises:
        DataError: the label is empty, or the task does not have it. The message names the file and the line. It
            also names another task that has the label, or what else the label may be.
    """
    if not label:
        raise DataError(f"{path}:{number}: the label is empty; {task.name} has {', '.join(map(repr, task.labels))}")
    try:
        return task.label_id(label)
    except ValueError as error:
        hints = [f"; the labels of {name} have it: --task {name}" for name in TASKS if label in TASKS[name].labels]
        if label == "contradictory" and "contradiction" in task.labels:
            hints.append(
                "; the machine-translated files of XNLI spell 'contradiction' like this: replace it in the last column"
            )
        raise DataError(f"{path}:{number}: {error}{''.join(hints)}{_header_hint(number, [label])}") from None


def read_pairs(path: str | Path, task: Task) -> list[PairExample]:
    """Read one file of `text1 TAB text2 TAB label` lines, in order.

    Raises:
        DataError: `read_rows` raises it, a label is empty, or the task does not have a label.
    """
    return [
        PairExample(text1, text2, parse_label(path, number, label, task))
        for number, (text1, text2, label) in read_rows(path, _COLUMNS)
    ]


def load_split(data_dir: str | Path, task: Task, split: str, language: str) -> list[PairExample]:
    """Read `{split}-{language}.tsv` or `.tsv.gz` from `data_dir/{task.name}`, else from `data_dir` itself.

    Args:
        data_dir: the folder of the task's files, or the folder that holds a folder named like the task.
        task: defines the labels.
        split: `train`, `dev` or `test` in the XTREME layout.
        language: any language code that has a file.

    Raises:
        DataError: `data_dir` is not a folder, the file is missing, or `read_pairs` raises it. The message about a
            missing file names the paths that were tried, and the languages of the split.
    """
    return read_pairs(find_split(data_dir, task, split, language), task)


def load_texts(data_dir: str | Path, task: Task, split: str, language: str) -> Iterator[tuple[str, str]]:
    """Yield the texts of the file that `load_split` reads. A line may lack its label, and any label is accepted.

    Raises:
        DataError: `load_split` would raise it for another reason than a label.
    """
    for _, (text1, text2, *_) in read_rows(find_split(data_dir, task, split, language), _COLUMNS, optional=1):
        yield text1, text2


def find_split(data_dir: str | Path, task: Task, split: str, language: str) -> Path:
    """Return the path of the file that `load_split` reads, and raise DataError where it does not exist."""
    candidates = [folder / f"{split}-{language}{suffix}" for folder in _folders(data_dir, task) for suffix in _SUFFIXES]
    for path in candidates:
        if path.is_file():
            return path
    present = ", ".join(available_languages(data_dir, task, split)) or "none"
    tables = sorted(str(path) for folder in _folders(data_dir, task) for path in folder.glob(f"{split}*.csv"))
    hint = f"; {tables[0]} is a CSV: docs/data.md shows how to turn it into such a file" if tables else ""
    raise DataError(
        f"no {split} data of {task.name} in language {language!r}: looked for {', '.join(map(str, candidates))}; "
        f"languages present in split {split!r}: {present}{hint}"
    )


def available_languages(data_dir: str | Path, task: Task, split: str) -> list[str]:
    """Return the languages for which `load_split` finds a file.

    The languages of the task come first, in its order. Other languages follow in alphabetical order.

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
    present = {match[1] for match in matches if match}
    known = [language for language in task.languages if language in present]
    return known + sorted(present.difference(known))


def is_untranslated(example: PairExample) -> bool:
    """Return whether a translation is missing: a text is empty, or it is the marker `NS` in any case.

    PAWS-X has the marker in its dev and test files, and empty texts in its machine-translated training files. Their
    label in the file is 0, whatever the English example has. The reader keeps such examples. The evaluation counts
    them, and shows the accuracy without them too. The training leaves them out.
    """
    return any(text.strip().upper() in ("", "NS") for text in (example.text1, example.text2))


def _folders(data_dir: str | Path, task: Task) -> list[Path]:
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise DataError(f"data_dir: {data_dir} is not a folder; expected files such as {task.name}/train-en.tsv in it")
    return [folder for folder in (data_dir / task.name, data_dir) if folder.is_dir()]


def _columns_hint(fields: list[str], columns: tuple[str, ...]) -> str:
    """The hint that a line with a wrong number of fields is of a CSV, or has an id before the texts."""
    if len(fields) == 1 and fields[0].count(",") + 1 >= len(columns):
        return "; the line has commas: docs/data.md shows how to turn a CSV into such a file"
    if len(fields) == len(columns) + 1 and fields[0].strip().isdigit():
        return "; the first column looks like an id, which these files do not have: delete it"
    return ""


def _header_hint(number: int, fields: list[str]) -> str:
    """The hint that a wrong first line is a header, where a field is a usual name of a column."""
    if number > 1 or _HEADER_WORDS.isdisjoint(field.strip().lower() for field in fields):
        return ""
    return "; the line looks like a header, which these files do not have: delete it"
