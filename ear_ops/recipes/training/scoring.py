"""Scoring a trained model in every language, and the tables that a run writes."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import torch

from ear_ops.data import PairExample, get_task
from ear_ops.models.classifier import load_classifier
from ear_ops.recipes.training import checkpoints, processes
from ear_ops.recipes.training.classifiers import trained_model
from ear_ops.recipes.training.config import RATIOS, TrainConfig
from ear_ops.recipes.training.errors import refused_settings
from ear_ops.recipes.training.evaluation import one_label_notice, predict, score
from ear_ops.recipes.training.folder import RunFolderError, read_json, versions
from ear_ops.recipes.training.methods import METHODS
from ear_ops.recipes.training.results import TRAINING, read_results, results_markdown, summarise
from ear_ops.recipes.training.sources import load_split_of
from ear_ops.recipes.training.stage_settings import EvaluationSettings

Examples = dict[str, list[PairExample]]  # by language
Predictions = dict[str, list[int]]  # by language


def score_run(config: TrainConfig, folder: Path, split: str, again: bool = False) -> dict[str, Any]:
    """Score every language of a split with the model of a run, and write the tables.

    Args:
        config: of the run.
        folder: of the run.
        split: `dev` or `test`.
        again: whether the run has ended before. Then nothing that it wrote may be lost, and a pruned vocabulary is
            restored.

    Returns:
        What `results.json` holds.

    Raises:
        RunFolderError: results of other items would be overwritten.
        DataError: data are missing or malformed.
    """
    examples = load_split_of(config.data, split, config.language_list)
    suffix = "" if split == config.eval_split else f"-{split}"
    model: Any
    if again:
        processes.on_main(lambda: _check_nothing_is_lost(folder / f"results{suffix}.json", examples))
        model, tokenizer = trained_model(config.classifier, folder)
    else:
        with refused_settings():
            model, tokenizer = load_classifier(str(folder / "model"), len(get_task(config.task).labels))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    predictions = _predict_languages(config.evaluation, model, tokenizer, examples, split)
    return processes.on_main(lambda: _write_results(config, folder, split, suffix, examples, predictions))


def _predict_languages(
    settings: EvaluationSettings, model: Any, tokenizer: Any, examples: Examples, split: str
) -> Predictions:
    """The predictions of all languages; each process predicts some of the languages."""
    predictions = {
        language: predict(
            model,
            tokenizer,
            examples[language],
            max_length=settings.max_length,
            batch_size=settings.eval_batch_size,
            bf16=settings.bf16,
            progress=f"{split} {language}" if processes.rank() == 0 else None,
        )
        for language in list(examples)[processes.rank() :: processes.count()]
    }
    gathered = processes.gather(predictions)
    return {language: gathered[language] for language in examples}


def _check_nothing_is_lost(path: Path, examples: Examples) -> None:
    """Raise RunFolderError where the results in `path` count items that `examples` does not have."""
    if not path.exists():
        return
    before = {language: score["total"] for language, score in read_results(path)["languages"].items()}
    now = {language: len(examples.get(language, ())) for language in before}
    changed = [
        f"{language}: {before[language]} there, {now[language]} in the data"
        for language in before
        if before[language] != now[language]
    ]
    if changed:
        raise RunFolderError(
            f"{path} counts other items than these data have ({'; '.join(changed)}), and would be overwritten: give "
            "the --data-dir that the run was scored on, or score a copy of its folder without this file"
        )


def _write_results(
    config: TrainConfig, folder: Path, split: str, suffix: str, examples: Examples, predictions: Predictions
) -> dict[str, Any]:
    training = read_json(folder / "training.json", TRAINING)
    task = get_task(config.task)
    scores = [score(language, pairs, predictions[language], task=task.name) for language, pairs in examples.items()]
    notices = list(training["notices"])
    missing = [language for language in task.languages if language not in examples] if config.languages is None else []
    if missing:
        notices.append(f"no {split} data for {', '.join(missing)}: not in the averages")
    if notice := one_label_notice(split, examples, config.task):
        notices.append(notice)
    results = {
        "task": config.task,
        "split": split,
        "regularised": bool(METHODS[config.method].uses & RATIOS.keys()),
        "collapsed": training["collapsed"],
        **summarise(scores, config.source_language),
        "best": training["best"],
        "steps": training["steps"],
        "pairs": training.get("pairs"),  # older versions wrote neither this nor the next three
        "untranslated": training.get("untranslated", 0),
        "terms": training["terms"],
        "gradient_ratios": training.get("gradient_ratios"),
        "weights": training.get("weights", {}),
        "replaced": training["replaced"],
        "notices": notices,
        "config": config.to_dict(),
        "versions": versions(),
        "date": date.today().isoformat(),
        "timing": training.get("timing"),
    }
    checkpoints.write_json(folder / f"predictions{suffix}.json", predictions)
    checkpoints.write_atomically(folder / f"results{suffix}.md", results_markdown(results))
    checkpoints.write_json(folder / f"results{suffix}.json", results)  # last, since it says that the run is finished
    return results
