"""Folders that show whether they are complete: a manifest, written last, lists every file with its size.

A process may die at any instruction, by `kill -9`, a power cut or a full disk. The folder that it was writing then has
no manifest, and the next start deletes it.
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
    """Write a file so that a reader sees the old or the new content and never a part of it, also after a crash."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, by `write_atomically`."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def naming_a_full_disk(folder: Path) -> Iterator[None]:
    """Replace the errors by which torch and safetensors report a full disk: they only say that a file is too short.

    Raises:
        OSError: ENOSPC, in place of any other error while the disk has less than a megabyte left.
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
    """Flush all files of the folder to disk, then write the manifest, which makes the folder complete."""
    sizes = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        _sync(path)
        sizes[str(path.relative_to(folder))] = path.stat().st_size
    write_json(folder / MANIFEST, sizes)


def is_complete(folder: Path) -> bool:
    """Whether the folder has a manifest, and every file in it has the size that it lists."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete `checkpoint-N` folders under `folder`, oldest first."""
    return [path for path in _checkpoints(folder) if is_complete(path)]


def remove_incomplete(folder: Path) -> list[Path]:
    """Delete the incomplete `checkpoint-N` folders, which a process left that died, and return their paths."""
    unfinished = [path for path in _checkpoints(folder) if not is_complete(path)]
    for path in unfinished:
        remove(path)
    return unfinished


def remove(folder: Path) -> None:
    """Delete a folder. The manifest is deleted first, so an interrupted deletion leaves an incomplete folder."""
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
