"""The sentence pairs of a run: those to train on, with their augmented view, and those to score."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TypeVar

from ear_ops.data import (
    DataError,
    PairExample,
    PairViews,
    SynonymAugmenter,
    Task,
    VariantGroup,
    VariantViews,
    available_languages,
    get_task,
    is_untranslated,
    load_hub_split,
    load_split,
    load_synonyms,
    one_row_per_variant,
    read_variants,
    write_variants,
)
from ear_ops.data.pairs import UNTRANSLATED, find_split, load_texts
from ear_ops.recipes.training.checkpoints import digest_of
from ear_ops.recipes.training.config import MINI, OFFLINE_MODEL, TrainConfig
from ear_ops.recipes.training.errors import ConfigError
from ear_ops.recipes.training.stage_settings import DataSettings

_Row = TypeVar("_Row")


@dataclass
class TrainingData:
    """The originals of a run with their views.

    Attributes:
        views: the pairs.
        groups: the variants that a file gives, if there is one.
        replaced: counts of replaced words in the first epoch, where the augmenter draws the variants.
        untranslated: how many pairs of the file are left out, because a translation is missing.
    """

    views: PairViews
    groups: list[VariantGroup] | None
    replaced: dict[str, int | float | str] | None
    untranslated: int

    @property
    def labels(self) -> list[int]:
        return [example.label for example in self.views.examples]

    def texts(self, epochs: int) -> Iterator[str]:
        """Every text that a training of this many epochs can show to the model."""
        for example in self.views.examples:
            yield from (example.text1, example.text2)
        if self.groups is not None:
            for group in self.groups:
                yield from chain.from_iterable(group.variants)
        elif self.views.augmenter is not None:
            for epoch in range(epochs):
                self.views.set_epoch(epoch)
                for i in range(len(self.views)):
                    yield from self.views[i]["augmented"]
            self.views.set_epoch(0)


def load_training_data(settings: DataSettings, two_views: bool) -> TrainingData:
    """Read the training pairs. The originals are the same with one view and with two.

    Raises:
        DataError: a file is missing or malformed.
        ConfigError: two views are needed, and no setting says where the augmented one comes from.
    """
    task = get_task(settings.task)
    if settings.variants_file is not None:
        every_group = read_variants(settings.variants_file, task)
        groups, untranslated = _translated(every_group, lambda group: group.original, settings.max_train_examples)
        if settings.variants == "all":
            groups = one_row_per_variant(groups)
        if two_views:
            return TrainingData(VariantViews(groups, seed=settings.seed), groups, None, untranslated)
        return TrainingData(PairViews([group.original for group in groups]), None, None, untranslated)
    examples, untranslated = _training_pairs(settings, task)
    if not two_views:
        return TrainingData(PairViews(examples), None, None, untranslated)
    views = PairViews(examples, load_augmenter(settings), seed=settings.seed)
    return TrainingData(views, None, _count_replaced(views), untranslated)


def _training_pairs(settings: DataSettings, task: Task) -> tuple[list[PairExample], int]:
    """The first pairs of the training file that are translated, and how many pairs of the file are not."""
    examples = _load(settings, task, "train", settings.source_language)
    return _translated(examples, lambda example: example, settings.max_train_examples)


def _translated(rows: list[_Row], pair_of: Callable[[_Row], PairExample], limit: int | None) -> tuple[list[_Row], int]:
    """The first `limit` rows whose pair is translated, and how many of all rows are not."""
    kept = [row for row in rows if not is_untranslated(pair_of(row))]
    if not kept:
        raise DataError(f"all {len(rows):,} training pairs are left out, {UNTRANSLATED}")
    return kept[:limit], len(rows) - len(kept)


def load_augmenter(settings: DataSettings) -> SynonymAugmenter:
    """The augmenter with the synonym dictionary of the settings. The built-in data have a dictionary of their own."""
    path = settings.synonyms
    if path is None and settings.data_dir == MINI:
        from ear_ops.data.mini import mini_data_dir

        path = str(mini_data_dir() / "synonyms.json")
    if path is None:
        raise ConfigError("no words to replace: pass --synonyms with a dictionary such as counterfitted_neighbors.json")
    synonyms = load_synonyms(path, scale=settings.dictionary_scale, seed=settings.seed)
    if not any(synonyms.values()):
        share = "" if settings.dictionary_scale == 1 else f" in a share of {settings.dictionary_scale:g}"
        raise ConfigError(f"synonyms: expected words with synonyms, found none in {path}{share}")
    return SynonymAugmenter(synonyms, match=settings.match)


def load_split_of(
    settings: DataSettings, split: str, languages: list[str] | None = None
) -> dict[str, list[PairExample]]:
    """The pairs of a split by language, English first. By default, all languages that have data are read.

    Raises:
        DataError: a requested language has no data, or no language has; the message names the files looked for.
    """
    task = get_task(settings.task)
    if languages is None:
        languages = list(task.languages) if settings.hub else available_languages(_data_dir(settings), task, split)
    # Where no language has data, reading the source language raises the error that lists the files looked for.
    return {language: _load(settings, task, split, language) for language in languages or [settings.source_language]}


def missing_inputs(config: TrainConfig) -> list[str]:
    """The files and folders that a run needs and that do not exist. No file is read for this."""
    named = [config.data_dir, config.synonyms, config.variants_file]
    if config.model.startswith((".", os.sep)):  # any other text may be a name on the Hub
        named.append(config.model)
    missing = [path for path in named if path not in (None, MINI) and not Path(path).exists()]
    if config.hub or config.data_dir in missing:
        return missing
    needed = [
        ("dev", config.source_language),
        *((config.eval_split, language) for language in config.language_list or ()),
    ]
    if config.variants_file is None:
        needed.insert(0, ("train", config.source_language))
    task, folder = get_task(config.task), _data_dir(config.data)
    present = {split: available_languages(folder, task, split) for split in ("train", "dev", "test")}
    if not present[config.eval_split]:
        needed.append((config.eval_split, config.source_language))
    absent = [f"{split}-{language}.tsv" for split, language in needed if language not in present[split]]
    return missing + [str(Path(folder) / name) for name in dict.fromkeys(absent)]


def digests(config: TrainConfig) -> dict[str, str]:
    """The SHA-256 of each file that decides the training and the choice of the checkpoint, if the file exists.

    A local model has one digest, of all files in its folder.
    """
    settings = config.data
    task = get_task(settings.task)
    paths = [settings.variants_file, settings.synonyms]
    if not settings.hub:
        for split in ("dev",) if settings.variants_file is not None else ("train", "dev"):
            with suppress(DataError):
                paths.append(str(find_split(_data_dir(settings), task, split, settings.source_language)))
    present = [path for path in paths if path is not None and Path(path).is_file()]
    return {**{path: _digest(Path(path)) for path in present}, **model_digest(config.model)}


def model_digest(model: str) -> dict[str, str]:
    """The SHA-256 over names and contents of the files in a local model folder; nothing for any other model.

    Subfolders and hidden files do not count, since no model is loaded from them.
    """
    if model == OFFLINE_MODEL or not Path(model).is_dir():
        return {}
    paths = sorted(path for path in Path(model).iterdir() if path.is_file() and not path.name.startswith("."))
    lines = "".join(f"{_digest(path)} {path.name}\n" for path in paths)
    return {model: hashlib.sha256(lines.encode()).hexdigest()}


def _digest(path: Path) -> str:
    status = path.stat()
    return _digest_of_version(path, status.st_size, status.st_mtime_ns)


@cache
def _digest_of_version(path: Path, size: int, modified: int) -> str:
    return digest_of(path)


def evaluation_texts(config: TrainConfig) -> Iterator[str]:
    """Every dev and test text, in all languages that have data.

    Labels are read in the split of the final table alone, since XTREME's test files have no labels.

    Raises:
        DataError: a file is malformed.
    """
    task = get_task(config.task)
    for split in ("dev", "test"):
        if config.hub or split == config.eval_split:
            for example in chain.from_iterable(load_split_of(config.data, split).values()):
                yield from (example.text1, example.text2)
        else:
            for language in available_languages(_data_dir(config.data), task, split):
                yield from chain.from_iterable(load_texts(_data_dir(config.data), task, split, language))


def write_variants_file(settings: DataSettings, path: str, num_variants: int | None = None) -> str:
    """Write variants of the training pairs, as `ear-ops augment` does.

    Args:
        settings: of the data.
        path: the file to write, .tsv or .tsv.gz.
        num_variants: of each pair; by default the paper's number, 3 for XNLI and 10 for PAWS-X.

    Returns:
        A line that says what was written.

    Raises:
        ConfigError: the file has another suffix, or exists, or fewer variants than one were asked for. Nothing was read
            then.
        DataError: the training data are missing or malformed.
    """
    task = get_task(settings.task)
    if num_variants is None:
        num_variants = {"pawsx": 10}.get(task.name, 3)
    if num_variants < 1:
        raise ConfigError(f"num_variants must be at least 1, got {num_variants}")
    if not path.endswith((".tsv", ".tsv.gz")):
        raise ConfigError(f"output: expected a file name that ends in .tsv or .tsv.gz, got {path!r}")
    if Path(path).exists():
        raise ConfigError(f"output: {path} exists, and would be overwritten: choose another name, or delete it")
    examples, untranslated = _training_pairs(settings, task)
    augmenter = load_augmenter(settings)
    lines = write_variants(path, examples, task, augmenter, num_variants, seed=settings.seed)
    left_out = f"; {untranslated:,} pairs left out, {UNTRANSLATED}" if untranslated else ""
    return (
        f"{path}: {lines:,} lines, {num_variants} variants of {len(examples):,} pairs{left_out}; {augmenter.summary()}."
    )


def _load(settings: DataSettings, task: Task, split: str, language: str) -> list[PairExample]:
    if settings.hub:
        return load_hub_split(task, split, language)
    return load_split(_data_dir(settings), task, split, language)


def _data_dir(settings: DataSettings) -> str:
    if settings.data_dir == MINI:
        from ear_ops.data.mini import mini_data_dir

        return str(mini_data_dir())
    assert settings.data_dir is not None  # `TrainConfig` has checked it
    return settings.data_dir


def unchanged_notice(replaced: dict[str, int | float | str] | None) -> str | None:
    """A warning where the augmenter replaced no word."""
    if replaced is None or replaced["replaced"]:
        return None
    return (
        "no word was replaced, so both views are the same: does the dictionary have the language and the case of the "
        "texts? See --synonyms, --match and --dictionary-scale"
    )


def _count_replaced(views: PairViews) -> dict[str, int | float | str]:
    augmenter = views.augmenter
    assert augmenter is not None
    for i in range(len(views)):
        views[i]
    return {
        "words": augmenter.words,
        "found": augmenter.found,
        "replaced": augmenter.replaced,
        "share": augmenter.replaced_share,
        "summary": augmenter.summary(),
    }
