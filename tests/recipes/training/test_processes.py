"""`ear-ops train` in two processes: the steps of one process, results written once, resumed, stopped by mistakes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch without gloo", allow_module_level=True)

from support import training_workers, two_processes

from ear_ops.recipes.training import processes, run
from ear_ops.recipes.training.errors import ConfigError

QUICK = {"evaluations_per_epoch": 1, "languages": "en,de"}


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


def steps_of(folder: Path) -> list[dict[str, float]]:
    return [line for line in json.loads((folder / "training.json").read_text())["log"] if "loss" in line]


def accelerate_launch(settings: dict[str, Any]) -> str:
    """What `ear-ops train` prints in two processes without a GPU."""
    options = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in settings.items()
        if value is not None and value is not False
    ]
    port = two_processes.free_port()
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", f"--main_process_port={port}"]
    finished = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "ear_ops.recipes.cli", "train", *options],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=two_processes.TIMEOUT,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_two_processes_take_the_steps_of_one_and_write_once(settings, tmp_path: Path) -> None:
    """Killed in the middle, and resumed by `accelerate launch`."""
    folders = tmp_path / "alone", tmp_path / "together"
    alone = run.train(run.TrainConfig(**{**settings, "output_dir": str(folders[0])}))
    together = {**settings, "output_dir": str(folders[1])}
    with pytest.raises(AssertionError, match="left no result"):
        two_processes.run(training_workers.train, tmp_path, together, 6)
    files = json.loads((folders[1] / "checkpoints" / "checkpoint-4" / "complete.json").read_text())
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= files.keys() and not (folders[1] / "model").exists()
    printed = accelerate_launch(together)
    assert printed.count("Resuming from checkpoint-4.") == printed.count("Tables, configuration and model are in") == 1
    results = json.loads((folders[1] / "results.json").read_text())
    assert results["timing"]["resumed"] and results["versions"]["processes"] == "2"
    assert comparable(results) == comparable(alone)
    assert results["terms"] == pytest.approx(alone["terms"], rel=1e-3)
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]


@pytest.mark.parametrize("method", ["rs-rp", "adv", "nt+apt", "ept+srpt"])
def test_every_method_does_in_two_processes_what_it_does_in_one(settings, tmp_path: Path, method: str) -> None:
    """What it draws included; and the gradients that are measured are those of all pairs."""
    folders = tmp_path / "alone", tmp_path / "together"
    settings |= {"method": method, "measure_gradients": 2, "logging_steps": 1, **QUICK, "max_train_examples": 32}
    alone = run.train(run.TrainConfig(**{**settings, "output_dir": str(folders[0])}))
    together = {**settings, "output_dir": str(folders[1])}
    both = two_processes.run(training_workers.train, tmp_path, together, None, method == "adv")  # one of them by MPI
    assert both[0] == both[1] and both[0]["versions"]["processes"] == "2"
    assert comparable(both[0]) == comparable(alone)
    steps = [steps_of(folder) for folder in folders]
    assert len(steps[0]) == 4
    for alone_step, together_step in zip(*steps, strict=True):
        assert alone_step == pytest.approx(together_step, rel=1e-4)
    if alone["gradient_ratios"] is None:
        assert both[0]["gradient_ratios"] is None and method in ("rs-rp", "adv")
    else:
        for when, ratios in alone["gradient_ratios"].items():
            assert both[0]["gradient_ratios"][when] == pytest.approx(ratios, rel=1e-4)


def test_mistakes_stop_all_processes(settings, tmp_path: Path) -> None:
    odd = two_processes.run(training_workers.train, tmp_path, {**settings, "batch_size": 7})
    assert odd[0] == odd[1] and odd[0][0] == "ConfigError" and "expected a multiple of 2, got 7" in odd[0][1]
    (Path(settings["output_dir"]) / "training.json").write_text("{}")  # something that was computed
    other = two_processes.run(training_workers.train, tmp_path, settings)
    assert other[0] == other[1] and other[0][0] == "RunFolderError" and "batch_size: 7 there, 8 now" in other[0][1]


def test_who_does_what(tmp_path: Path) -> None:
    both = two_processes.run(training_workers.roles, tmp_path)
    assert [roles.pop("rank") for roles in both] == [0, 1]
    assert [roles.pop("called") for roles in both] == [[0], []]
    expected = {"on main": "0", "raised": "in process 0", "gathered": {"key 0": 0, "key 1": 1}, "sum": [2.0, 1.0]}
    expected["accelerate agrees"] = True
    assert both == [expected, expected]


def test_the_first_process_speaks(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        processes.say(f"from {rank}")
    assert capsys.readouterr().out == "from 0\n"


def test_one_process_needs_no_others() -> None:
    assert processes.on_main(lambda: 7) == 7 and processes.gather({"a": 1}) == {"a": 1}


LAUNCHES = [
    (["--use_fsdp", "--fsdp_version=2"], "asks for FSDP (ACCELERATE_USE_FSDP)"),
    (["--use_megatron_lm"], "asks for Megatron-LM"),
    (["--multi_gpu", "--mixed_precision=bf16"], "mixed precision 'bf16' .* pass --bf16"),
    (["--multi_gpu", "--dynamo_backend=inductor"], "asks for torch.compile ('INDUCTOR' .* pass --compile"),
]


@pytest.mark.parametrize(("options", "words"), LAUNCHES, ids=[options[0] for options, _ in LAUNCHES])
def test_what_the_launcher_would_change_is_refused(
    make_config, monkeypatch: pytest.MonkeyPatch, options: list[str], words: str
) -> None:
    """With the environment that `accelerate launch` makes, before anything is read or written."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(["--num_processes=2", *options, "script"])
    environment = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM", *environment):
        if name.startswith("ACCELERATE_") and name in environment:
            monkeypatch.setenv(name, environment[name])
    config = make_config()
    with pytest.raises(ConfigError, match=words.replace("(", r"\(").replace(")", r"\)")):
        run.train(config)
    assert not Path(config.output_dir).exists()


def test_deepspeed_is_refused_and_bf16_may_be_said_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    processes.start(bf16=True)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=r"DeepSpeed .* holds the whole model.* docs/trainers\.md"):
        processes.start(bf16=True)


def test_processes_draw_their_own_dropout(settings, tiny_model: Path, tmp_path: Path) -> None:
    """Nothing else tells them apart: without dropout, and with the same rows, they have the same loss."""
    settings |= {"method": "rs-da", **QUICK, "max_train_examples": 8}
    with_dropout = {**settings, "model": str(tiny_model), "output_dir": str(tmp_path / "with")}
    losses = two_processes.run(training_workers.first_step, tmp_path, with_dropout)
    assert losses[0] != losses[1]
    losses = two_processes.run(training_workers.first_step, tmp_path, settings)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("command", [["sweep", "study.yaml"], ["report", "runs"], ["augment", "--output=x.tsv"]])
def test_other_commands_are_refused_in_several_processes(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    from typer.testing import CliRunner

    from ear_ops.recipes import cli

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=f"`ear-ops {command[0]}` runs in one process, .* started 2: "):
        CliRunner().invoke(cli.app, command, catch_exceptions=False)
