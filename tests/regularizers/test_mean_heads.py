"""``AttentionPull(heads="mean")``: a teacher with another number of heads, and what does not go together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from ear_ops import AttentionPull, attach
from ear_ops.capture import AttentionInputs, AttentionMaps

DIVERGENCES = ("mse", "kl", "reverse_kl", "js")


def model(kind: str, seed: int, heads: int, hidden: int = 32) -> Any:
    """A classifier in eval mode, its attention far from uniform."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 60, "hidden_size": hidden, "num_hidden_layers": 2, "num_attention_heads": heads}
    if kind == "bert":
        config = transformers.BertConfig(**shape, intermediate_size=48)
    else:
        config = transformers.LlamaConfig(**shape, intermediate_size=48, num_key_value_heads=heads // 2, pad_token_id=0)
    built = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    return built.eval()


def batch_of() -> dict[str, Tensor]:
    input_ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(7) < torch.tensor([7, 4, 6])[:, None]
    return {"input_ids": input_ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def eager_average(of: Any, batch: dict[str, Tensor]) -> Tensor:
    """``[rows, L]`` averages over the heads of the second block, of the real queries."""
    of.set_attn_implementation("eager")
    maps = of(**batch, output_attentions=True).attentions[1].mean(1)
    of.set_attn_implementation("sdpa")
    return maps[batch["attention_mask"].bool()]


def kl(target: Tensor, other: Tensor) -> Tensor:
    """Mean over rows; masked keys have probability 0 in both."""
    logs = [torch.where(rows > 0, rows, 1.0).log() for rows in (target, other)]
    return (target * (logs[0] - logs[1])).sum(-1).mean()


def written_out(divergence: str, p: Tensor, t: Tensor, counted_pairs: int) -> Tensor:
    if divergence == "mse":
        return (p - t).square().sum() / counted_pairs
    if divergence == "js":
        return (kl(p, (p + t) / 2) + kl(t, (p + t) / 2)) / 2
    return kl(t, p) if divergence == "kl" else kl(p, t)


@pytest.mark.parametrize(
    ("kind", "teacher"),
    [("bert", {"heads": 2}), ("bert", {"heads": 3, "hidden": 36}), ("llama", {"heads": 8, "hidden": 64})],
)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_numbers_of_eager_attention(kind: str, teacher: dict[str, int], divergence: str) -> None:
    student, other, batch = model(kind, 0, 4), model(kind, 1, **teacher), batch_of()
    with torch.no_grad():
        target = eager_average(other, batch)
    counted_pairs = int(batch["attention_mask"].sum(1).square().sum())
    expected = written_out(divergence, eager_average(student, batch), target, counted_pairs)
    parameters = [p for p in student.parameters() if p.requires_grad]
    expected_gradients = torch.autograd.grad(expected, parameters, allow_unused=True)
    pull = AttentionPull(2, 1.0, divergence=divergence, heads="mean")
    with attach(student, [pull], teacher=other) as ear:
        with torch.no_grad():
            other(**batch)
        student(**batch)
        loss = ear.loss()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        if wanted is None or not wanted.any():
            assert gradient is None or gradient.abs().max() < 1e-6
        else:
            torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-6)


MASK = torch.arange(6) < torch.tensor([6, 4])[:, None]


def reading(heads: int, seed: int, scale: float | None = None) -> AttentionInputs:
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(2, heads, 6, 8, generator=generator) for _ in range(2))
    return AttentionInputs(query, key, MASK, MASK, None, scale)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_of_maps_and_of_words_as_of_queries_and_keys(divergence: str) -> None:
    """Words of one piece each are tokens."""
    pull, views = AttentionPull(1, divergence=divergence, heads="mean"), (reading(2, 0), reading(3, 1))
    expected = pull.term(*views)
    maps = [AttentionMaps(view.probabilities(), MASK, MASK) for view in views]
    torch.testing.assert_close(pull.term(*maps), expected)
    words = AttentionPull(1, divergence=divergence, heads="mean", alignment="word")
    ids = torch.arange(6).expand(2, 6)
    torch.testing.assert_close(words.term(*views, (ids, ids)), expected)


def test_another_scale() -> None:
    first, second = reading(2, 0), reading(3, 1, scale=0.7)
    expected = AttentionPull(1, heads="mean").term(
        *(AttentionMaps(view.probabilities(), MASK, MASK) for view in (first, second))
    )
    torch.testing.assert_close(AttentionPull(1, heads="mean").term(first, second), expected)


def test_head_weights() -> None:
    views = (reading(2, 0), reading(2, 1))
    weighted = AttentionPull(1, heads="mean", head_weights=[0.0, 3.0]).term(*views)
    second = (view._replace(query=view.query[:, 1:], key=view.key[:, 1:]) for view in views)
    torch.testing.assert_close(weighted, AttentionPull(1, heads="mean").term(*second))
    with pytest.raises(ValueError, match="head_weights: expected None, because the views have 2 and 3 heads"):
        AttentionPull(1, heads="mean", head_weights=[1.0, 3.0]).term(reading(2, 0), reading(3, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": "average"}, "heads: expected 'each' or 'mean', got 'average'"),
        ({"heads": "mean", "divergence": "scores_mse"}, "heads: divergence='scores_mse' has no 'mean'; use 'mse'"),
        ({"heads": "mean", "head_weights": [1.0, -1.0]}, r"head_weights: expected numbers of at least 0.*got \[1.0, -"),
        ({"heads": "mean", "head_weights": [0.0, 0.0]}, "head_weights: expected numbers of at least 0, not all"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionPull(1, **options)


def test_head_by_head_the_error_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"attention_pull\.1: expected equally many heads .* 2 and 3; .*heads='mean'"):
        AttentionPull(1).term(reading(2, 0), reading(3, 1))
