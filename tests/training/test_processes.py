"""`ear-ops train` in two processes: the steps of one process, results written once, resumed, stopped by mistakes."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch without gloo", allow_module_level=True)

from support import training_workers, two_processes

from ear_ops.training import processes, run


@pytest.fixture
def settings(make_config, tiny_model: Path, data_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """Of a run of 8 steps without dropout, on 64 pairs, so that each step has 8; `equations` does not depend on how
    many tokens each process counts."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps(config))
    data = shutil.copytree(data_dir, tmp_path / "data")
    train = data / "xnli" / "train-en.tsv"
    lines = train.read_text().splitlines(keepends=True)
    train.write_text("".join([*lines, *lines[:4]]))
    return asdict(
        make_config(
            model=str(model), data_dir=str(data), epochs=1, preset="equations", reduction="equations", beta=0.01
        )
    )


def comparable(results: dict[str, Any]) -> dict[str, Any]:
    return {name: results[name] for name in ("languages", "best", "steps", "replaced", "notices")}


def test_two_processes_take_the_steps_of_one_and_write_once(settings, tmp_path: Path) -> None:
    alone = run.train(run.TrainConfig(**{**settings, "output_dir": str(tmp_path / "alone")}))
    together = {**settings, "output_dir": str(tmp_path / "together")}
    outcomes = two_processes.run(training_workers.train, tmp_path, together, 6)
    assert outcomes == ["killed", "killed"] and (tmp_path / "together" / "checkpoints" / "checkpoint-4").exists()
    first, second = two_processes.run(training_workers.train, tmp_path, together)
    assert first == second == json.loads((tmp_path / "together" / "results.json").read_text())
    assert first["timing"]["resumed"] and first["versions"]["processes"] == "2"
    assert comparable(first) == comparable(alone)
    assert first["terms"] == pytest.approx(alone["terms"], rel=1e-3)
    names = [sorted(path.name for path in (tmp_path / each).iterdir()) for each in ("alone", "together")]
    assert names[0] == names[1]


def test_mistakes_stop_all_processes(settings, tmp_path: Path) -> None:
    odd = two_processes.run(training_workers.train, tmp_path, {**settings, "batch_size": 7})
    assert odd[0] == odd[1] and odd[0][0] == "ConfigError" and "expected a multiple of 2, got 7" in odd[0][1]
    other = two_processes.run(training_workers.train, tmp_path, settings)
    assert other[0] == other[1] and other[0][0] == "RunFolderError", "batch_size: 7 there, 8 now"


def test_one_process_needs_no_others() -> None:
    assert processes.on_main(lambda: 7) == 7 and processes.gather({"a": 1}) == {"a": 1}
