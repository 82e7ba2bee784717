"""The loss of each method against a computation by hand, from hidden states that the model itself returns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import BertForSequenceClassification

from ear_ops.regularizers import attach
from ear_ops.training.methods import METHODS

B, L = 3, 6


@pytest.fixture
def model(tiny_model):
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(tiny_model, num_labels=3, dtype=torch.float64)
    for module in model.modules():  # training mode without its noise
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in model.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.0
    return model.train()


@pytest.fixture
def batch() -> tuple[dict[str, Tensor], Tensor]:
    """Two views of B pairs [2B, L] with padding that differs between the views, and labels [B]."""
    torch.manual_seed(1)
    ids = torch.randint(5, 30, (2 * B, L))
    lengths = torch.tensor([6, 3, 5, 4, 6, 5])
    mask = (torch.arange(L) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}, torch.tensor([0, 2, 1])


def cross_entropies(logits: Tensor, labels: Tensor) -> list[float]:
    return [-math.log(row.exp()[label] / row.exp().sum()) for row, label in zip(logits, labels, strict=True)]


def eager_maps(model, inputs: dict[str, Tensor], layer: int) -> Tensor:
    """Attention maps [2B, H, L, L] of block `layer`, from its input and its weights."""
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[layer - 1]
    attention = model.bert.encoder.layer[layer - 1].attention.self
    query, key = (
        projection(hidden).detach().view(2 * B, L, 2, 8).transpose(1, 2)
        for projection in (attention.query, attention.key)
    )
    scores = query @ key.mT / math.sqrt(8)
    return scores.masked_fill(inputs["attention_mask"][:, None, None, :] == 0, -math.inf).softmax(-1)


def test_finetune_is_the_mean_cross_entropy_of_the_originals(make_config, model, batch) -> None:
    inputs, labels = {name: tensor[:B] for name, tensor in batch[0].items()}, batch[1]
    method = METHODS["finetune"](make_config(method="finetune"))
    step = method.step(model, inputs, labels, None)
    logits = model(**inputs).logits.detach()
    expected = sum(cross_entropies(logits, labels)) / B
    assert step.loss.item() == pytest.approx(expected)
    assert {name: term.item() for name, term in step.terms.items()} == pytest.approx({"cross_entropy": expected})
    assert not method.two_views and method.regularizers() == []


def test_rs_da_is_the_mean_over_both_views_as_separate_examples(make_config, model, batch) -> None:
    inputs, labels = batch
    method = METHODS["rs-da"](make_config(method="rs-da"))
    step = method.step(model, inputs, labels, None)
    each = cross_entropies(model(**inputs).logits.detach(), torch.cat([labels, labels]))
    assert step.loss.item() == pytest.approx(sum(each) / (2 * B))
    assert {name: term.item() for name, term in step.terms.items()} == pytest.approx(
        {"cross_entropy": sum(each[:B]) / B, "cross_entropy_augmented": sum(each[B:]) / B}
    )
    assert method.two_views and method.regularizers() == []


@pytest.mark.parametrize("reduction", ["mean", "equations", "padded_mean"])
@pytest.mark.parametrize("layer", [1, 2])
def test_ear_is_both_cross_entropies_plus_push_plus_pull(make_config, model, batch, reduction: str, layer: int) -> None:
    inputs, labels = batch
    method = METHODS["ear"](make_config(method="ear", alpha=0.7, beta=0.3, layer=layer, reduction=reduction))
    with attach(model, method.regularizers()) as attached:
        step = method.step(model, inputs, labels, attached)
    step.loss.backward()

    each = cross_entropies(model(**inputs).logits.detach(), torch.cat([labels, labels]))
    with torch.no_grad():
        embeddings = model(**inputs, output_hidden_states=True).hidden_states[0]  # [2B, L, C]
    mask = inputs["attention_mask"]
    pooled = torch.stack([rows[real.bool()].mean(0) for rows, real in zip(embeddings, mask, strict=True)])
    push = -((pooled[:B] - pooled[B:]) ** 2).sum()
    push = push / B if reduction == "equations" else push / (B * 16)

    maps = eager_maps(model, inputs, layer)
    squares = (maps[:B] - maps[B:]) ** 2  # [B, H, L, L]
    both, either = (mask[:B] * mask[B:]).bool(), (mask[:B] + mask[B:]).bool()
    counted = both[:, None, :, None] & either[:, None, None, :] & torch.ones(1, 2, 1, 1, dtype=torch.bool)
    pull = {
        "mean": squares[counted].sum() / counted.sum(),
        "equations": squares[counted].sum() / (B * 2),
        "padded_mean": squares.sum() / squares.numel(),
    }[reduction]

    expected = sum(each[:B]) / B + sum(each[B:]) / B + 0.7 * push + 0.3 * pull
    assert push.item() < 0 < pull.item()
    assert step.loss.item() == pytest.approx(expected.item())
    assert {name: term.item() for name, term in step.terms.items()} == pytest.approx(
        {
            "cross_entropy": sum(each[:B]) / B,
            "cross_entropy_augmented": sum(each[B:]) / B,
            "embedding_push": push.item(),
            f"attention_pull.{layer}": pull.item(),
        }
    )
    assert all(not term.requires_grad for term in step.terms.values())
    assert model.bert.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_without_its_regularisers_ear_is_twice_rs_da(make_config, model, batch) -> None:
    inputs, labels = batch
    ear = METHODS["ear"](make_config(method="ear", alpha=0.0, beta=0.0))
    with attach(model, ear.regularizers()) as attached:
        twice = ear.step(model, inputs, labels, attached).loss
    once = METHODS["rs-da"](make_config(method="rs-da")).step(model, inputs, labels, None).loss
    assert twice.item() == pytest.approx(2 * once.item())


def test_every_method_says_where_it_comes_from() -> None:
    for name, method in METHODS.items():
        assert "20" in (method.__doc__ or ""), name
