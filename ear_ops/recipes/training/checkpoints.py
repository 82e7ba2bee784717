"""Folders that show whether they are complete: a manifest, written last, lists the SHA-256 digest of every file.

A process may die at any instruction, by `kill -9`, a power cut or a full disk. The folder that it was writing then has
no manifest, and the next start deletes it. A file that changed since has another digest than the manifest lists.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ear_ops.errors import EarOpsError

MANIFEST = "complete.json"
_STEP = re.compile(r"checkpoint-(\d+)")
_BLOCK = 2**20  # bytes of a file that are in memory at once


class DamagedCheckpointError(EarOpsError, RuntimeError):
    """A checkpoint that the run needs is not as it was written. The same call trains from another state."""


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
    """Replace the errors by which torch and safetensors report a full disk, which are of other types.

    safetensors has the text of the system in its error, and removes what it has written. torch only says that a file is
    too short, and leaves the file.

    Raises:
        OSError: ENOSPC, in place of an error with that text, and of any other while less than a megabyte is left.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        full = os.strerror(errno.ENOSPC) in str(error)
        if full or (folder.exists() and shutil.disk_usage(folder).free < 2**20):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise


def digest_of(path: Path) -> str:
    """The SHA-256 digest of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def mark_complete(folder: Path) -> None:
    """Flush all files of the folder to disk, then write the manifest, which makes the folder complete."""
    digests = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        _sync(path)
        digests[str(path.relative_to(folder))] = digest_of(path)
    write_json(folder / MANIFEST, digests)
    _sync(folder.parent)  # which holds the name of the folder


def damage(folder: Path) -> str | None:
    """What keeps the folder from being complete, such as a file that is missing; None for a complete folder.

    Every file is read for this.
    """
    if not os.path.isfile(folder / MANIFEST):
        return f"{MANIFEST}, which is written last, is missing"
    try:
        digests = json.loads((folder / MANIFEST).read_bytes())
    except (ValueError, RecursionError):
        digests = None
    if not isinstance(digests, dict):
        return f"{MANIFEST} is not as it was written"
    for name, digest in digests.items():
        if not os.path.isfile(folder / name):
            return f"{name} is missing"
        if digest_of(folder / name) != digest:
            return f"{name} is not as it was written"
    return None


def is_complete(folder: Path) -> bool:
    """Whether the folder has a manifest, and every file is as the manifest lists it. Every file is read for this."""
    return damage(folder) is None


def all_checkpoints(folder: Path) -> list[Path]:
    """The `checkpoint-N` folders under `folder`, complete or not, oldest first."""
    matches = [(_STEP.fullmatch(path.name), path) for path in folder.glob("checkpoint-*") if path.is_dir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]


def remove(folder: Path) -> None:
    """Delete a folder. The manifest is deleted first, so an interrupted deletion leaves an incomplete folder."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _sync(path: Path) -> None:
    if os.name == "nt":  # Windows flushes neither folders nor what is open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
