"""A tiny task for the Trainer of transformers with the mixin, and its loss from eager attention maps."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch.utils.data import IterableDataset, SequentialSampler

import ear_ops

PAIRS = 8
LENGTH = 6


class Pairs(torch.utils.data.Dataset):
    """Pairs without padding; in a pair, the views differ in one token."""

    def __init__(self, count: int = PAIRS, same: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, 40, (count, LENGTH), generator=generator)
        self.augmented = self.ids.clone()
        if not same:
            self.augmented[:, 2] = torch.randint(3, 40, (count,), generator=generator)
        self.labels = torch.randint(0, 3, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.ids[index], "augmented": self.augmented[index], "label": self.labels[index]}


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(Pairs())


def both_views(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.stack([item["x"] for item in items] + [item["augmented"] for item in items])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.stack([item["label"] for item in items]),
    }


def one_view(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: tensor[: len(items)] for name, tensor in both_views(items).items()}


class RegularizedTrainer(ear_ops.RegularizedTrainerMixin, transformers.Trainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        """Not shuffled, so that a test knows which pairs are in a step."""
        return SequentialSampler(self.train_dataset)


def model(seed: int = 0, layers: int = 2, **options: Any) -> Any:
    """Without dropout, so that a batch has one loss."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
        num_labels=3,
        **options,
    )
    return transformers.BertForSequenceClassification(config)


def trainer(folder: Path, regularizers: Any = None, *, of: Any = None, options: Any = None, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": PAIRS,
        "max_steps": 1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "remove_unused_columns": False,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return RegularizedTrainer(
        model() if of is None else of,
        transformers.TrainingArguments(**{**settings, **changes}),
        **{
            "regularizers": [ear_ops.AttentionPull(1, 5.0), ear_ops.EmbeddingPush(0.5)],
            "train_dataset": Pairs(),
            "data_collator": both_views,
            **({} if regularizers is None else {"regularizers": regularizers}),
            **(options or {}),
        },
    )


def expected_loss(of: Any, batch: dict[str, torch.Tensor], smoothing: float = 0.0) -> torch.Tensor:
    """CE(x) + CE(x^a) + 5 * pull - 0.5 * push, from eager attention maps and hidden states."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    of.set_attn_implementation("eager")
    output = of(**inputs, output_attentions=True, output_hidden_states=True)
    of.set_attn_implementation("sdpa")
    pairs = len(batch["labels"])
    entropies = sum(
        F.cross_entropy(view, batch["labels"], label_smoothing=smoothing) for view in output.logits.chunk(2)
    )
    maps, pooled = output.attentions[0], output.hidden_states[0].mean(1)
    pull = (maps[:pairs] - maps[pairs:]).square().mean()
    push = (pooled[:pairs] - pooled[pairs:]).square().mean()
    return entropies + 5.0 * pull - 0.5 * push


def weights(of: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in of.parameters()])


def descend(of: Any, *losses: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """Weights after a step of gradient descent down each of ``losses``."""
    for loss in losses:
        of.zero_grad()
        loss(of).backward()
        with torch.no_grad():
            for parameter in of.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    return weights(of)


def mean_over_parts(pairs: Pairs, *parts: list[int]) -> Callable[[Any], torch.Tensor]:
    """The loss of a step in ``parts``, each the indices of its pairs."""
    batches = [both_views([pairs[i] for i in part]) for part in parts]
    return lambda of: torch.stack([expected_loss(of, batch) for batch in batches]).mean()


def train_in_parts(folder: Path, pairs: Pairs) -> tuple[torch.Tensor, list[dict[str, float]]]:
    """Weights and log after an epoch in this process, two parts a step, two pairs a part."""
    torch.set_num_threads(1)
    own = trainer(
        folder,
        options={"train_dataset": pairs},
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=-1,
        num_train_epochs=1,
    )
    own.train()
    return weights(own.model), [line for line in own.state.log_history if "loss" in line]


def projections(seed: int, shared: bool = True) -> list[Any]:
    """Regularisers with parameters of their own, which two of them may share."""
    torch.manual_seed(seed)
    first = torch.nn.Linear(16, 16)
    second = first if shared else torch.nn.Linear(16, 16)
    return [ear_ops.HiddenPull(1, projection=first), ear_ops.HiddenPull(2, projection=second), ear_ops.AttentionPull(1)]


def distil(folder: Path, regularizers: Any, resumed: Path | None = None, **changes: Any) -> list[torch.Tensor]:
    """Trains with a teacher, and returns the weights of the model and of what the first regulariser keeps."""
    options = {"teacher": model(seed=1), "data_collator": one_view, "regularizers": regularizers}
    own = trainer(folder, options=options, **changes)
    own.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    projection = getattr(regularizers[0], "projection", None)
    return [weights(own.model), *([] if projection is None else [weights(projection)])]


def distil_in_a_process(folder: Path, changes: dict[str, Any]) -> list[torch.Tensor]:
    """In one of several processes, which begin with other projections."""
    torch.set_num_threads(1)
    return distil(folder, projections(int(os.environ["RANK"])), **changes)
