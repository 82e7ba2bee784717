"""Tiny runs and studies of tiny runs, a second or two each."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("accelerate", reason="the training script and studies need the extra `train`")

from support.tiny_task import write_data

from ear_ops.recipes.training import checkpoints
from ear_ops.recipes.training.config import TrainConfig


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """What survives a power cut cannot be tested here, and waiting for the disk is most of a tiny run."""
    monkeypatch.setattr(checkpoints, "_sync", lambda path: None)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def make_config(tiny_model: Path, data_dir: Path, tmp_path: Path):
    """A configuration of a run of 16 steps (2 epochs of 8 steps) in a second or two."""

    def make(**changes: object) -> TrainConfig:
        settings: dict[str, object] = {
            "model": str(tiny_model),
            "data_dir": str(data_dir),
            "synonyms": str(data_dir / "synonyms.json"),
            "output_dir": str(tmp_path / "run"),
            "layer": 1,
            "max_length": 24,
            "batch_size": 8,
            "epochs": 2,
            "evaluations_per_epoch": 2,
            "learning_rate": 1e-3,
            "logging_steps": 3,
        }
        return TrainConfig(**{**settings, **changes})

    return make


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `finished` keeps the run that it copies."""
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def finished(make_config, finished_once: Path, tmp_path: Path) -> TrainConfig:
    """A finished run of `ear` in a folder of the test's own. It is trained once in a session."""
    from ear_ops.recipes.training import run

    if not (finished_once / "run").exists():
        run.train(make_config(output_dir=str(finished_once / "run")))
    shutil.copytree(finished_once / "run", tmp_path / "run")
    return make_config()


@pytest.fixture
def write_study(tiny_model: Path, data_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a study with these groups; `base` overrides what its runs share."""

    def write(*groups: dict[str, Any], **base: Any) -> Path:
        shared = {
            "model": str(tiny_model),
            "data_dir": str(data_dir),
            "synonyms": str(data_dir / "synonyms.json"),
            "layer": 1,
            "max_length": 24,
            "batch_size": 8,
            "evaluations_per_epoch": 2,
            "learning_rate": 1.0e-3,
        }
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({"base": {**shared, **base}, "groups": list(groups)}, sort_keys=False))
        return path

    return write
