"""Parallel sentences as in Tatoeba (Artetxe and Schwenk, 2019): a file `XX-en.tsv` a language, sentence TAB English."""

from __future__ import annotations

import re
from pathlib import Path

from ear_ops.data.pairs import DataError, read_rows

_NAME = re.compile(r"([^.-]+)-en\.tsv(\.gz)?")


def load_parallel(folder: str | Path, limit: int | None = None) -> dict[str, list[tuple[str, str]]]:
    """Read every `XX-en.tsv` or `.tsv.gz` of a folder: (sentence, English) by language, languages by name.

    Args:
        limit: the first so many lines of each file; all by default.

    Raises:
        DataError: no folder, no such file in it, or a file that is not two columns of UTF-8.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected files such as de-en.tsv in it")
    files = {match[1]: path for path in sorted(folder.iterdir()) if (match := _NAME.fullmatch(path.name))}
    if not files:
        raise DataError(f"{folder}: no parallel sentences; expected files such as de-en.tsv (sentence TAB English)")
    return {
        language: [(row[0], row[1]) for _, row in read_rows(path, ("sentence", "English"))][:limit]
        for language, path in files.items()
    }
