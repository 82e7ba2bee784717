"""One run, from its configuration to its table. Started again, it goes on where it stopped."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ear_ops.recipes.training import checkpoints, processes
from ear_ops.recipes.training.config import CHOICES, TrainConfig
from ear_ops.recipes.training.errors import ConfigError
from ear_ops.recipes.training.folder import check_model, claim, load_config, locked
from ear_ops.recipes.training.results import read_results
from ear_ops.recipes.training.scoring import score_run
from ear_ops.recipes.training.sources import evaluation_texts
from ear_ops.recipes.training.stages import (
    build_classifier,
    calibrate_objective,
    diagnose_training,
    load_data,
    save_training,
    train_classifier,
)

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, choose the checkpoint on dev of the source language, score every language, and write the tables.

    An interrupted run continues from its newest complete checkpoint and ends with the same metrics. A finished run is
    not trained again: its results are returned.

    Returns:
        What `results.json` holds.

    Raises:
        RunFolderError: the output folder belongs to another configuration, or another process works in it.
        DataError: data are missing or malformed.
        ConfigError: a setting cannot be used.
        OSError: a file cannot be read or written, or the disk is full; the same call goes on from the last checkpoint.
    """
    processes.start(config.bf16)
    folder = Path(config.output_dir)
    with ExitStack() as held, checkpoints.naming_a_full_disk(folder):
        finished = processes.on_main(lambda: _open(config, folder, held))
        if finished is not None:
            processes.say(f"{folder} holds the finished run of this configuration: nothing to train.")
            return finished
        if processes.on_main(lambda: _model_is_missing(folder / "model")):
            _fit(config, folder)
        if processes.on_main(lambda: (folder / "checkpoints").exists()):
            processes.on_main(lambda: checkpoints.remove(folder / "checkpoints"))
        return score_run(config, folder, config.eval_split)


def evaluate(folder: str | Path, split: str | None = None, data_dir: str | None = None) -> dict[str, Any]:
    """Score the model of a finished run again, and write the tables (`results-SPLIT.*` for another split).

    A pruned vocabulary is restored first, since the texts may be others than those that it was pruned to.

    Args:
        folder: of the run.
        split: `dev` or `test`; by default that of the configuration.
        data_dir: where the data are now; by default the folder that the run read.

    Raises:
        ConfigError: `split` is neither.
        RunFolderError: the folder holds no run, an unfinished one or a damaged model, or scores would be lost.
        DataError: data are missing or malformed.
    """
    if split is not None and split not in CHOICES["eval_split"]:
        raise ConfigError(f"eval_split: expected {' or '.join(CHOICES['eval_split'])}, got {split!r}")
    folder = Path(folder)
    config = load_config(folder)
    if data_dir is not None:
        config.data_dir, config.hub = data_dir, False
    processes.start(config.bf16)
    with ExitStack() as held:
        processes.on_main(lambda: held.enter_context(locked(folder)))
        processes.on_main(lambda: check_model(folder))
        return score_run(config, folder, split or config.eval_split, again=True)


def _open(config: TrainConfig, folder: Path, held: ExitStack) -> dict[str, Any] | None:
    """Lock and claim the folder, and return the results if the run is finished."""
    held.enter_context(locked(folder))
    claim(folder, config)
    return read_results(folder / "results.json") if (folder / "results.json").exists() else None


def _model_is_missing(model: Path) -> bool:
    damage = checkpoints.damage(model)
    if damage and model.exists():
        processes.say(f"The saved model is not used: {damage}.")
    return damage is not None


def _fit(config: TrainConfig, folder: Path) -> None:
    """Go through the stages of the training; they write `folder/model` and `folder/training.json`."""
    if config.without_effect and processes.rank() == 0:
        logger.warning("method %r takes no account of %s", config.method, ", ".join(config.without_effect))
    data = load_data(config.data, config.evaluation, config.two_views)
    views = data.training.views
    texts = None
    if config.prune_vocabulary:
        texts = {*data.training.texts(config.epochs), *evaluation_texts(config)}
    classifier = build_classifier(config.classifier, config.objective, views, texts)
    objective = calibrate_objective(config.objective, folder, classifier, views)
    training = train_classifier(config.optimisation, folder, objective.method, classifier, data)
    diagnosis = diagnose_training(config.objective, objective.method, classifier, data, training)
    processes.on_main(lambda: save_training(folder, classifier, data, objective, training, diagnosis))
