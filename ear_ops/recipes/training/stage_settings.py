"""The settings that each stage of a run takes, as `TrainConfig` gives them once defaults and presets are filled in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataSettings:
    """Which sentence pairs a run reads, and where their augmented view comes from."""

    task: str
    source_language: str
    data_dir: str | None
    hub: bool
    max_train_examples: int | None
    synonyms: str | None
    match: str
    dictionary_scale: float
    variants_file: str | None
    variants: str
    seed: int


@dataclass(frozen=True)
class ClassifierSettings:
    """Which model a run starts from, and how texts become its input."""

    task: str
    model: str
    pooling: Literal["cls", "mean"] | None
    max_length: int
    padding: str
    freeze_embeddings: bool
    prune_vocabulary: bool
    seed: int


@dataclass(frozen=True)
class ObjectiveSettings:
    """What a training step minimises. A weight is None while a ratio stands for it."""

    method: str
    alpha: float | None
    beta: float | None
    push_ratio: float | None
    pull_ratio: float | None
    layer: int
    reduction: str
    perturbation: float
    adversarial_steps: int
    measure_gradients: int
    batch_size: int
    max_length: int
    seed: int


@dataclass(frozen=True)
class OptimisationSettings:
    """How the Trainer takes its steps, and when it evaluates and saves."""

    batch_size: int
    group_by_length: bool
    learning_rate: float
    epochs: int
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    bf16: bool
    compile: bool
    seed: int
    evaluations_per_epoch: int
    eval_batch_size: int
    logging_steps: int


@dataclass(frozen=True)
class EvaluationSettings:
    """What the trained model is scored on, and how. Without a list of languages, all that have data are scored."""

    eval_split: str
    language_list: list[str] | None
    eval_batch_size: int
    max_length: int
    bf16: bool
