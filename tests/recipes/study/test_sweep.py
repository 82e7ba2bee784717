"""Sweeps of tiny models: each run once, through kills, shared folders, and faults of every kind."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.run_results import run_results

from ear_ops.data import DataError
from ear_ops.recipes.study import sweep as sweep_module
from ear_ops.recipes.study.report import report
from ear_ops.recipes.study.sweep import StudyError, outline, sweep
from ear_ops.recipes.training import checkpoints, run
from ear_ops.recipes.training.config import TrainConfig
from ear_ops.recipes.training.errors import ConfigError
from ear_ops.recipes.training.folder import RunFolderError, claim, locked

METHODS = {"name": "methods", "table": "1", "grid": {"method": ["finetune", "ear"], "seed": [1, 2]}}

# The command line, standing still in the sixth of eight steps, between two checkpoints.
STUCK = """
import time
from ear_ops.recipes import cli
from ear_ops.recipes.training.pair_trainer import PairTrainer
step = PairTrainer.training_step
def stuck(self, *args, **kwargs):
    time.sleep(600 * (self.state.global_step == 5))
    return step(self, *args, **kwargs)
PairTrainer.training_step = stuck
cli.main()
"""


def outcome(folder: Path) -> tuple[str, list[Any]]:
    """The report, but for its date, and the metrics of every run."""
    report(folder)
    text = re.sub(r"Date: .*", "", (folder / "report.md").read_text())
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*/results.json"))]
    return text, [{k: v for k, v in metrics.items() if k not in ("date", "timing", "versions")} for metrics in results]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for training: a run is its name in this list, a `config.json` and a `results.json`."""
    names: list[str] = []

    def train(config: TrainConfig) -> dict[str, Any]:
        folder = Path(config.output_dir)
        with locked(folder):
            claim(folder, config)
            names.append(folder.name)
            results = run_results(config.to_dict())
            checkpoints.write_json(folder / "results.json", results)
            return results

    monkeypatch.setattr(run, "train", train)
    return names


