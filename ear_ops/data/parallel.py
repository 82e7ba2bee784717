"""Read parallel sentences as Tatoeba has them (Artetxe and Schwenk, 2019).

Each language has a file `XX-en.tsv`, whose lines are sentence TAB English.
"""

from __future__ import annotations

import re
from pathlib import Path

from ear_ops.data.pairs import DataError, read_rows

_NAME = re.compile(r"([^.-]+)-en\.tsv(\.gz)?")


def load_parallel(folder: str | Path, limit: int | None = None) -> dict[str, list[tuple[str, str]]]:
    """Read every `XX-en.tsv` or `XX-en.tsv.gz` of a folder.

    Args:
        folder: the folder of the files.
        limit: how many lines of each file to return. None returns all of them.

    Returns:
        The pairs (sentence, English) of each language. The languages are in alphabetical order.

    Raises:
        DataError: the folder is missing or holds no such file, or a file is not UTF-8 with two columns.
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
