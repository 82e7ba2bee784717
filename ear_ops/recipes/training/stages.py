"""The stages of a training: load the data, build the classifier, calibrate, train, diagnose, save.

`run.py` calls them in this order. Each stage takes its part of the settings and what earlier stages returned.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ear_ops.attachment import attach
from ear_ops.data import PairCollator, PairExample, PairViews
from ear_ops.data.pairs import UNTRANSLATED
from ear_ops.recipes.training import checkpoints, processes
from ear_ops.recipes.training.calibration import chosen_weights, measured_ratios, terms_of, with_weights
from ear_ops.recipes.training.classifiers import check_tokenizer, initial_model
from ear_ops.recipes.training.convergence import beats_majority, chance_level, collapse_notice, last_quarter
from ear_ops.recipes.training.errors import ConfigError, refused_settings
from ear_ops.recipes.training.evaluation import one_label_notice
from ear_ops.recipes.training.freezing import freeze_word_embeddings
from ear_ops.recipes.training.methods import METHODS, Method
from ear_ops.recipes.training.pair_trainer import PairTrainer, best_checkpoint
from ear_ops.recipes.training.sources import TrainingData, load_split_of, load_training_data, unchanged_notice
from ear_ops.recipes.training.stage_settings import (
    ClassifierSettings,
    DataSettings,
    EvaluationSettings,
    ObjectiveSettings,
    OptimisationSettings,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """The training pairs of a run, and the dev pairs of the source language, which choose the checkpoint."""

    training: TrainingData
    dev: list[PairExample]


@dataclass(frozen=True)
class Classifier:
    """A model with its tokenizer, and what makes batches for it."""

    model: Any
    tokenizer: Any
    collate: PairCollator


@dataclass(frozen=True)
class Objective:
    """The loss of the training steps.

    Attributes:
        method: makes the loss of a step.
        measured_weights: the weights that follow from ratios.
        gradient_ratios: of the initial model, where they were asked for.
    """

    method: Method
    measured_weights: dict[str, float]
    gradient_ratios: dict[str, float] | None


@dataclass(frozen=True)
class Training:
    """How the training went. `seconds` are those since the last start; `log` is that of the whole run."""

    log: list[dict[str, Any]]
    steps: int
    planned_steps: int
    best_step: int | None
    best_dev_accuracy: float | None
    seconds: float
    resumed: bool


@dataclass(frozen=True)
class Diagnosis:
    """What the log says about the run.

    Attributes:
        terms: means of the loss terms over the last quarter of the training.
        collapse: a warning where the cross-entropy stayed at chance.
        gradient_ratios: of the trained model, where they were asked for.
    """

    terms: dict[str, float]
    collapse: str | None
    gradient_ratios: dict[str, float] | None


def load_data(settings: DataSettings, evaluation: EvaluationSettings, two_views: bool) -> RunData:
    """Read the training and dev pairs. The pairs to score are read too, so a missing file stops the run now.

    Raises:
        DataError: a file is missing or malformed.
        ConfigError: two views are needed, and no setting says where the augmented one comes from.
    """
    training = load_training_data(settings, two_views)
    dev = load_split_of(settings, "dev", [settings.source_language])[settings.source_language]
    scored = load_split_of(settings, evaluation.eval_split, evaluation.language_list)
    processes.say(f"{len(training.views):,} training pairs, {len(dev):,} for choosing the checkpoint.")
    if training.untranslated:
        processes.say(f"{training.untranslated:,} pairs are left out of training, {UNTRANSLATED}.")
    source = settings.source_language
    read: dict[str, dict[str, Sequence[PairExample]]] = {"train": {source: training.views.examples}}
    read["dev"] = {source: dev}
    read[evaluation.eval_split] = {**read.get(evaluation.eval_split, {}), **scored}
    for split, examples in read.items():
        if (notice := one_label_notice(split, examples, settings.task)) and processes.rank() == 0:
            logger.warning("%s", notice)
    if training.replaced:
        processes.say(f"Augmented view, first epoch: {training.replaced['summary']}.")
    if (notice := unchanged_notice(training.replaced)) and processes.rank() == 0:
        logger.warning("%s", notice)
    return RunData(training, dev)


def build_classifier(
    settings: ClassifierSettings, objective: ObjectiveSettings, views: PairViews, texts: Iterable[str] | None
) -> Classifier:
    """Load the model, and check that it has what the settings ask for.

    Args:
        settings: of the model and its input.
        objective: its regularisers are tried on the model.
        views: the training pairs; the first one is used to try frozen embeddings.
        texts: the vocabulary is pruned to these; None leaves it whole.

    Raises:
        ConfigError: the model lacks a layer, length, pooling or set of labels that a setting names, or its tokenizer
            does not know the training pairs.
    """
    model, tokenizer = initial_model(settings, texts)
    check_tokenizer(tokenizer, views.examples, settings.model)
    with refused_settings():
        collate = PairCollator(tokenizer, max_length=settings.max_length, padding=settings.padding)
    regularizers = terms_of(objective)
    if regularizers:
        with refused_settings():
            attach(model, regularizers).detach()
    if settings.freeze_embeddings:
        inputs = collate([views[0]])
        inputs.pop("labels")
        freeze_word_embeddings(model, regularizers, inputs)
    return Classifier(model, tokenizer, collate)


def calibrate_objective(
    settings: ObjectiveSettings, folder: Path, classifier: Classifier, views: PairViews
) -> Objective:
    """Measure the weights for which the settings give ratios, and the gradient ratios before training."""
    model, collate = classifier.model, classifier.collate
    weights = processes.on_main(lambda: chosen_weights(settings, folder, model, collate, views))
    if weights:
        weights_text = ", ".join(f"{name} {weight:.4g}" for name, weight in weights.items())
        processes.say(f"Weights for the wanted ratios: {weights_text}.")
    method = METHODS[settings.method](with_weights(settings, weights))
    return Objective(method, weights, measured_ratios(settings, model, collate, views))


def train_classifier(
    settings: OptimisationSettings, folder: Path, method: Method, classifier: Classifier, data: RunData
) -> Training:
    """Train from the newest checkpoint that can be resumed, or from the start; the model ends as the best checkpoint.

    Raises:
        DamagedCheckpointError: the best checkpoint was lost while the run trained.
        ConfigError: the batch size is no multiple of the number of processes.
    """
    trainer = make_trainer(settings, folder, method, classifier, data)
    resumed = processes.on_main(lambda: _checkpoint_to_resume(folder / "checkpoints"))
    try:
        output = trainer.train(resume_from_checkpoint=resumed)
    finally:
        trainer.detach()
    if not trainer.best_is_loaded:
        raise RuntimeError("training ended without its best checkpoint, so no model can be saved")
    # Takes off the autocast that training leaves on the model, so that it is measured as before training.
    trainer.accelerator.unwrap_model(classifier.model, keep_fp32_wrapper=False)
    state = trainer.state
    return Training(
        log=state.log_history,
        steps=state.global_step,
        planned_steps=state.max_steps,
        best_step=state.best_global_step,
        best_dev_accuracy=state.best_metric,
        seconds=output.metrics["train_runtime"],
        resumed=resumed is not None,
    )


def make_trainer(
    settings: OptimisationSettings, folder: Path, method: Method, classifier: Classifier, data: RunData
) -> PairTrainer:
    """The Trainer of a run, with checkpoints in `folder/checkpoints`.

    Raises:
        ConfigError: the batch size is no multiple of the number of processes.
    """
    on_cuda = torch.cuda.is_available()
    if settings.batch_size % processes.count():
        raise ConfigError(
            f"batch_size is the number of originals a step over all processes: expected a multiple of "
            f"{processes.count()}, got {settings.batch_size}"
        )
    args = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=settings.batch_size // processes.count(),
        per_device_eval_batch_size=settings.eval_batch_size,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup_ratio,  # transformers takes a number below 1 as a share of the steps
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=settings.bf16,
        use_cpu=(settings.bf16 or processes.count() > 1) and not on_cuda,
        seed=settings.seed,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,  # the log should show a loss that is not a number
        eval_strategy="steps",  # `EvaluationSteps` decides which steps
        save_strategy="steps",
        eval_steps=10**9,
        save_steps=10**9,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        greater_is_better=True,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=on_cuda,
        report_to="none",
    )
    # Batches of like length need little padding.
    dev = sorted(data.dev, key=lambda example: len(example.text1) + len(example.text2))
    return PairTrainer(
        classifier.model,
        args,
        method,
        train_dataset=data.training.views,
        eval_dataset=PairViews(dev),
        data_collator=classifier.collate,
        compute_metrics=lambda output: {"accuracy": float((output.predictions.argmax(-1) == output.label_ids).mean())},
        evaluations_per_epoch=settings.evaluations_per_epoch,
        group_by_length=settings.group_by_length,
        compiled=settings.compile,
        processing_class=classifier.tokenizer,
    )


def _checkpoint_to_resume(folder: Path) -> str | None:
    """The newest complete checkpoint whose best checkpoint is complete too, if there is any.

    The other checkpoints are removed where they are incomplete or newer: no run can go on from them.
    """
    complete: list[Path] = []
    for path in checkpoints.all_checkpoints(folder):
        if damage := checkpoints.damage(path):
            _remove_unusable(path, damage)
        else:
            complete.append(path)
    while complete:
        best = best_checkpoint(complete[-1])
        if best in complete:
            processes.say(f"Resuming from {complete[-1].name}.")
            return str(complete[-1])
        _remove_unusable(complete.pop(), f"{best.name}, the best until then, is lost")
    return None


def _remove_unusable(checkpoint: Path, reason: str) -> None:
    processes.say(f"{checkpoint.name} is not used: {reason}.")
    checkpoints.remove(checkpoint)


def diagnose_training(
    settings: ObjectiveSettings, method: Method, classifier: Classifier, data: RunData, training: Training
) -> Diagnosis:
    """Look for a cross-entropy that stayed at chance, and measure the gradient ratios after training."""
    terms = last_quarter(training.log, training.planned_steps)
    collapse = collapse_notice(
        terms,
        chance_level(data.training.labels),
        training.planned_steps,
        regularised=bool(method.regularizers()),
        perturbed="perturbation" in method.uses,
        learnt=beats_majority(training.best_dev_accuracy or 0.0, [example.label for example in data.dev]),
    )
    if collapse and processes.rank() == 0:
        logger.warning("%s", collapse)
    ratios = measured_ratios(settings, classifier.model, classifier.collate, data.training.views)
    return Diagnosis(terms, collapse, ratios)


def save_training(
    folder: Path, classifier: Classifier, data: RunData, objective: Objective, training: Training, diagnosis: Diagnosis
) -> None:
    """Write `training.json`, then the model. The manifest of the model comes last: it says that the training is over.

    Call it in the first process alone.
    """
    ratios = {"before": objective.gradient_ratios, "after": diagnosis.gradient_ratios}
    content = {
        "steps": training.steps,
        "pairs": len(data.training.views),
        "untranslated": data.training.untranslated,
        "best": {"step": training.best_step, "dev_accuracy": training.best_dev_accuracy},
        "terms": diagnosis.terms,
        "collapsed": diagnosis.collapse is not None,
        "notices": [notice for notice in (unchanged_notice(data.training.replaced), diagnosis.collapse) if notice],
        "replaced": data.training.replaced,
        "gradient_ratios": ratios if objective.gradient_ratios is not None else None,
        "weights": objective.measured_weights,
        "timing": {
            "seconds": training.seconds,
            # These are of the whole run, also where it was resumed.
            "evaluation_seconds": sum(line.get("eval_runtime", 0.0) for line in training.log),
            "resumed": training.resumed,
        },
        "log": training.log,
    }
    checkpoints.write_json(folder / "training.json", content)
    classifier.model.save_pretrained(folder / "model")
    classifier.tokenizer.save_pretrained(folder / "model")
    checkpoints.mark_complete(folder / "model")