@pytest.fixture
def trained_with_models(trained: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As `trained`, and each run leaves a model."""
    train = run.train

    def with_model(config: TrainConfig) -> dict[str, Any]:
        results = train(config)
        (Path(config.output_dir) / "model").mkdir()
        checkpoints.mark_complete(Path(config.output_dir) / "model")
        return results

    monkeypatch.setattr(run, "train", with_model)
    return trained


@pytest.mark.full
def test_killed_while_another_process_works_in_the_folder(write_study, tmp_path: Path) -> None:
    """The other process takes over what the killed one began; nothing runs twice, nothing is lost."""
    study = write_study(METHODS, epochs=1)
    sweep(study, tmp_path / "undisturbed")
    command = [sys.executable, "-c", STUCK, "sweep", str(study), "--output-dir", str(tmp_path / "shared")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 300
    while not (begun := list((tmp_path / "shared").glob("*/checkpoints/*/complete.json"))):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)

    def kill(line: str) -> None:
        if "on average" in line and process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()

    progress = sweep(study, tmp_path / "shared", wait=0.2, say=kill)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not progress.failed
    every = [path.parent.name for path in (tmp_path / "undisturbed").glob("*/results.json")]
    assert sorted(progress.finished) == sorted(every) and len(every) == 4
    assert progress.finished[-1] == begun[0].parents[2].name, "it came last: another process was at it"
    resumed = [json.loads(path.read_text())["timing"]["resumed"] for path in tmp_path.glob("shared/*/results.json")]
    assert sum(resumed) == 1, "the run that was killed went on from its checkpoint"
    assert outcome(tmp_path / "shared") == outcome(tmp_path / "undisturbed")
    assert not list((tmp_path / "shared").glob("*/model")) and not list((tmp_path / "shared").glob("*/checkpoints"))

    assert sweep(study, tmp_path / "shared").finished == [], "a finished sweep has nothing to do"


@pytest.mark.full
def test_killed_ten_times_at_random_moments(write_study, tmp_path: Path) -> None:
    study = write_study(METHODS, epochs=2)
    start = time.monotonic()
    sweep(study, tmp_path / "undisturbed")
    longest = (time.monotonic() - start) / 5  # ten of these, of half the length on average, do not reach the end
    server = multiprocessing.get_context("forkserver")  # a process that has imported everything, and forks
    server.set_forkserver_preload(["ear_ops.recipes.study.sweep"])
    rng = random.Random(0)
    written: dict[Path, int] = {}  # when the results of each run were
    for _ in range(10):
        process = server.Process(target=sweep, args=(study, tmp_path / "killed"))
        process.start()
        process.join(longest * rng.random())
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was at work"
        for path in (tmp_path / "killed").glob("*/results.json"):
            assert written.setdefault(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns, "it was run again"
    progress = sweep(study, tmp_path / "killed")
    assert not progress.failed and progress.finished
    assert not {path.parent.name for path in written} & set(progress.finished), "it was run again"
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "undisturbed")
    assert not list((tmp_path / "killed").glob("*/checkpoints"))


def test_groups_share_runs_and_keep_the_models_that_are_wanted(write_study, tmp_path: Path, trained: list[str]) -> None:
    study = write_study(
        {"name": "a", "grid": {"method": ["ear"], "seed": [1, 2]}},
        {"name": "b", "grid": {"method": ["ear"], "beta": [0.1, 0.2]}, "keep_model": True},
    )
    progress = sweep(study, tmp_path / "study", say=lambda line: None)
    assert len(trained) == len(set(trained)) == 3 and progress.finished == trained
    for name in trained:
        (tmp_path / "study" / name / "model").mkdir()
        checkpoints.mark_complete(tmp_path / "study" / name / "model")
    sweep(study, tmp_path / "study")
    kept = [name for name in trained if (tmp_path / "study" / name / "model").exists()]
    assert kept == [trained[0], trained[2]], "seed 1 with beta 0.1 belongs to both groups"


def test_models_that_a_group_behind_a_choice_keeps_are_not_deleted_before_it(
    write_study, tmp_path: Path, trained_with_models: list[str]
) -> None:
    study = write_study(
        {"name": "rate", "grid": {"learning_rate": [0.1, 0.2]}, "select": ["learning_rate"]},
        {"name": "kept", "grid": {"method": ["finetune", "rs-da"]}, "keep_model": True},
        method="finetune",
    )
    sweep(study, tmp_path / "study")
    trained = trained_with_models
    kept = [name for name in trained if (tmp_path / "study" / name / "model").exists()]
    assert len(trained) == 3 and kept == [trained[0], trained[2]], "the best rate's run is one of the group `kept`"


def test_models_that_no_group_behind_a_choice_can_keep_are_deleted(
    write_study, tmp_path: Path, trained_with_models: list[str]
) -> None:
    study = write_study(
        {"name": "early", "grid": {"method": ["ear", "rs-da"], "seed": [1, 2]}},
        {"name": "rate", "grid": {"learning_rate": [0.1, 0.2]}, "select": ["learning_rate"]},
        {"name": "kept", "settings": {"method": "ear"}, "keep_model": True},
        method="finetune",
    )
    sweep(study, tmp_path / "study", groups=["early"])
    kept = [name for name in trained_with_models if (tmp_path / "study" / name / "model").exists()]
    assert len(trained_with_models) == 4 and kept == trained_with_models[:1], "`ear` with seed 1"


def test_a_choice_opens_the_groups_that_wait_for_it(write_study, tmp_path: Path, trained: list[str]) -> None:
    study = write_study(
        {"name": "rate", "grid": {"learning_rate": [0.1, 0.2]}, "select": ["learning_rate"]},
        {"name": "rest", "grid": {"method": ["finetune", "rs-da"]}},
        method="ear",
    )
    sweep(study, tmp_path / "study")
    assert [name.split("-seed")[0] for name in trained] == ["xnli-ear", "xnli-ear", "xnli-finetune", "xnli-rs-da"]


def test_a_group_alone_leaves_the_study_whole(write_study, tmp_path: Path, trained_with_models: list[str]) -> None:
    """Groups that it does not need are not run, and those that want its models find them."""
    trained = trained_with_models
    study = write_study(
        {
            "name": "rate",
            "settings": {"method": "finetune"},
            "grid": {"learning_rate": [0.1, 0.2]},
            "select": ["learning_rate"],
        },
        {
            "name": "noise",
            "settings": {"method": "nt+apt"},
            "grid": {"perturbation": [0.1, 0.3]},
            "select": ["perturbation"],
            "for": {"method": "nt+apt"},
        },
        {"name": "one", "grid": {"method": ["ear", "rs-da"]}},
        {"name": "kept", "settings": {"method": "ear"}, "keep_model": True},
        {"name": "noisy", "settings": {"method": "nt+apt"}},
    )
    sweep(study, tmp_path / "study", groups=["one"])
    methods = [name.split("-seed")[0] for name in trained]
    assert methods == ["xnli-finetune", "xnli-finetune", "xnli-ear", "xnli-rs-da"]
    assert [name for name in trained if (tmp_path / "study" / name / "model").exists()] == [trained[2]]
    assert (tmp_path / "study" / "study.yaml").read_text() == study.read_text()
    with pytest.raises(ConfigError, match="none called two"):
        sweep(study, tmp_path / "study", groups=["two"])
    sweep(study, tmp_path / "study")
    assert len(trained) == len(set(trained)) == 6


def test_a_choice_needs_the_source_language_alone(write_study, tmp_path: Path) -> None:
    study = write_study(
        {
            "name": "rate",
            "settings": {"languages": "en"},
            "grid": {"learning_rate": [1.0e-6, 3.0e-3]},
            "select": ["learning_rate"],
            "for": {"method": "finetune"},
        },
        {"name": "table", "grid": {"method": ["finetune", "rs-da"]}},
        method="finetune",
        epochs=2,
    )
    finished = sweep(study, tmp_path / "study").finished
    every = [json.loads((tmp_path / "study" / name / "results.json").read_text()) for name in finished]
    assert [list(results["languages"]) for results in every] == [["en"], ["en"], ["en", "de", "sw"], ["en", "de", "sw"]]
    assert [results["config"]["learning_rate"] for results in every] == [1.0e-6, 3.0e-3, 3.0e-3, 1.0e-3]
    assert every[1]["best"] == every[2]["best"], "the languages that are scored do not change the training"


def test_a_run_in_other_hands_is_waited_for(
    write_study, tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = write_study(METHODS)

    def interrupted(config: TrainConfig) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "train", interrupted)
        sweep(study, tmp_path / "study")
    first = sweep_module.plan_of(sweep_module.load_study(study), tmp_path / "study").runs[0].name
    held = locked(tmp_path / "study" / first)
    held.__enter__()
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        assert len(trained) == 3 and first not in trained
        held.__exit__(None, None, None)

    monkeypatch.setattr(time, "sleep", sleep)
    said: list[str] = []
    sweep(study, tmp_path / "study", wait=7.0, say=said.append)
    assert waited == [7.0] and trained[3] == first
    assert [first in line for line in said] == [False] * 7 + [True] * 2, "announced when it is begun, and not before"
    assert "waiting" in said[6]


def test_a_folder_that_cannot_be_locked_is_a_failure_and_not_waited_for(
    write_study, tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*args: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", flock)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("nobody holds it"))
    with pytest.raises(OSError, match="not supported"):
        sweep(write_study(METHODS), tmp_path / "study")
    assert not trained


def test_inputs_that_are_not_there_are_named_before_anything_runs(
    write_study, tmp_path: Path, trained: list[str]
) -> None:
    study = write_study(METHODS, synonyms=str(tmp_path / "none.json"))
    said: list[str] = []
    sweep(study, tmp_path / "study", say=said.append)
    assert said[0] == f"{tmp_path / 'none.json'} is not there: 2 runs need it and will fail"
    assert said[1].startswith("[1/4]")


def test_languages_that_have_no_file_are_named_before_anything_runs(
    write_study, tmp_path: Path, data_dir: Path, trained: list[str]
) -> None:
    grid = {"source_language": ["en", "xx"], "languages": ["en,de", "en,yy"]}
    study = write_study({"name": "languages", "settings": {"method": "finetune"}, "grid": grid})
    said = outline(study, tmp_path / "study").splitlines()[-3:]
    sweep(study, tmp_path / "study", say=said.append)
    assert (
        said[:3]
        == said[3:6]
        == [
            f"{data_dir / name} is not there: 2 runs need it and will fail"
            for name in ("dev-yy.tsv", "train-xx.tsv", "dev-xx.tsv")
        ]
    )


def test_inputs_of_finished_runs_may_be_gone_but_not_changed(
    write_study, tmp_path: Path, data_dir: Path, trained: list[str]
) -> None:
    synonyms = tmp_path / "synonyms.json"
    synonyms.write_bytes((data_dir / "synonyms.json").read_bytes())
    study = write_study({"name": "ear", "settings": {"method": "ear"}}, synonyms=str(synonyms))
    sweep(study, tmp_path / "study")
    assert "other contents" not in outline(study, tmp_path / "study")
    synonyms.write_text('{"a0": ["b0"]}')
    said: list[str] = []
    sweep(study, tmp_path / "study", say=said.append)
    assert said == [f"{trained[0]} read other contents of {synonyms}: delete the folder of a run to run it again"]
    synonyms.unlink()
    sweep(study, tmp_path / "study", say=lambda line: pytest.fail(line))
    assert len(trained) == 1


def test_what_there_is_to_run_can_be_asked(write_study, tmp_path: Path, trained: list[str]) -> None:
    study = write_study(
        {"name": "rate", "grid": {"learning_rate": [0.1, 0.2]}, "select": ["learning_rate"]},
        METHODS,
        method="finetune",
    )

    def cells(*groups: str) -> list[list[str]]:
        return [line.split() for line in outline(study, tmp_path / "study", groups).splitlines()[2:]]

    waiting = [["rate", "2", "0"], ["methods", "4", "0", "rate"], ["all,", "each", "once", "5", "0"]]
    assert cells() == waiting, "one of the rates is that of `finetune` with seed 1"
    assert not (tmp_path / "study").exists() and not trained
    sweep(study, tmp_path / "study", groups=["rate"])
    assert cells() == [["rate", "2", "2"], ["methods", "4", "1"], ["all,", "each", "once", "5", "2"]]
    assert cells("rate") == [["rate", "2", "2"], ["all,", "each", "once", "2", "2"]]


def test_a_full_disk_stops_the_sweep_and_loses_nothing(write_study, tmp_path: Path, trained, monkeypatch) -> None:
    study, train = write_study(METHODS), run.train

    def full(config: TrainConfig) -> dict[str, Any]:
        if len(trained) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return train(config)

    with monkeypatch.context() as patch, pytest.raises(StudyError, match=r"No space left on device.*same command"):
        patch.setattr(run, "train", full)
        sweep(study, tmp_path / "study")
    assert len(trained) == 2
    sweep(study, tmp_path / "study")
    assert len(trained) == len(set(trained)) == 4


def test_what_nobody_foresaw_in_one_run_leaves_the_others(
    write_study, tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train = run.train

    def out_of_memory(config: TrainConfig) -> dict[str, Any]:
        if config.method == "finetune" and config.seed == 1:
            raise RuntimeError("CUDA out of memory")
        return train(config)

    monkeypatch.setattr(run, "train", out_of_memory)
    progress = sweep(write_study(METHODS), tmp_path / "study")
    assert list(progress.failed.values()) == ["RuntimeError: CUDA out of memory"] and len(progress.finished) == 3
    assert "in out_of_memory" in caplog.text, "the traceback is for whoever has to find the fault"


def test_a_finished_run_of_other_settings_is_not_taken(write_study, tmp_path: Path, trained: list[str]) -> None:
    """A run has the name that a version with other defaults gave it."""
    study = write_study(METHODS)
    sweep(study, tmp_path / "study")
    path = tmp_path / "study" / trained[0] / "config.json"
    content = json.loads(path.read_text())
    content["config"]["warmup_ratio"] = 0.5
    path.write_text(json.dumps(content))
    message = rf"{trained[0]}.*warmup_ratio: 0.5 there, 0.0 now.*delete it"
    (name, reason), *others = sweep(study, tmp_path / "study").failed.items()
    assert name == trained[0] and re.search(message, reason) and not others
    with pytest.raises(RunFolderError, match=message):
        report(tmp_path / "study")


def test_a_study_that_is_replaced_is_kept_aside(write_study, tmp_path: Path, trained: list[str]) -> None:
    said: list[str] = []
    text = write_study(METHODS).read_text()
    sweep(write_study(METHODS), tmp_path / "study", say=said.append)
    assert not any("another study" in line for line in said)
    sweep(write_study({**METHODS, "name": "renamed"}), tmp_path / "study", say=said.append)
    assert sum("another study" in line for line in said) == 1
    assert (tmp_path / "study" / "study.previous.yaml").read_text() == text
    assert "renamed" in (tmp_path / "study" / "study.yaml").read_text()


def test_a_fault_of_one_run_leaves_the_others(write_study, data_dir: Path, tmp_path: Path) -> None:
    """A wrong label, a language that is missing, a file that cannot be read: named, and the rest is run."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("train-en", "dev-en"):
        (broken / f"{name}.tsv").write_bytes((data_dir / "xnli" / f"{name}.tsv").read_bytes())
    with open(broken / "train-en.tsv", "a") as file:
        file.write("a\tb\tperhaps\n")
    (tmp_path / "unreadable.json").write_bytes(b"\xff\xfe{}")
    study = write_study(
        {"name": "label", "settings": {"data_dir": str(broken)}},
        {"name": "language", "settings": {"languages": "en,fr"}},
        {"name": "file", "settings": {"method": "rs-da", "synonyms": str(tmp_path / "unreadable.json")}},
        {"name": "source", "settings": {"source_language": "de"}},
        {"name": "sound", "grid": {"seed": [2]}},
        method="finetune",
        epochs=1,
    )
    said: list[str] = []
    progress = sweep(study, tmp_path / "study", say=said.append)
    reasons = list(progress.failed.values())
    assert "train-en.tsv:61: unknown label 'perhaps'" in reasons[0]
    assert "in language 'fr'" in reasons[1] and "en, de, sw" in reasons[1]
    assert "unreadable.json: not UTF-8" in reasons[2]
    assert "train-de.tsv" in reasons[3]
    assert len(reasons) == 4 and len(progress.finished) == 1
    assert sum("FAILED" in line for line in said) == 4

    report(tmp_path / "study")
    text = (tmp_path / "study" / "report.md").read_text()
    assert "1 of 5 runs are finished" in text and "(seeds 1)" in text

    lines = (broken / "train-en.tsv").read_text().splitlines(keepends=True)
    (broken / "train-en.tsv").write_text("".join(lines[:60]))
    again = sweep(study, tmp_path / "study")
    assert len(again.finished) == 1 and len(again.failed) == 3


@pytest.mark.parametrize("select", [[], ["beta"]])
def test_a_mistake_in_the_study_shows_before_anything_runs(
    write_study, tmp_path: Path, trained: list[str], select: list[str]
) -> None:
    study = write_study(
        {"name": "a", "grid": {"beta": [0.1, 0.2]}, "select": select}, {"name": "b", "grid": {"method": ["eer"]}}
    )
    with pytest.raises(ConfigError, match="group 'b'"):
        sweep(study, tmp_path / "study")
    assert not trained and not (tmp_path / "study").exists()


def test_a_choice_that_cannot_be_made_ends_with_the_reason(write_study, tmp_path: Path, monkeypatch) -> None:
    def broken(config: TrainConfig) -> None:
        raise DataError("no such file")

    monkeypatch.setattr(run, "train", broken)
    study = write_study({"name": "a", "grid": {"beta": [0.1, 0.2]}, "select": ["beta"]}, {"name": "b"})
    progress = sweep(study, tmp_path / "study")
    assert list(progress.failed.values()) == ["no such file"] * 2
    report(tmp_path / "study")
    text = (tmp_path / "study" / "report.md").read_text()
    assert "Not run: it waits for the choice of `a`." in text


def test_a_folder_without_a_study_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="holds no study"):
        report(tmp_path)
