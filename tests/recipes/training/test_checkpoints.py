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


def test_a_flipped_bit_is_damage_and_the_file_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    checkpoints.mark_complete(folder)
    assert checkpoints.damage(folder) is None
    (folder / "weights").write_bytes(bytes(9) + b"\x01")
    assert checkpoints.damage(folder) == "weights is not as it was written"
    (folder / "weights").unlink()
    assert checkpoints.damage(folder) == "weights is missing"


@pytest.mark.parametrize(
    "manifest",
    [
        b'{"weights": "012',
        b"[]",
        b'["weights"]',
        b"3",
        b"null",
        b'"weights"',
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"weights": 10}',
        b'{"weights": {"bytes": 10}}',
        b'{"weights\\u0000": null}',
        b'{"sub": null}',
        b'{"\\ud800": ""}',
        b"9" * 5000,
    ],
    ids=lambda text: repr(text[:16]),
)
def test_a_manifest_that_is_none_makes_the_folder_incomplete(tmp_path: Path, manifest: bytes) -> None:
    folder = make(tmp_path, 1)
    (folder / checkpoints.MANIFEST).write_bytes(manifest)
    assert checkpoints.damage(folder) is not None


def test_checkpoints_are_ordered_by_step(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        make(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-11").write_text("no folder")
    names = [path.name for path in checkpoints.all_checkpoints(tmp_path)]
    assert names == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]


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
    with pytest.raises(OSError, match="No space left on device"), checkpoints.naming_a_full_disk(tmp_path):
        # safetensors takes its unfinished file away, so much space is left
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=4096))
    with pytest.raises(OSError, match="No space left on device") as full:
        save()
    assert full.value.errno == errno.ENOSPC and full.value.filename == str(tmp_path)
