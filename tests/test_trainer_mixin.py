"""The mixin for transformers.Trainer: the loss it trains on, in parts and with smoothing, what it logs and refuses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
import transformers
from torch.utils.data import IterableDataset

import ear_ops

PAIRS = 8
LENGTH = 6


class Pairs(torch.utils.data.Dataset):
    """Pairs without padding; in a pair, the views differ in one token."""

    def __init__(self, same: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, 40, (PAIRS, LENGTH), generator=generator)
        self.augmented = self.ids.clone()
        if not same:
            self.augmented[:, 2] = torch.randint(3, 40, (PAIRS,), generator=generator)
        self.labels = torch.randint(0, 3, (PAIRS,), generator=generator)

    def __len__(self) -> int:
        return PAIRS

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
    pass


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


def step_by_hand(loss_of: Any, of: Any) -> torch.Tensor:
    """Weights after one step of gradient descent."""
    loss_of(of).backward()
    with torch.no_grad():
        for parameter in of.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    return weights(of)


@pytest.mark.parametrize(
    ("arguments", "smoothing"),
    [
        ({}, 0.0),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, 0.0),
        ({"label_smoothing_factor": 0.2}, 0.2),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "label_smoothing_factor": 0.2}, 0.2),
    ],
    ids=["plain", "in parts", "smoothed", "smoothed in parts"],
)
def test_a_step_goes_down_the_gradient_of_both_views_and_the_regularisers(
    tmp_path: Path, arguments: dict[str, Any], smoothing: float
) -> None:
    batch = both_views([Pairs()[i] for i in range(PAIRS)])
    expected = step_by_hand(lambda of: expected_loss(of, batch, smoothing), model())
    own = trainer(tmp_path, **arguments)
    own.train()
    own.detach()
    torch.testing.assert_close(weights(own.model), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(weights(model()), expected)
    logged = own.state.log_history[0]["loss"]
    assert logged == pytest.approx(expected_loss(model(), batch, smoothing).item(), rel=1e-5)


def test_a_loss_function_of_ones_own_and_labels_of_all_rows(tmp_path: Path) -> None:
    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = both_views(items)
        return {**batch, "labels": ear_ops.repeat_labels(batch["labels"])}

    def loss_function(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        total = F.cross_entropy(outputs.logits, labels, reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    batch = both_views([Pairs()[i] for i in range(PAIRS)])
    expected = step_by_hand(lambda of: expected_loss(of, batch), model())
    own = trainer(
        tmp_path,
        options={"data_collator": collate, "compute_loss_func": loss_function},
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    own.train()
    torch.testing.assert_close(weights(own.model), expected, rtol=1e-5, atol=1e-6)


def test_the_trainer_runs_the_teacher(tmp_path: Path) -> None:
    teacher = model(seed=1, layers=4)
    before = weights(teacher)
    batch = one_view([Pairs()[i] for i in range(PAIRS)])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def loss_of(student: Any) -> torch.Tensor:
        for each in (student, teacher):
            each.set_attn_implementation("eager")
        target = teacher(**inputs, output_attentions=True).attentions[3].detach()
        output = student(**inputs, output_attentions=True)
        for each in (student, teacher):
            each.set_attn_implementation("sdpa")
        pull = (output.attentions[1] - target).square().mean()
        return F.cross_entropy(output.logits, batch["labels"]) + 3.0 * pull

    expected = step_by_hand(loss_of, model())
    own = trainer(
        tmp_path,
        [ear_ops.AttentionPull(2, 3.0)],
        options={"teacher": teacher.train(), "layer_map": {2: 4}, "data_collator": one_view},
    )
    own.train()
    assert not teacher.training and torch.equal(weights(teacher), before)
    torch.testing.assert_close(weights(own.model), expected, rtol=1e-5, atol=1e-6)
    trainer(tmp_path, options={"teacher": model(seed=1), "data_collator": one_view}, remove_unused_columns=True)


def test_the_log_has_the_mean_of_every_term_since_its_last_line(tmp_path: Path) -> None:
    steps: list[dict[str, float]] = []
    own = trainer(tmp_path, per_device_train_batch_size=2, max_steps=4, logging_steps=2)
    add = own.means.add

    def spy(terms: dict[str, torch.Tensor]) -> None:
        steps.append({name: value.item() for name, value in terms.items()})
        add(terms)

    own.means.add = spy
    own.train()
    lines = [line for line in own.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4] and len(steps) == 4
    for line, part in zip(lines, (steps[:2], steps[2:]), strict=True):
        for name in ("task_loss", "attention_pull.1", "embedding_push"):
            assert line[name] == pytest.approx((part[0][name] + part[1][name]) / 2, rel=1e-6)
        mean = 2 * line["task_loss"] + 5.0 * line["attention_pull.1"] + 0.5 * line["embedding_push"]
        assert line["loss"] == pytest.approx(mean, rel=1e-5)


def test_a_weight_gets_the_optimiser_step(tmp_path: Path) -> None:
    asked: list[int] = []

    def weight(step: int) -> float:
        asked.append(step)
        return 1.0

    pull = [ear_ops.AttentionPull(1, weight)]
    trainer(tmp_path, pull, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2).train()
    assert asked == [0, 0, 1, 1]


def test_evaluation_is_the_trainers(tmp_path: Path) -> None:
    own = trainer(tmp_path, options={"eval_dataset": Pairs()})
    own.data_collator = one_view
    batch = one_view([Pairs()[i] for i in range(PAIRS)])
    expected = F.cross_entropy(own.model.eval()(**{**batch, "labels": None}).logits, batch["labels"])
    assert own.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert own.means.pop() == {}


def test_a_term_that_stays_zero_warns_once(tmp_path: Path) -> None:
    own = trainer(tmp_path, options={"train_dataset": Pairs(same=True)}, max_steps=3, logging_steps=1)
    with pytest.warns(UserWarning, match=r"attention_pull\.1 was exactly 0 over the last 1 steps") as caught:
        own.train()
    messages = [str(warning.message) for warning in caught]
    assert sum("was exactly 0" in message for message in messages) == 2, "the push and the pull, once each"


def test_running_means_are_read_once_and_need_no_graph() -> None:
    means = ear_ops.RunningMeans()
    assert means.pop() == {}
    for value in (1.0, 2.0, 6.0):
        means.add({"a": torch.tensor(value, requires_grad=True), "b": torch.tensor(-value, dtype=torch.float64)})
    assert means.pop(lambda own: 2 * own) == {"a": 6.0, "b": -6.0}
    assert means.pop() == {}
    means.add({"a": torch.tensor(0.0)})
    with pytest.warns(UserWarning, match="a was exactly 0"):
        means.pop()
    means.add({"a": torch.tensor(0.0)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert means.pop() == {"a": 0.0}


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ({"remove_unused_columns": True}, {}, "remove_unused_columns=True drops the augmented view"),
        ({"accelerator_config": {"dispatch_batches": True}}, {}, "dispatch_batches splits the pairs"),
        ({}, {"regularizers": [ear_ops.AttentionPull(3)]}, "layer: expected 1 to 2"),
    ],
)
def test_what_would_break_the_pairs_is_refused(
    tmp_path: Path, arguments: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, options=options, **arguments)


def test_a_model_that_every_training_builds_anew_is_refused(tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="model_init: every train"):
        RegularizedTrainer(args=arguments, model_init=lambda: model(), regularizers=[ear_ops.AttentionPull(1)])


def test_streams_are_dispatched_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match="None dispatches iterable data sets"):
        trainer(tmp_path, options={"train_dataset": Stream()})
    trainer(tmp_path, options={"train_dataset": Stream()}, accelerator_config={"dispatch_batches": False})


def test_labels_that_fit_neither_pairs_nor_rows(tmp_path: Path) -> None:
    own = trainer(tmp_path)
    batch = both_views([Pairs()[i] for i in range(4)])
    own.model.train()
    with pytest.raises(ValueError, match=r"labels: expected 4 \(of the pairs\) or 8 \(of all rows\).* got 3"):
        own.compute_loss(own.model, {**batch, "labels": batch["labels"][:3]})
