"""Folders that are either complete or not there: a manifest, written last, says that every file has arrived.

A process may die at any instruction (`kill -9`, power, a full disk). What it was writing then has no manifest and is
thrown away by the next start; what has one can be trusted.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "complete.json"
_STEP = re.compile(r"checkpoint-(\d+)")


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part, also after a crash."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def naming_a_full_disk(folder: Path) -> Iterator[None]:
    """Torch and safetensors say of a full disk only that a file came out too short: inside, it is named.

    Raises:
        OSError: ENOSPC, in place of another error on a disk with less than a megabyte left.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if folder.exists() and shutil.disk_usage(folder).free < 2**20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise


def mark_complete(folder: Path) -> None:
    """Declare all files of `folder` written: flush them to disk, then put the manifest beside them."""
    sizes = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        _sync(path)
        sizes[str(path.relative_to(folder))] = path.stat().st_size
    write_json(folder / MANIFEST, sizes)


def is_complete(folder: Path) -> bool:
    """Whether the manifest is there and every file that it lists has the size it had."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete `checkpoint-N` folders under `folder`, oldest first."""
    return [path for path in _checkpoints(folder) if is_complete(path)]


def remove_incomplete(folder: Path) -> list[Path]:
    """Delete the `checkpoint-N` folders that a dead process left unfinished; returns them."""
    unfinished = [path for path in _checkpoints(folder) if not is_complete(path)]
    for path in unfinished:
        remove(path)
    return unfinished


def remove(folder: Path) -> None:
    """Delete a folder. The manifest goes first: a deletion that is cut short leaves an incomplete folder."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _checkpoints(folder: Path) -> list[Path]:
    matches = [(_STEP.fullmatch(path.name), path) for path in folder.glob("checkpoint-*") if path.is_dir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
