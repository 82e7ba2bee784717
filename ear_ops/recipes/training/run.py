"""One run from its configuration to its table; started again, it goes on where it stopped."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import TrainingArguments, set_seed

from ear_ops.data import PairCollator, PairExample, PairViews, get_task
from ear_ops.models.classifier import load_classifier
from ear_ops.models.vocabulary import prune_vocabulary, restore_vocabulary
from ear_ops.recipes.training import checkpoints, processes
from ear_ops.recipes.training.calibration import chosen_weights, measured_ratios, terms_of, weighted
from ear_ops.recipes.training.config import CHOICES, RATIOS, TrainConfig
from ear_ops.recipes.training.convergence import beats_majority, chance_level, collapse_notice, last_quarter
from ear_ops.recipes.training.errors import ConfigError
from ear_ops.recipes.training.evaluation import predict, score
from ear_ops.recipes.training.folder import RunFolderError, claim, load_config, locked, read_json, versions
from ear_ops.recipes.training.freezing import freeze_word_embeddings
from ear_ops.recipes.training.methods import METHODS, Method
from ear_ops.recipes.training.pair_trainer import PairTrainer
from ear_ops.recipes.training.results import results_markdown, summarise
from ear_ops.recipes.training.sources import TrainingData, evaluation_texts, load_split_of, load_training_data

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, choose the checkpoint on dev of the source language, score every language, and write all of it to
    the output folder.

    A run that was interrupted continues from its newest complete checkpoint and ends with the same metrics; a
    finished one is returned as it is.

    Returns:
        What `results.json` holds.

    Raises:
        RunFolderError: the output folder belongs to another configuration or another process.
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
        if not processes.on_main(lambda: checkpoints.is_complete(folder / "model")):
            _fit(config, folder)
        if processes.on_main(lambda: (folder / "checkpoints").exists()):
            processes.on_main(lambda: checkpoints.remove(folder / "checkpoints"))
        return _evaluate(config, folder, config.eval_split)


def evaluate(folder: str | Path, split: str | None = None, data_dir: str | None = None) -> dict[str, Any]:
    """Score the model of a finished run once more, and write the tables (`results-SPLIT.*` for another split).

    A pruned vocabulary comes back whole, since the texts may be others than those that it was pruned to.

    Args:
        split: `dev` or `test`; by default that of the configuration.
        data_dir: where the data are now; by default where they were.

    Raises:
        ConfigError: `split` is neither.
        RunFolderError: the folder holds no run, an unfinished one, or scores of items that would be lost.
        DataError: data are missing or malformed.
    """
    if split is not None and split not in CHOICES["eval_split"]:
        raise ConfigError(f"eval_split: expected {' or '.join(CHOICES['eval_split'])}, got {split!r}")
    folder = Path(folder)
    config = load_config(folder)
    if not checkpoints.is_complete(folder / "model"):
        raise RunFolderError(f"{folder} holds no complete model: finish the run with `ear-ops train` first")
    if data_dir is not None:
        config.data_dir, config.hub = data_dir, False
    processes.start(config.bf16)
    with ExitStack() as held:
        processes.on_main(lambda: held.enter_context(locked(folder)))
        return _evaluate(config, folder, split or config.eval_split, again=True)


def _open(config: TrainConfig, folder: Path, held: ExitStack) -> dict[str, Any] | None:
    """Lock and claim the folder; the results, where the run is finished, else None."""
    held.enter_context(locked(folder))
    claim(folder, config)
    return read_json(folder / "results.json") if (folder / "results.json").exists() else None


def _fit(config: TrainConfig, folder: Path) -> None:
    """Train into `folder/model` and `folder/training.json`."""
    idle = config.without_effect
    if idle and processes.rank() == 0:
        logger.warning("method %r takes no account of %s", config.method, ", ".join(idle))
    data = load_training_data(config, METHODS[config.method].two_views)
    dev = load_split_of(config, "dev", [config.source_language])[config.source_language]
    load_split_of(config, config.eval_split, config.language_list)  # a missing file should stop the run now
    processes.say(f"{len(data.views):,} training pairs, {len(dev):,} for choosing the checkpoint.")
    if data.replaced:
        processes.say(f"Augmented view, first epoch: {data.replaced['summary']}.")

    try:
        model, tokenizer = initial_model(config, data)
        collate = PairCollator(tokenizer, max_length=config.max_length, padding=config.padding)
        if config.freeze_embeddings:
            inputs = collate([data.views[0]])
            inputs.pop("labels")
            freeze_word_embeddings(model, terms_of(config), inputs)
        weights = processes.on_main(lambda: chosen_weights(config, folder, model, collate, data.views))
        if weights:
            processes.say(f"Weights for the wanted ratios: {', '.join(f'{k} {v:.4g}' for k, v in weights.items())}.")
        method = METHODS[config.method](weighted(config, weights))
        trainer = make_trainer(config, folder, method, model, collate, data.views, dev)
        before = measured_ratios(config, model, collate, data.views)
    except (ValueError, TypeError) as error:  # a layer, length, pooling or set of labels that this model does not have
        raise ConfigError(str(error)) from error
    newest = processes.on_main(lambda: _newest_checkpoint(folder / "checkpoints"))
    try:
        output = trainer.train(resume_from_checkpoint=newest)
    finally:
        trainer.detach()

    state = trainer.state
    terms = last_quarter(state.log_history, state.max_steps)
    regularised, perturbed = bool(method.regularizers()), "perturbation" in method.uses
    notice = collapse_notice(
        terms, chance_level(data.labels), state.max_steps, regularised=regularised, perturbed=perturbed
    )
    if perturbed and beats_majority(state.best_metric or 0.0, [example.label for example in dev]):
        notice = None  # its cross-entropy is that of perturbed embeddings, which may be hard without harm
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # measured as before, without autocast
    after = measured_ratios(config, model, collate, data.views)
    ratios = None if before is None else {"before": before, "after": after}
    training = {
        "steps": state.global_step,
        "pairs": len(data.views),
        "best": {"step": state.best_global_step, "dev_accuracy": state.best_metric},
        "terms": terms,
        "collapsed": notice is not None,
        "notices": [notice] if notice else [],
        "replaced": data.replaced,
        "gradient_ratios": ratios,
        "weights": weights,
        "timing": {
            "seconds": output.metrics["train_runtime"],
            # Where a run was resumed, of all its parts.
            "evaluation_seconds": sum(entry.get("eval_runtime", 0.0) for entry in state.log_history),
            "resumed": newest is not None,
        },
        "log": state.log_history,
    }

    def write() -> None:
        if notice:
            logger.warning("%s", notice)
        checkpoints.write_json(folder / "training.json", training)
        model.save_pretrained(folder / "model")  # the best one: the Trainer has loaded it
        tokenizer.save_pretrained(folder / "model")
        checkpoints.mark_complete(folder / "model")

    processes.on_main(write)


def _newest_checkpoint(folder: Path) -> str | None:
    """Remove what is unfinished, and return the newest checkpoint that is not."""
    for unfinished in checkpoints.remove_incomplete(folder):
        processes.say(f"{unfinished.name} was not finished and is not used.")
    complete = checkpoints.complete_checkpoints(folder)
    if not complete:
        return None
    processes.say(f"Resuming from {complete[-1].name}.")
    return str(complete[-1])


def initial_model(config: TrainConfig, data: TrainingData | None) -> tuple[Any, Any]:
    """Model and tokenizer as the run's training begins with them: the head drawn, the vocabulary pruned to what the
    data use; without data, whole."""
    set_seed(config.seed)  # the head's weights
    labels = get_task(config.task).labels
    model: Any
    tokenizer: Any
    pooling = cast("Literal['cls', 'mean'] | None", config.pooling)  # the configuration has checked it
    model, tokenizer = load_classifier(config.model, len(labels), pooling=pooling, label_names=labels)
    if config.prune_vocabulary and data is not None:
        before = len(tokenizer)
        texts = {*data.texts(config.epochs), *evaluation_texts(config)}
        model, tokenizer = prune_vocabulary(model, tokenizer, sorted(texts))
        processes.say(f"Vocabulary: {len(tokenizer):,} of {before:,} pieces kept.")
    return model, tokenizer


def trained_model(config: TrainConfig, folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a finished run with the whole vocabulary, also where the run has pruned it: the pieces
    that were dropped would have come out of training as they went in."""
    model, tokenizer = load_classifier(str(folder / "model"), len(get_task(config.task).labels))
    if not config.prune_vocabulary:
        return model, tokenizer
    initial, whole = initial_model(config, None)
    restore_vocabulary(model, tokenizer, initial, whole)
    return initial, whole


