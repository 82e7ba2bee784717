"""Weights: schedules over the steps, and a weight for each head."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

import ear_ops
from ear_ops import AttentionPull, CosineSchedule, LinearWarmupSchedule

MASKS = {
    "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    "attention_mask_aug": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]),
}
HEAD_WEIGHTS = torch.tensor([0.5, 0.0, 2.0])


def inputs() -> list[torch.Tensor]:
    """Queries and keys [B, H, L, D] of both views."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 5, 4, generator=generator, requires_grad=True) for _ in range(4)]


@pytest.mark.parametrize("reduction", ["mean", "padded_mean", "equations", "sum", "none"])
@pytest.mark.parametrize("op", ["qk_attention_mse", "attention_mse"])
def test_every_head_counts_by_its_weight(op: str, reduction: str) -> None:
    tensors = inputs() if op == "qk_attention_mse" else [t.detach().softmax(-1).requires_grad_() for t in inputs()[:2]]
    if op == "attention_mse":
        tensors = [torch.cat([t, t[..., :1]], -1).detach().requires_grad_() for t in tensors]  # [B, H, L, L]
    call = getattr(ear_ops, op)
    options = {**MASKS, "reduction": reduction}
    alone = [call(*(t[:, head : head + 1] for t in tensors), **options) for head in range(3)]
    if reduction == "none":
        expected = torch.cat([weight * sums for weight, sums in zip(HEAD_WEIGHTS, alone, strict=True)], dim=1)
    else:
        expected = sum(weight * value for weight, value in zip(HEAD_WEIGHTS, alone, strict=True))
        expected = expected if reduction == "sum" else expected / 3
    actual = call(*tensors, **options, head_weights=HEAD_WEIGHTS)
    torch.testing.assert_close(actual, expected)
    for got, wanted in zip(
        torch.autograd.grad(actual.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True
    ):
        torch.testing.assert_close(got, wanted)
        assert got[:, 1].abs().sum() == 0 and got[:, 2].abs().sum() > 0
    torch.testing.assert_close(
        call(*tensors, **options, head_weights=torch.ones(3, dtype=torch.int64)), call(*tensors, **options)
    )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.query(hidden) + self.key(hidden)


def test_attention_pull_with_a_weight_for_each_head() -> None:
    model, hidden = Attention(), torch.randn(4, 5, 12)
    query, key = (part(hidden).unflatten(2, (3, 4)).transpose(1, 2) for part in (model.query, model.key))
    expected = ear_ops.qk_attention_mse(query, key, head_weights=HEAD_WEIGHTS)
    pull = AttentionPull(query="query", key="key", num_heads=3, weight=10.0, head_weights=HEAD_WEIGHTS.tolist())
    with ear_ops.attach(model, [pull]) as ear:
        model(hidden)
        torch.testing.assert_close(ear.loss(), 10 * expected)
        torch.testing.assert_close(ear.components()[pull.name], expected.detach())
    with ear_ops.attach(model, [AttentionPull(query="query", key="key", num_heads=2, head_weights=[1, 1, 1])]) as ear:
        model(hidden)
        with pytest.raises(ValueError, match="head_weights: expected one number for each of the 2 heads"):
            ear.loss()


@pytest.mark.parametrize("head_weights", [[], [1.0, float("nan")], ["1"]])
def test_bad_head_weights(head_weights: list[float]) -> None:
    with pytest.raises(ValueError, match="head_weights: expected a finite number for each head"):
        AttentionPull(1, head_weights=head_weights)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (LinearWarmupSchedule(0.1, steps=4), {0: 0.0, 1: 0.025, 4: 0.1, 400: 0.1}),
        (CosineSchedule(1.0, 0.0, steps=6), {0: 1.0, 2: 0.75, 3: 0.5, 4: 0.25, 6: 0.0, 9: 0.0}),
        (CosineSchedule(0.0, 0.2, steps=6), {0: 0.0, 2: 0.05, 3: 0.1, 6: 0.2, 99: 0.2}),
    ],
)
def test_schedules(schedule, values: dict[int, float]) -> None:
    assert {step: schedule(step) for step in values} == pytest.approx(values)
    assert AttentionPull(1, weight=schedule).weight_at(3) == schedule(3)
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert repr(schedule) in repr(AttentionPull(1, weight=schedule)), "a log says which schedule it was"


@pytest.mark.parametrize("weight", ["0.1", None, float("nan")])
def test_weights_are_numbers(weight: object) -> None:
    for make in (lambda: LinearWarmupSchedule(weight, 4), lambda: CosineSchedule(0.0, weight, 4)):
        with pytest.raises(TypeError, match=r"(weight|end): expected a finite number, got"):
            make()


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_schedules_need_steps(steps: object) -> None:
    for make in (lambda: LinearWarmupSchedule(0.1, steps), lambda: CosineSchedule(0.0, 0.1, steps)):
        with pytest.raises(ValueError, match="steps: expected a whole number of steps"):
            make()
