from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from ear_ops.recipes.training import checkpoints


def make(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "sub").mkdir(parents=True)
    (path / "weights").write_bytes(bytes(10))
    (path / "sub" / "state").write_bytes(bytes(5))
    return path


def test_a_folder_is_complete_only_with_its_manifest_and_all_its_bytes(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    assert not checkpoints.is_complete(folder)
    checkpoints.mark_complete(folder)
    assert checkpoints.is_complete(folder)
    (folder / "sub" / "state").write_bytes(bytes(4))
    assert not checkpoints.is_complete(folder)
    (folder / "sub" / "state").unlink()
    assert not checkpoints.is_complete(folder)


def test_a_torn_manifest_does_not_count(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    checkpoints.mark_complete(folder)
    manifest = folder / checkpoints.MANIFEST
    manifest.write_text(manifest.read_text()[:-5])
    assert not checkpoints.is_complete(folder)


def test_checkpoints_are_ordered_by_step_and_unfinished_ones_removed(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        checkpoints.mark_complete(make(tmp_path, step))
    unfinished = make(tmp_path, 200)
    (tmp_path / "checkpoint-best").mkdir()
    assert [path.name for path in checkpoints.complete_checkpoints(tmp_path)] == [
        "checkpoint-9",
        "checkpoint-10",
        "checkpoint-100",
    ]
    assert checkpoints.remove_incomplete(tmp_path) == [unfinished]
    assert not unfinished.exists() and (tmp_path / "checkpoint-100").exists()


def test_a_deletion_cut_short_leaves_an_incomplete_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path, 1)
    checkpoints.mark_complete(folder)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.remove(folder)
    assert (folder / "weights").exists() and not checkpoints.is_complete(folder)


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    checkpoints.write_json(path, {"accuracy": 0.1 + 0.2})

    def full(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoints.write_json(path, {"accuracy": 1})
    assert "0.30000000000000004" in path.read_text()


def test_a_full_disk_is_named_where_a_library_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save() -> None:
        with checkpoints.naming_a_full_disk(tmp_path):
            raise RuntimeError("enforce fail at inline_container: unexpected pos 20544 vs 20432")

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=2**30))
    with pytest.raises(RuntimeError, match="unexpected pos"):
        save()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=4096))
    with pytest.raises(OSError, match="No space left on device") as full:
        save()
    assert full.value.errno == errno.ENOSPC and full.value.filename == str(tmp_path)