def make_trainer(
    config: TrainConfig,
    folder: Path,
    method: Method,
    model: Any,
    collate: PairCollator,
    views: PairViews,
    dev: list[Any],
) -> PairTrainer:
    """The Trainer of a run: `views` to train on, `dev` to choose the checkpoint."""
    on_cuda = torch.cuda.is_available()
    if config.batch_size % processes.count():
        raise ConfigError(
            f"batch_size is the number of originals a step over all processes: expected a multiple of "
            f"{processes.count()}, got {config.batch_size}"
        )
    args = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=config.batch_size // processes.count(),
        per_device_eval_batch_size=config.eval_batch_size,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=config.warmup_ratio,  # below 1 it is a share of the steps
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=config.bf16,
        use_cpu=(config.bf16 or processes.count() > 1) and not on_cuda,
        seed=config.seed,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,  # a loss that is not a number should be seen
        eval_strategy="steps",  # the steps themselves are the Trainer's `Schedule`
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
    dev = sorted(dev, key=lambda example: len(example.text1) + len(example.text2))  # batches of like length pad little
    return PairTrainer(
        model,
        args,
        method,
        train_dataset=views,
        eval_dataset=PairViews(dev),
        data_collator=collate,
        compute_metrics=lambda output: {"accuracy": float((output.predictions.argmax(-1) == output.label_ids).mean())},
        evaluations_per_epoch=config.evaluations_per_epoch,
        group_by_length=config.group_by_length,
        compiled=config.compile,
        processing_class=collate.tokenizer,
    )


