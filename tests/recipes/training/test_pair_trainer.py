from __future__ import annotations

import re
import sys
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerState, TrainingArguments

from ear_ops.data import PairCollator, PairExample, PairViews, SynonymAugmenter
from ear_ops.models.classifier import load_classifier
from ear_ops.recipes.training.methods import METHODS
from ear_ops.recipes.training.pair_trainer import EpochOrder, EvaluationSteps, PairTrainer, SetEpoch
from ear_ops.recipes.training.sources import load_training_data


class Recording(PairCollator):
    """Keeps the texts of every batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches: list[list[Any]] = []

    def __call__(self, items: Any) -> dict[str, torch.Tensor]:
        self.batches.append([(item["original"], item.get("augmented")) for item in items])
        return super().__call__(items)


def make_trainer(config, folder: Path, **changes: Any) -> PairTrainer:
    method = METHODS[config.method](config.objective)
    views = load_training_data(config.data, method.two_views).views
    torch.manual_seed(0)
    model, tokenizer = load_classifier(config.model, 3)
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": config.batch_size,
        "num_train_epochs": config.epochs,
        "learning_rate": config.learning_rate,
        "logging_steps": config.logging_steps,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "report_to": "none",
        "seed": config.seed,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = TrainingArguments(**{**settings, **changes})
    collator = Recording(tokenizer, max_length=config.max_length)
    return PairTrainer(model, args, method, train_dataset=views, data_collator=collator)


def test_every_method_takes_the_same_originals_in_the_same_step(make_config, tmp_path: Path) -> None:
    seen = {}
    for name in METHODS:
        trainer = make_trainer(make_config(method=name), tmp_path / name)
        trainer.train()
        trainer.detach()
        seen[name] = trainer.data_collator.batches
        assert len(seen[name]) == 16 and [len(batch) for batch in seen[name]] == [8, 8, 8, 8, 8, 8, 8, 4] * 2
    originals = {name: [[x for x, _ in batch] for batch in batches] for name, batches in seen.items()}
    assert originals["finetune"] == originals["rs-da"] == originals["ear"]
    assert seen["rs-da"] == seen["ear"], "and the same variants"
    first, second = list(chain(*originals["ear"][:8])), list(chain(*originals["ear"][8:]))
    assert first != second and sorted(first) == sorted(second), "another order in the second epoch"
    variants = {x: xa for batch in seen["ear"][:8] for x, xa in batch}
    assert any(variants[x] != xa for batch in seen["ear"][8:] for x, xa in batch), "other variants in the second epoch"


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_the_log_is_plain_lines_with_and_without_a_progress_bar(
    make_config, tmp_path: Path, capsys, disable_tqdm: bool
) -> None:
    changes = {"disable_tqdm": disable_tqdm, "logging_steps": 2, "max_steps": 2}
    trainer = make_trainer(make_config(method="finetune"), tmp_path, **changes)
    trainer.train()
    trainer.detach()
    output = capsys.readouterr().out
    assert re.search(r"step 2: loss \d\.\d+, grad_norm \d\.\d+, learning_rate ", output)
    assert output.count("step 2: loss") == 1 and "{" not in output and "total_flos" not in output
    assert "train_runtime" in output and "per_second" not in output


@pytest.mark.parametrize("stops", [False, True])
def test_on_a_terminal_bars_stand_below_the_lines(
    make_config, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for name, value in {"TERM": "xterm", "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)
    changes = {"disable_tqdm": False, "logging_steps": 2, "max_steps": 2}
    trainer = make_trainer(make_config(method="finetune"), tmp_path, **changes)
    if stops:
        monkeypatch.setattr(trainer.method, "step", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError) if stops else nullcontext():
        trainer.train()
    trainer.detach()
    output, errors = capsys.readouterr()
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert output.rindex(shown) > output.rindex(hidden), "the cursor is there again"
    assert "training" in output and "0/2" in output and "training" not in errors
    assert output.count("step 2: loss") == (0 if stops else 1)


def test_where_there_is_no_terminal_there_is_no_bar(make_config, tmp_path: Path, capsys) -> None:
    trainer = make_trainer(make_config(method="finetune"), tmp_path, disable_tqdm=False, max_steps=2)
    capsys.readouterr()  # of loading the model
    trainer.train()
    trainer.detach()
    output, errors = capsys.readouterr()
    assert "0/2" not in output + errors and "%|" not in output + errors


def test_checkpoints_are_kept_unless_the_trainer_chooses_when_to_save(make_config, tmp_path: Path) -> None:
    trainer = make_trainer(make_config(epochs=1), tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-6",
        "checkpoint-8",
    ]


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochOrder(PairViews([None] * 50), seed)
        sampler.set_epoch(epoch)
        assert sampler.dataset.epoch == epoch
        return list(sampler)

    orders = [order(seed, epoch) for seed in (1, 2) for epoch in (0, 1, 11)]
    assert all(sorted(epoch_order) == list(range(50)) for epoch_order in orders)
    assert len({tuple(epoch_order) for epoch_order in orders}) == 6
    assert order(1, 11) == order(1, 11)


def test_order_is_pinned_so_that_published_runs_can_be_repeated() -> None:
    sampler = EpochOrder(PairViews([None] * 8), seed=1)
    assert list(sampler) == [5, 3, 1, 4, 6, 2, 0, 7]


def test_grouping_makes_steps_of_like_length_and_keeps_the_rest_random() -> None:
    lengths = [(37 * i) % 101 for i in range(403)]
    examples = [PairExample("a" * (length // 2), "b" * (length - length // 2), 0) for length in lengths]

    def steps(seed: int, epoch: int, views: PairViews) -> list[list[int]]:
        sampler = EpochOrder(views, seed, group_size=8)
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(403))
        return [order[i : i + 8] for i in range(0, 403, 8)]

    first = steps(1, 0, PairViews(examples))
    assert [len(step) for step in first] == [8] * 50 + [3], "the step that is not full is the last"
    spread = [max(lengths[i] for i in step) - min(lengths[i] for i in step) for step in first]
    assert max(spread[:-1]) <= 4
    means = [sum(lengths[i] for i in step) / 8 for step in first[:-1]]
    assert means != sorted(means) and means != sorted(means, reverse=True)
    augmented = PairViews(examples, SynonymAugmenter({"a": ["much longer words"]}))
    assert steps(1, 0, augmented) == first, "the originals alone decide"
    assert len({str(steps(seed, epoch, augmented)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_the_epoch_is_set_before_each_epoch_also_after_a_resume() -> None:
    order = EpochOrder(PairViews([None] * 8), seed=1)
    callback = SetEpoch(order, steps_per_epoch=4)
    for step, epoch in ((0, 0), (4, 1), (11, 2), (12, 3)):
        callback.on_epoch_begin(None, TrainerState(global_step=step), None)
        assert (order.epoch, order.dataset.epoch) == (epoch, epoch)


@pytest.mark.parametrize(
    ("steps", "times", "points"), [(8, 2, {4, 8}), (10, 4, {3, 5, 8, 10}), (3, 5, {1, 2, 3}), (7, 1, {7})]
)
def test_evaluations_are_spread_over_the_epoch_and_close_it(steps: int, times: int, points: set[int]) -> None:
    assert EvaluationSteps(steps, times).points == points


def test_logged_terms_are_means_over_the_steps_since_the_last_line(make_config, tmp_path: Path) -> None:
    trainer = make_trainer(make_config(method="ear", logging_steps=3), tmp_path)
    per_step: list[dict[str, float]] = []
    add = trainer.means.add

    def spy(terms: dict[str, torch.Tensor]) -> None:
        per_step.append({name: value.item() for name, value in terms.items()})
        add(terms)

    trainer.means.add = spy  # type: ignore[method-assign]
    trainer.train()
    lines = [line for line in trainer.state.log_history if "cross_entropy" in line]
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 15]
    start = 0
    for line in lines:
        steps, start = per_step[start : line["step"]], line["step"]
        for name in ("cross_entropy", "cross_entropy_augmented", "embedding_push", "attention_pull.1"):
            assert line[name] == pytest.approx(sum(terms[name] for terms in steps) / len(steps), rel=1e-5)


def test_gradient_accumulation_gives_the_mean_over_the_parts(make_config, tmp_path: Path) -> None:
    """The Trainer must neither skip its division nor divide by `num_items_in_batch`."""
    losses = []
    for size, parts in ((8, 1), (4, 2)):
        config = make_config(method="rs-da", epochs=1, batch_size=size)
        trainer = make_trainer(
            config,
            tmp_path / str(size),
            gradient_accumulation_steps=parts,
            max_steps=1,
            logging_steps=1,
            warmup_steps=0,
        )
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.train()
        losses.append(next(line for line in trainer.state.log_history if "loss" in line))
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=1e-5)
    assert losses[0]["grad_norm"] == pytest.approx(losses[1]["grad_norm"], rel=1e-4)


def test_every_batch_has_a_number_of_its_own_also_after_a_resume(make_config, tmp_path: Path) -> None:
    """What a method draws depends on it."""
    trainer = make_trainer(make_config(method="finetune"), tmp_path, gradient_accumulation_steps=3)
    numbers: list[int] = []
    step = trainer.method.step

    def spy(model: Any, inputs: Any, labels: Any, attached: Any, batch: int) -> Any:
        numbers.append(batch)
        return step(model, inputs, labels, attached, batch)

    trainer.method.step = spy  # type: ignore[method-assign]
    trainer.train()
    assert numbers == [*range(8), *range(9, 17)], "8 batches an epoch in 3 steps, the last step has 2"
    trainer.state.global_step = 4
    assert trainer._next_batch() == 12


def test_regularisers_are_silent_in_evaluation(make_config, tmp_path: Path) -> None:
    trainer = make_trainer(make_config(method="ear"), tmp_path)
    batch = PairCollator(trainer.data_collator.tokenizer, max_length=24)([trainer.train_dataset[i] for i in range(3)])
    single = {name: tensor[:3] for name, tensor in batch.items()}  # an odd batch without its second view
    trainer.model.eval()
    with torch.no_grad():
        loss, outputs = trainer.compute_loss(trainer.model, dict(single), return_outputs=True)
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(outputs.logits, single["labels"]).item())
    assert "labels" in single and trainer.means.pop() == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
        ({"save_total_limit": 1}, "save_total_limit"),
    ],
)
def test_arguments_that_would_break_pairs_or_checkpoints_are_refused(
    make_config, tmp_path: Path, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        make_trainer(make_config(), tmp_path, **arguments)


def test_detach_takes_the_regularisers_off(make_config, tmp_path: Path) -> None:
    trainer = make_trainer(make_config(method="ear"), tmp_path)
    hooks = lambda: sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in trainer.model.modules())  # noqa: E731
    assert hooks() > 0
    trainer.detach()
    assert hooks() == 0 and trainer.attached is None
