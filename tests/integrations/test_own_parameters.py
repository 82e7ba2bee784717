"""Parameters of the regularisers themselves under a Trainer: treated as those of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
from support import two_processes
from support.trainer_task import (
    PAIRS,
    Pairs,
    distil,
    distil_in_a_process,
    model,
    one_view,
    projections,
    trainer,
    weights,
)

import ear_ops


def plain(steps: int, max_norm: float | None = None) -> list[torch.Tensor]:
    """The weights of model and projection after some steps of a loop without a Trainer."""
    student, teacher = model(), model(seed=1).eval()
    batch = one_view([Pairs()[i] for i in range(PAIRS)])
    with ear_ops.attach(student, projections(0), teacher=teacher) as ear:
        own = list(ear.parameters())
        optimizer = torch.optim.SGD([*student.parameters(), *own], lr=0.1)
        for _ in range(steps):
            with torch.no_grad():
                teacher(**{name: value for name, value in batch.items() if name != "labels"})
            optimizer.zero_grad()
            (student.train()(**batch).loss + ear.loss()).backward()
            for parameters in (own, student.parameters()) if max_norm else ():
                torch.nn.utils.clip_grad_norm_(parameters, max_norm)
            optimizer.step()
        return [weights(student), weights(ear.regularizers[0].projection)]


@pytest.mark.parametrize("parts", [1, 2])
def test_a_projection_goes_down_its_gradient(tmp_path: Path, parts: int) -> None:
    """Step after step, and in parts of a batch."""
    changes = {"per_device_train_batch_size": PAIRS // parts, "gradient_accumulation_steps": parts}
    found = distil(tmp_path, projections(0), max_steps=3, **changes)
    torch.testing.assert_close(found, plain(3), rtol=1e-5, atol=1e-6)


def test_gradients_are_clipped(tmp_path: Path) -> None:
    found = distil(tmp_path, projections(0), max_steps=2, max_grad_norm=0.05)
    torch.testing.assert_close(found, plain(2, max_norm=0.05), rtol=1e-5, atol=1e-6)


def test_matrices_decay_and_vectors_do_not(tmp_path: Path) -> None:
    regularizers = projections(0)
    options = {"teacher": model(seed=1), "data_collator": one_view, "regularizers": regularizers}
    optimizer = trainer(tmp_path, options=options, weight_decay=0.3, optim="adamw_torch").create_optimizer()
    decay = {parameter: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    projection = regularizers[0].projection
    assert (decay[projection.weight], decay[projection.bias]) == (0.3, 0.0)


def test_processes_train_one_projection(tmp_path: Path) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch without gloo")
    expected = distil(tmp_path / "one", projections(0), max_steps=2)
    changes = {"max_steps": 2, "per_device_train_batch_size": PAIRS // 2, "ddp_find_unused_parameters": False}
    results = two_processes.run(distil_in_a_process, tmp_path, tmp_path / "two", changes)
    assert all(torch.equal(*of) for of in zip(*results, strict=True))
    torch.testing.assert_close(results[0], expected, rtol=1e-5, atol=1e-6)


def test_a_resumed_training_goes_on(tmp_path: Path) -> None:
    """As if it had not been interrupted; also where regularisers come in another order."""
    expected = distil(tmp_path / "whole", projections(0, shared=False), max_steps=2)
    saved = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    distil(tmp_path / "parts", projections(0, shared=False), **saved)
    checkpoint = tmp_path / "parts" / "checkpoint-1"
    found = distil(tmp_path / "parts", projections(1, shared=False), checkpoint, max_steps=2)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    swapped = projections(1, shared=False)
    swapped[0], swapped[1] = swapped[1], swapped[0]
    distil(tmp_path / "parts", swapped, checkpoint, max_steps=2)
    torch.testing.assert_close(weights(swapped[1].projection), expected[1], rtol=1e-6, atol=1e-7)
    others = [ear_ops.HiddenPull(1, projection=torch.nn.Linear(16, 16, bias=False))]
    with pytest.raises(ValueError, match=r"regularizers: expected those that .* was saved with, .*weight.*, got"):
        distil(tmp_path, others, checkpoint, max_steps=2)
    (checkpoint / "regularizers.safetensors").unlink()
    with pytest.raises(ValueError, match=r"expected regularizers\.safetensors in .*checkpoint-1.*, found none"):
        distil(tmp_path, projections(0, shared=False), checkpoint, max_steps=2)


def test_statistics_of_a_projection_are_resumed(tmp_path: Path) -> None:
    class Normed(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(16, 16)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(states)

    saved = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    distil(tmp_path, [ear_ops.HiddenPull(1, projection=Normed())], **saved)
    pull = ear_ops.HiddenPull(1, projection=Normed())
    distil(tmp_path, [pull], tmp_path / "checkpoint-1", max_steps=3)
    assert pull.projection.calls == 3


def test_the_best_model_comes_with_its_projection(tmp_path: Path) -> None:
    scores = iter([3.0, 1.0, 2.0])
    regularizers = projections(0)
    options = {
        "teacher": model(seed=1),
        "data_collator": one_view,
        "regularizers": regularizers,
        "eval_dataset": Pairs(),
        "compute_metrics": lambda _: {"score": next(scores)},
    }
    every = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    own = trainer(tmp_path, options=options, **every, **best)
    own.train()
    found = [weights(own.model), weights(regularizers[0].projection)]
    torch.testing.assert_close(found, plain(1), rtol=1e-5, atol=1e-6)


def test_an_optimiser_with_a_schedule_that_lacks_them_is_refused(tmp_path: Path) -> None:
    student = model()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    options = {"teacher": model(seed=1), "data_collator": one_view, "regularizers": projections(0)}
    own = trainer(tmp_path, of=student, options={**options, "optimizers": (optimizer, schedule)})
    with pytest.raises(
        ValueError, match=r"optimizers: expected an optimiser that has the parameters of the regularisers"
    ):
        own.train()


def test_parameters_of_a_regulariser_of_ones_own(tmp_path: Path) -> None:
    class Scaled(ear_ops.HiddenPull):
        def __init__(self) -> None:
            super().__init__(1)
            self.factor = torch.nn.Parameter(torch.ones(()))

        def term(self, *readings: Any) -> torch.Tensor:
            return self.factor * super().term(*readings)

    scaled = Scaled()
    distil(tmp_path, [scaled], max_steps=1, save_strategy="steps", save_steps=1)
    assert scaled.factor.item() != 1.0
    resumed = Scaled()
    distil(tmp_path, [resumed], tmp_path / "checkpoint-1", max_steps=1)
    assert torch.equal(resumed.factor, scaled.factor)


def test_the_trainer_takes_each_parameter_of_regularisers_once(tmp_path: Path) -> None:
    """A projection that regularisers share, and one that is a frozen part of the model."""
    student, shared = model(), torch.nn.Linear(16, 16)
    student.pooling = torch.nn.Linear(16, 16).requires_grad_(False)
    pulls = [ear_ops.HiddenPull(layer, projection=shared) for layer in (1, 2)]
    pulls.append(ear_ops.HiddenPull(1, projection=student.pooling, name="pooling"))
    options = {"teacher": model(seed=1), "data_collator": one_view, "regularizers": pulls}
    groups = trainer(tmp_path, of=student, options=options).create_optimizer().param_groups
    taken = [parameter for group in groups for parameter in group["params"]]
    assert len(set(taken)) == len(taken) and set(shared.parameters()) < set(taken)
    assert student.pooling.weight not in set(taken)
