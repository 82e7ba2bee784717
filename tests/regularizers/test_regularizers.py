"""The regularisers themselves: arguments, weights, formulas; on a plain module, without transformers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ear_ops import AttentionPull, EmbeddingPush, Regularizer, SentencePull, attach


class Block(nn.Module):
    def __init__(self, hidden_size: int, kv_size: int) -> None:
        super().__init__()
        self.to_query = nn.Linear(hidden_size, hidden_size)
        self.to_key = nn.Linear(hidden_size, kv_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + torch.tanh(self.to_query(hidden)) + self.to_key(hidden).mean(-1, keepdim=True)


class Plain(nn.Module):
    """Two blocks on given vectors ``[B, L, C]``, and no transformers anywhere."""

    def __init__(self, hidden_size: int = 8, kv_size: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(hidden_size, hidden_size)
        self.blocks = nn.ModuleList([Block(hidden_size, kv_size), Block(hidden_size, kv_size)])

    def forward(self, vectors: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.embed(vectors)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


VECTORS = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.arange(5) < torch.tensor([5, 3, 4, 2, 5, 5])[:, None]


def run(regularizer, *inputs, step=None, model=None):
    model = Plain() if model is None else model
    with attach(model, [regularizer]) as ear:
        model(*inputs)
        loss = ear.loss(step=step)
    return loss, ear.components()[regularizer.name]


def pair_distances(hidden, mask=None):
    """Squared distances [B] of the pooled halves, pair by pair."""
    mask = torch.ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask
    pooled = [hidden[i][mask[i]].mean(0) for i in range(len(hidden))]
    half = len(pooled) // 2
    return torch.stack([(pooled[i] - pooled[half + i]).square().sum() for i in range(half)])


SCALES = {"mean": 1 / 24, "padded_mean": 1 / 24, "equations": 1 / 3, "sum": 1.0}


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("reduction", SCALES)
def test_pooled_terms(reduction, mask):
    inputs = (VECTORS,) if mask is None else (VECTORS, mask)
    model = Plain()
    embedded = model.embed(VECTORS)
    expected = pair_distances(embedded, mask).sum() * SCALES[reduction]
    loss, component = run(EmbeddingPush(2.0, reduction=reduction), *inputs)
    torch.testing.assert_close(component, -expected)
    torch.testing.assert_close(loss, -2.0 * expected)
    expected = pair_distances(model.blocks[0](embedded), mask).sum() * SCALES[reduction]
    loss, component = run(SentencePull(1, 3.0, reduction=reduction), *inputs)
    torch.testing.assert_close(component, expected)
    torch.testing.assert_close(loss, 3.0 * expected)


def test_output_of_the_last_block():
    torch.testing.assert_close(run(SentencePull(2), VECTORS)[1], pair_distances(Plain()(VECTORS)).sum() / 24)


@pytest.mark.parametrize("reduction", SCALES)
def test_margin(reduction):
    distances = pair_distances(Plain().embed(VECTORS)).detach()
    scaled = distances / 8 if "mean" in reduction else distances
    margin = float(scaled.sort().values[1])  # one pair below, one at it, one above
    capped = scaled.clamp(max=margin)
    expected = capped.sum() if reduction == "sum" else capped.mean()
    assert capped.sum() < scaled.sum()
    _, component = run(EmbeddingPush(reduction=reduction, margin=margin), VECTORS)
    torch.testing.assert_close(component, -expected)
    _, unbounded = run(EmbeddingPush(reduction=reduction, margin=1e9), VECTORS)
    torch.testing.assert_close(unbounded, run(EmbeddingPush(reduction=reduction), VECTORS)[1])


def test_margin_stops_the_push_of_a_pair_that_is_far_enough():
    vectors = VECTORS.clone().requires_grad_()
    distances = pair_distances(Plain().embed(VECTORS)).detach() / 8
    loss, _ = run(EmbeddingPush(margin=float(distances.max()) - 1e-4), vectors)
    loss.backward()
    far = int(distances.argmax())
    for pair in range(3):
        moved = vectors.grad[[pair, pair + 3]].abs().max()
        assert (moved == 0) == (pair == far)


@pytest.mark.parametrize(("kv_heads", "kv_size"), [(None, 8), (2, 4)])
def test_attention_of_projections(kv_heads, kv_size):
    """Attention written out for each head; two query heads share a key head in the second case."""
    model = Plain(kv_size=kv_size)
    hidden = model.blocks[0](model.embed(VECTORS))
    query, key = model.blocks[1].to_query(hidden), model.blocks[1].to_key(hidden)
    expected, count = torch.zeros(()), 0
    for pair in range(3):
        both, either = MASK[pair] & MASK[pair + 3], MASK[pair] | MASK[pair + 3]
        for head in range(4):
            shared = head if kv_heads is None else head // 2
            maps = []
            for row in (pair, pair + 3):
                scores = query[row, :, 2 * head : 2 * head + 2] @ key[row, :, 2 * shared : 2 * shared + 2].T
                scores = (scores / math.sqrt(2)).masked_fill(~MASK[row], -math.inf)
                maps.append(scores.softmax(-1))
            squared = (maps[0] - maps[1]).square()[both][:, either]
            expected, count = expected + squared.sum(), count + squared.numel()
    pull = AttentionPull(
        query="blocks.1.to_query", key="blocks.1.to_key", num_heads=4, num_key_value_heads=kv_heads, weight=1.0
    )
    assert pull.name == "attention_pull.blocks.1.to_query"
    loss, _ = run(pull, VECTORS, MASK, model=model)
    torch.testing.assert_close(loss, expected / count)


def test_loss_is_the_weighted_sum_and_components_are_detached():
    model = Plain()
    with attach(model, [EmbeddingPush(0.5), SentencePull(2, 4.0)]) as ear:
        assert ear.components() == {}
        model(VECTORS)
        loss = ear.loss()
        push, pull = ear.components().values()
        assert list(ear.components()) == ["embedding_push", "sentence_pull.2"]
    assert loss.shape == () and loss.dtype == torch.float32 and loss.requires_grad
    assert not push.requires_grad and not pull.requires_grad and push < 0 < pull
    torch.testing.assert_close(loss.detach(), 0.5 * push + 4.0 * pull)


def test_float64_model_gives_a_float64_loss():
    assert run(SentencePull(1), VECTORS.double(), model=Plain().double())[0].dtype == torch.float64


def test_weight_as_a_function_of_the_step():
    ramp = SentencePull(1, lambda step: min(step / 10, 1.0))
    _, component = run(ramp, VECTORS, step=5)
    for step, weight in ((0, 0.0), (5, 0.5), (10, 1.0), (99, 1.0)):
        torch.testing.assert_close(run(ramp, VECTORS, step=step)[0].detach(), weight * component)
    model = Plain()
    with attach(model, [ramp]) as ear:
        model(VECTORS)
        with pytest.raises(TypeError, match=r"sentence_pull\.1: the weight is a function of the step"):
            ear.loss()
        torch.testing.assert_close(ear.loss(step=10).detach(), component)  # the record was not lost
    with pytest.raises(TypeError, match=r"sentence_pull\.1: expected the weight at step 3 .*, got None"):
        run(SentencePull(1, lambda step: None), VECTORS, step=3)


def test_a_regulariser_of_ones_own():
    class NormOfHiddenStates(Regularizer):
        def __init__(self, layer, weight):
            super().__init__(f"norm.{layer}", weight, "mean")
            self.layer = layer

        def site(self, layout):
            return layout.hidden_states(self.layer)

        def term(self, reading, reading_aug):
            return reading.states[reading.attention_mask].square().mean()

    _, component = run(NormOfHiddenStates(2, 1.0), VECTORS, MASK)
    torch.testing.assert_close(component, Plain()(VECTORS)[MASK].square().mean().detach())


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: AttentionPull(), TypeError, "expected layer=, or query=, key= and num_heads="),
        (lambda: AttentionPull(query="a", key="b"), TypeError, "num_heads=None"),
        (lambda: AttentionPull(1, query="a"), TypeError, "got both"),
        (lambda: AttentionPull(1, num_key_value_heads=2), TypeError, "got both"),
        (lambda: AttentionPull(0), ValueError, "layer: expected at least 1"),
        (lambda: AttentionPull(True), TypeError, "layer: expected an integer"),
        (lambda: AttentionPull("6"), TypeError, "layer: expected an integer"),
        (lambda: AttentionPull(query="a", key="b", num_heads=0), ValueError, "num_heads: expected at least 1"),
        (
            lambda: AttentionPull(query="a", key="b", num_heads=6, num_key_value_heads=4),
            ValueError,
            "num_key_value_heads: expected a divisor of 6",
        ),
        (lambda: SentencePull(-1), ValueError, "layer: expected at least 1"),
        (lambda: EmbeddingPush("1"), TypeError, "weight: expected a finite number"),
        (lambda: EmbeddingPush(float("nan")), TypeError, "weight: expected a finite number"),
        (lambda: EmbeddingPush(margin=0.0), ValueError, "margin: expected None or a positive number"),
        (lambda: EmbeddingPush(reduction="none"), ValueError, "'mean', 'padded_mean', 'equations', 'sum'; got 'none'"),
        (lambda: AttentionPull(1, reduction="average"), ValueError, "got 'average'"),
        (lambda: attach(Plain(), []), ValueError, "at least one"),
        (lambda: attach(Plain(), EmbeddingPush()), TypeError, "put it in a list"),
        (lambda: attach(Plain(), ["attention_pull"]), TypeError, "got 'attention_pull'"),
        (lambda: attach("bert", [EmbeddingPush()]), TypeError, "model: expected a torch.nn.Module, got str"),
        (lambda: attach(Plain(), [SentencePull(1), SentencePull(1, 2.0)]), ValueError, "got sentence_pull.1 more than"),
    ],
)
def test_bad_arguments(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_hidden_states_that_are_none():
    class NoTensor(Plain):
        def forward(self, vectors):
            return self.blocks[0](hidden=self.embed(vectors))

    with pytest.raises(
        ValueError, match=r"embedding_push: the input of blocks\.0: expected a tensor \[B, L, C\], got NoneType"
    ):
        run(EmbeddingPush(), VECTORS, model=NoTensor())
