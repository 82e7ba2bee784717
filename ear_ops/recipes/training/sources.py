"""From a configuration to sentence pairs: what is trained on, with which augmented view, and what is scored."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

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
    load_hub_split,
    load_split,
    load_synonyms,
    one_row_per_variant,
    read_variants,
    write_variants,
)
from ear_ops.data.pairs import find_split, load_texts
from ear_ops.recipes.training.config import MINI, TrainConfig
from ear_ops.recipes.training.errors import ConfigError


@dataclass
class TrainingData:
    """The originals of a run with their views, and what there is to say about the augmentation."""

    views: PairViews
    groups: list[VariantGroup] | None  # from a variants file
    replaced: dict[str, int | float | str] | None  # counts of the first epoch, where variants are drawn on the fly

    @property
    def labels(self) -> list[int]:
        return [example.label for example in self.views.examples]

    def texts(self, epochs: int) -> Iterator[str]:
        """Every text that `epochs` passes over the data can show to a model."""
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


def load_training_data(config: TrainConfig, two_views: bool) -> TrainingData:
    """Read the training pairs. The originals are the same whether or not a method wants the augmented view.

    Raises:
        DataError: a file is missing or malformed.
        ConfigError: two views are wanted and nothing says where the augmented one comes from.
    """
    task = get_task(config.task)
    if config.variants_file is not None:
        groups = read_variants(config.variants_file, task)[: config.max_train_examples]
        if config.variants == "all":
            groups = one_row_per_variant(groups)
        if two_views:
            return TrainingData(VariantViews(groups, seed=config.seed), groups, None)
        return TrainingData(PairViews([group.original for group in groups]), None, None)
    examples = _load(config, task, "train", config.source_language)[: config.max_train_examples]
    if not two_views:
        return TrainingData(PairViews(examples), None, None)
    views = PairViews(examples, load_augmenter(config), seed=config.seed)
    return TrainingData(views, None, _count_replaced(views))


def load_augmenter(config: TrainConfig) -> SynonymAugmenter:
    """The synonym dictionary of the configuration; the built-in data bring one along."""
    path = config.synonyms
    if path is None and config.data_dir == MINI:
        from ear_ops.data.mini import mini_data_dir

        path = str(mini_data_dir() / "synonyms.json")
    if path is None:
        raise ConfigError("no words to replace: pass --synonyms with a dictionary such as counterfitted_neighbors.json")
    synonyms = load_synonyms(path, scale=config.dictionary_scale, seed=config.seed)
    return SynonymAugmenter(synonyms, match=config.match)


def load_split_of(config: TrainConfig, split: str, languages: list[str] | None = None) -> dict[str, list[PairExample]]:
    """One split in several languages, English first; by default in all languages at hand.

    Raises:
        DataError: a language that was asked for is missing (the message names the files looked for), or all are.
    """
    task = get_task(config.task)
    if languages is None:
        languages = list(task.languages) if config.hub else available_languages(_data_dir(config), task, split)
    # With nothing at hand, asking for the source raises the error that lists where it was looked for.
    return {language: _load(config, task, split, language) for language in languages or [config.source_language]}


def missing_inputs(config: TrainConfig) -> list[str]:
    """The files and folders that a run needs and that are not there, as far as that shows without reading any."""
    named = [config.data_dir, config.synonyms, config.variants_file]
    if config.model.startswith((".", os.sep)):  # else it may be a name on the Hub
        named.append(config.model)
    missing = [path for path in named if path not in (None, MINI) and not Path(path).exists()]
    if config.hub or config.data_dir in missing:
        return missing
    needed = [("dev", config.source_language), *((config.eval_split, each) for each in config.language_list or ())]
    if config.variants_file is None:
        needed.insert(0, ("train", config.source_language))
    task, folder = get_task(config.task), _data_dir(config)
    present = {split: available_languages(folder, task, split) for split in ("train", "dev", "test")}
    if not present[config.eval_split]:
        needed.append((config.eval_split, config.source_language))
    absent = [f"{split}-{language}.tsv" for split, language in needed if language not in present[split]]
    return missing + [str(Path(folder) / name) for name in dict.fromkeys(absent)]


def digests(config: TrainConfig) -> dict[str, str]:
    """SHA-256 by path, of the files that a run trains on and chooses its checkpoint by; of those that are there."""
    paths = [config.variants_file, config.synonyms]
    if not config.hub:
        for split in ("dev",) if config.variants_file is not None else ("train", "dev"):
            with suppress(DataError):
                paths.append(str(find_split(_data_dir(config), get_task(config.task), split, config.source_language)))
    present = [path for path in paths if path is not None and Path(path).is_file()]
    return {path: _digest(path, Path(path).stat().st_mtime_ns) for path in present}


@cache
def _digest(path: str, modified: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def evaluation_texts(config: TrainConfig) -> Iterator[str]:
    """Every dev and test text at hand, in all languages.

    Raises:
        DataError: a file is malformed. Labels are looked at in the split of the final table alone: the test files of
            XTREME's own script have none.
    """
    task = get_task(config.task)
    for split in ("dev", "test"):
        if config.hub or split == config.eval_split:
            for example in chain.from_iterable(load_split_of(config, split).values()):
                yield from (example.text1, example.text2)
        else:
            for language in available_languages(_data_dir(config), task, split):
                yield from chain.from_iterable(load_texts(_data_dir(config), task, split, language))


def write_variants_file(config: TrainConfig, path: str, num_variants: int | None = None) -> str:
    """Write variants of the training pairs (`ear-ops augment`); returns a line that says what was written.

    Args:
        path: the file to write, .tsv or .tsv.gz.
        num_variants: of each pair; by default the paper's number, 3 for XNLI and 10 for PAWS-X.

    Raises:
        ConfigError: another suffix, or fewer variants than one. Nothing has been read then.
        DataError: the training data are missing or malformed.
    """
    task = get_task(config.task)
    if num_variants is None:
        num_variants = {"pawsx": 10}.get(task.name, 3)
    if num_variants < 1:
        raise ConfigError(f"num_variants must be at least 1, got {num_variants}")
    if not path.endswith((".tsv", ".tsv.gz")):
        raise ConfigError(f"output: expected a file name that ends in .tsv or .tsv.gz, got {path!r}")
    examples = _load(config, task, "train", config.source_language)[: config.max_train_examples]
    augmenter = load_augmenter(config)
    lines = write_variants(path, examples, task, augmenter, num_variants, seed=config.seed)
    return f"{path}: {lines:,} lines, {num_variants} variants of {len(examples):,} pairs; {augmenter.summary()}."


def _load(config: TrainConfig, task: Task, split: str, language: str) -> list[PairExample]:
    if config.hub:
        return load_hub_split(task, split, language)
    return load_split(_data_dir(config), task, split, language)


def _data_dir(config: TrainConfig) -> str:
    if config.data_dir == MINI:
        from ear_ops.data.mini import mini_data_dir

        return str(mini_data_dir())
    assert config.data_dir is not None  # the configuration has been checked
    return config.data_dir


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
