"""A run may die anywhere: started again, it ends with the metrics of a run that nobody disturbed, to the last digit."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerState

from ear_ops.recipes.training import checkpoints, run, scoring, stages
from ear_ops.recipes.training.config import TrainConfig
from ear_ops.recipes.training.folder import RunFolderError
from ear_ops.recipes.training.pair_trainer import PairTrainer


class Killed(BaseException):
    """Stands in for the end of the process: nothing catches it."""


def outcome(config: TrainConfig) -> dict[str, Any]:
    """Train, and return everything that must not depend on interruptions: results, log, predictions, weights."""
    results = {k: v for k, v in run.train(config).items() if k not in ("date", "timing", "versions")}
    folder = Path(config.output_dir)
    log = json.loads((folder / "training.json").read_text())["log"]
    log = [line for line in log if "train_runtime" not in line]  # of the last session alone
    log = [{k: v for k, v in line.items() if not k.endswith(("runtime", "_per_second", "_time"))} for line in log]
    predictions = json.loads((folder / "predictions.json").read_text())
    weights = hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()
    return {"results": results, "log": log, "predictions": predictions, "weights": weights}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Outcomes by method, each made when first asked for."""
    return {"folder": tmp_path_factory.mktemp("undisturbed")}


def expect(undisturbed: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    if config.method not in undisturbed:
        folder = undisturbed["folder"] / config.method
        undisturbed[config.method] = outcome(TrainConfig.from_dict(config.to_dict(), output_dir=str(folder)))
    return undisturbed[config.method]


def die(*args: Any, **kwargs: Any) -> None:
    raise Killed


def die_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    training_step = PairTrainer.training_step

    def dying(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise Killed
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(PairTrainer, "training_step", dying)


def die_when_marking(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Die when the folder `name` is about to be declared complete, with its weights half written."""
    mark_complete = checkpoints.mark_complete

    def dying(folder: Path) -> None:
        if folder.name == name:
            weights = folder / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:100])
            raise Killed
        mark_complete(folder)

    monkeypatch.setattr(checkpoints, "mark_complete", dying)


# Checkpoints are at 4, 8 (end of the first epoch), 12 and 16; the log is written every third step.
@pytest.mark.parametrize(
    ("method", "step", "resumed"),
    [
        ("ear", 2, None),
        ("ear", 7, 4),
        ("ear", 8, 8),
        ("finetune", 14, 12),
        ("rs-rp", 7, 4),
        ("adv", 7, 4),
        ("nt+apt", 7, 4),
    ],
)
def test_an_interrupted_run_ends_like_an_undisturbed_one(
    make_config, undisturbed, monkeypatch: pytest.MonkeyPatch, capsys, method: str, step: int, resumed: int | None
) -> None:
    config = make_config(method=method)
    expected = expect(undisturbed, config)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, step)
        run.train(config)
    capsys.readouterr()
    assert outcome(config) == expected
    output = capsys.readouterr().out
    assert (f"Resuming from checkpoint-{resumed}." in output) if resumed else ("Resuming" not in output)


def test_a_run_killed_again_and_again_arrives(make_config, undisturbed, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(method="ear")
    expected = expect(undisturbed, config)
    for step in (6, 9, 15):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die_at(patch, step)
            run.train(config)
    assert outcome(config) == expected


@pytest.mark.parametrize(
    ("name", "resumed"), [("checkpoint-4", None), ("checkpoint-16", "checkpoint-12"), ("model", "checkpoint-16")]
)
def test_a_half_written_folder_is_not_used(
    make_config, undisturbed, monkeypatch: pytest.MonkeyPatch, capsys, name: str, resumed: str | None
) -> None:
    config = make_config(method="ear")
    expected = expect(undisturbed, config)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_when_marking(patch, name)
        run.train(config)
    capsys.readouterr()
    assert outcome(config) == expected
    output = capsys.readouterr().out
    used = f"{name} is not used" if name != "model" else "The saved model is not used"
    assert f"{used}: complete.json, which is written last, is missing." in output
    assert (f"Resuming from {resumed}." in output) if resumed else ("Resuming" not in output)


@pytest.mark.parametrize("function", ["predict", "results_markdown"])
def test_a_run_killed_while_it_is_scored_is_not_trained_again(
    make_config, undisturbed, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    config = make_config(method="ear")
    expected = expect(undisturbed, config)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(scoring, function, die)
        run.train(config)
    with monkeypatch.context() as patch:
        patch.setattr(run, "_fit", lambda *arguments: pytest.fail("trained again"))
        assert outcome(config) == expected


def test_a_full_disk_stops_the_run_and_loses_nothing(make_config, undisturbed, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(method="ear")
    expected = expect(undisturbed, config)
    save = PairTrainer._save_optimizer_and_scheduler

    def full(self: Any, folder: str) -> None:
        if self.state.global_step == 12:
            raise OSError(28, "No space left on device")
        save(self, folder)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(PairTrainer, "_save_optimizer_and_scheduler", full)
        run.train(config)
    complete = filter(checkpoints.is_complete, checkpoints.all_checkpoints(Path(config.output_dir) / "checkpoints"))
    assert [path.name for path in complete][-1] == "checkpoint-8"
    assert outcome(config) == expected


@pytest.fixture
def best_at_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """The accuracy on dev is highest at step 4 of 16."""
    on_dev = {4: 0.9, 8: 0.2, 12: 0.4, 16: 0.3}
    evaluate = PairTrainer.evaluate

    def fake(self: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        return {**evaluate(self, *args, **kwargs), "eval_accuracy": on_dev[self.state.global_step]}

    monkeypatch.setattr(PairTrainer, "evaluate", fake)


@pytest.mark.usefixtures("best_at_4")
def test_the_best_checkpoint_survives_an_interruption_and_a_move(
    make_config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = outcome(make_config(output_dir=str(tmp_path / "undisturbed")))
    assert expected["results"]["best"] == {"step": 4, "dev_accuracy": 0.9}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_when_marking(patch, "model")
        run.train(make_config())
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert sorted(kept) == ["checkpoint-16", "checkpoint-4"], "the newest and the best, no others"
    (tmp_path / "run").rename(tmp_path / "moved")
    assert outcome(make_config(output_dir=str(tmp_path / "moved"))) == expected


def truncate(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])


def flip_a_bit(checkpoint: Path) -> None:
    weights = bytearray((checkpoint / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(weights)


def forget_the_manifest(checkpoint: Path) -> None:
    (checkpoint / checkpoints.MANIFEST).unlink()


@pytest.fixture
def died_behind_its_best(
    make_config, undisturbed, monkeypatch: pytest.MonkeyPatch, best_at_4: None
) -> tuple[TrainConfig, dict[str, Any]]:
    """A run that died behind step 12, with the best checkpoint at step 4; and the outcome of an undisturbed run."""
    if "best at 4" not in undisturbed:
        config = make_config(method="finetune", output_dir=str(undisturbed["folder"] / "best at 4"))
        undisturbed["best at 4"] = outcome(config)
    config = make_config(method="finetune")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 14)
        run.train(config)
    return config, undisturbed["best at 4"]


@pytest.mark.parametrize("lose", [truncate, flip_a_bit, forget_the_manifest, checkpoints.remove])
def test_a_run_without_its_best_checkpoint_is_trained_again(
    died_behind_its_best, capsys, lose: Callable[[Path], None]
) -> None:
    config, expected = died_behind_its_best
    lose(Path(config.output_dir) / "checkpoints" / "checkpoint-4")
    capsys.readouterr()
    assert outcome(config) == expected
    output = capsys.readouterr().out
    assert "checkpoint-12 is not used: checkpoint-4, the best until then, is lost." in output
    assert "Resuming" not in output


def test_an_edited_state_of_the_trainer_is_not_trusted(died_behind_its_best) -> None:
    config, expected = died_behind_its_best
    state = Path(config.output_dir) / "checkpoints" / "checkpoint-12" / "trainer_state.json"
    edited = state.read_text().replace('"best_metric": 0.9', '"best_metric": 0.1')
    assert edited != state.read_text()
    state.write_text(edited)
    assert outcome(config) == expected


@pytest.mark.parametrize(
    ("best", "lost", "resumed"),
    [
        ({4: 4, 8: 4}, None, 8),
        ({4: 4, 8: 4}, 8, 4),
        ({4: 4, 8: 4, 12: 4}, 4, None),
        ({4: 4, 8: 8, 12: 8}, 8, 4),
        ({4: 4, 8: 4, 12: 12}, 4, 12),
        ({4: 4, 8: 4, 12: 12}, 12, 8),
    ],
)
def test_the_newest_checkpoint_with_its_best_is_resumed(
    tmp_path: Path, best: dict[int, int], lost: int | None, resumed: int | None
) -> None:
    """`best` gives the best step until each checkpoint. No checkpoint that is newer stays behind."""
    for step, best_step in best.items():
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        TrainerState(best_global_step=best_step).save_to_json(str(folder / "trainer_state.json"))
        checkpoints.mark_complete(folder)
    if lost is not None:
        (tmp_path / f"checkpoint-{lost}" / "trainer_state.json").unlink()
    path = stages._checkpoint_to_resume(tmp_path)
    assert path == (None if resumed is None else str(tmp_path / f"checkpoint-{resumed}"))
    left = [int(folder.name.partition("-")[2]) for folder in checkpoints.all_checkpoints(tmp_path)]
    assert left == [step for step in best if step != lost and resumed is not None and step <= resumed]


@pytest.mark.usefixtures("best_at_4")
@pytest.mark.parametrize("lose", [flip_a_bit, checkpoints.remove])
def test_a_best_checkpoint_that_is_lost_while_the_run_trains_stops_it(
    make_config, monkeypatch: pytest.MonkeyPatch, lose: Callable[[Path], None]
) -> None:
    config = make_config(method="finetune")
    folder = Path(config.output_dir)
    training_step = PairTrainer.training_step

    def losing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 14:
            lose(folder / "checkpoints" / "checkpoint-4")
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(PairTrainer, "training_step", losing)
    with pytest.raises(checkpoints.DamagedCheckpointError, match=r"checkpoint-4, the best checkpoint, was lost"):
        run.train(config)
    assert not (folder / "model").exists() and not (folder / "results.json").exists()


def test_a_damaged_model_is_trained_again(make_config, undisturbed, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    config = make_config(method="finetune")
    expected = expect(undisturbed, config)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(scoring, "predict", die)
        run.train(config)
    flip_a_bit(Path(config.output_dir) / "model")
    capsys.readouterr()
    assert outcome(config) == expected
    assert "The saved model is not used: model.safetensors is not as it was written." in capsys.readouterr().out


# The command line, with steps that leave time to kill it.
SLOW_TRAINING = """
import time
from ear_ops.recipes import cli
from ear_ops.recipes.training.pair_trainer import PairTrainer
step = PairTrainer.training_step
PairTrainer.training_step = lambda *args, **kwargs: (time.sleep(0.05), step(*args, **kwargs))[1]
cli.main()
"""


def test_kill_9(make_config, tmp_path: Path) -> None:
    config = make_config(method="ear", epochs=4)
    expected = outcome(make_config(method="ear", epochs=4, output_dir=str(tmp_path / "undisturbed")))
    arguments = [
        argument
        for name, value in {**config.to_dict(), "output_dir": config.output_dir}.items()
        if value is not None and value is not False
        for argument in (f"--{name.replace('_', '-')}", str(value))
    ]
    command = [sys.executable, "-c", SLOW_TRAINING, "train", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    folder = Path(config.output_dir) / "checkpoints"
    deadline = time.monotonic() + 300
    while not (folder / "checkpoint-8" / checkpoints.MANIFEST).exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0].decode()
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (Path(config.output_dir) / "model").exists(), "it was killed while training"
    assert outcome(config) == expected
    assert run.train(config)["timing"]["resumed"]


class _Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("executed",))


def test_a_file_of_a_checkpoint_that_cannot_be_read_is_named(
    make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(method="finetune", epochs=1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 5)
        run.train(config)
    monkeypatch.chdir(tmp_path)
    checkpoint = Path(config.output_dir) / "checkpoints" / "checkpoint-4"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "trainer_state.json"):
        whole = (checkpoint / name).read_bytes()
        torch.save({"state": _Malicious()}, checkpoint / name)
        checkpoints.mark_complete(checkpoint)
        with pytest.raises(RunFolderError, match=r"checkpoint-4: a file of this checkpoint is damaged or") as error:
            run.train(config)
        assert "\n" not in str(error.value) and not (tmp_path / "executed").exists()
        (checkpoint / name).write_bytes(whole)
