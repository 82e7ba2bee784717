"""A tiny model and its task, and runs of a second or two."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="the training script needs the extra `train`")

from support.tiny_task import save_tiny_model, write_data

from ear_ops.training import checkpoints
from ear_ops.training.config import TrainConfig


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """What survives a power cut cannot be tested here, and waiting for the disk is most of a tiny run."""
    monkeypatch.setattr(checkpoints, "_sync", lambda path: None)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


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