def _evaluate(config: TrainConfig, folder: Path, split: str, again: bool = False) -> dict[str, Any]:
    """Score every language, each in one of the processes, and write the tables; `again`: after the run has ended."""
    examples = load_split_of(config, split, config.language_list)
    suffix = "" if split == config.eval_split else f"-{split}"
    model: Any
    if again:
        processes.on_main(lambda: _check_nothing_is_lost(folder / f"results{suffix}.json", examples))
        model, tokenizer = trained_model(config, folder)
    else:
        model, tokenizer = load_classifier(str(folder / "model"), len(get_task(config.task).labels))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    own = list(examples)[processes.rank() :: processes.count()]
    predictions = {
        language: predict(
            model,
            tokenizer,
            examples[language],
            max_length=config.max_length,
            batch_size=config.eval_batch_size,
            bf16=config.bf16,
            progress=f"{split} {language}" if processes.rank() == 0 else None,
        )
        for language in own
    }
    gathered = processes.gather(predictions)
    predictions = {language: gathered[language] for language in examples}
    return processes.on_main(lambda: _write_results(config, folder, split, suffix, examples, predictions))


def _check_nothing_is_lost(path: Path, examples: dict[str, list[PairExample]]) -> None:
    """Raises RunFolderError where the results there count items that `examples` does not have."""
    if not path.exists():
        return
    there = {language: score["total"] for language, score in read_json(path)["languages"].items()}
    here = {language: len(examples.get(language, ())) for language in there}
    if other := [
        f"{name}: {there[name]} there, {here[name]} in the data" for name in there if there[name] != here[name]
    ]:
        raise RunFolderError(
            f"{path} counts other items than these data have ({'; '.join(other)}), and would be overwritten: give the "
            "--data-dir that the run was scored on, or score a copy of its folder without this file"
        )


def _write_results(
    config: TrainConfig,
    folder: Path,
    split: str,
    suffix: str,
    examples: dict[str, list[PairExample]],
    predictions: dict[str, list[int]],
) -> dict[str, Any]:
    training = read_json(folder / "training.json")
    task = get_task(config.task)
    scores = [score(name, pairs, predictions[name], task=config.task) for name, pairs in examples.items()]
    missing = [language for language in task.languages if language not in examples] if config.languages is None else []
    results = {
        "task": config.task,
        "split": split,
        "regularised": bool(METHODS[config.method].uses & RATIOS.keys()),
        "collapsed": training["collapsed"],
        **summarise(scores, config.source_language),
        "best": training["best"],
        "steps": training["steps"],
        "pairs": training.get("pairs"),  # of runs of older versions not known, like what follows
        "terms": training["terms"],
        "gradient_ratios": training.get("gradient_ratios"),
        "weights": training.get("weights", {}),
        "replaced": training["replaced"],
        "notices": training["notices"]
        + ([f"no {split} data for {', '.join(missing)}: not in the averages"] if missing else []),
        "config": config.to_dict(),
        "versions": versions(),
        "date": date.today().isoformat(),
        "timing": training["timing"],
    }
    checkpoints.write_json(folder / f"predictions{suffix}.json", predictions)
    checkpoints.write_atomically(folder / f"results{suffix}.md", results_markdown(results))
    checkpoints.write_json(folder / f"results{suffix}.json", results)  # last: it says that the run is finished
    return results
