"""The ratios of gradient norms against plain autograd through a forward that is written out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import BertForSequenceClassification

from ear_ops import AttentionPull, EmbeddingPush, HiddenPull, attach
from ear_ops.diagnostics.gradient_ratios import gradient_ratios, gradient_squares

B, L = 3, 6


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "input_ids": torch.randint(5, 30, (2 * B, L)),
        "attention_mask": torch.ones(2 * B, L, dtype=torch.int64),
        "labels": torch.tensor([0, 2, 1]),
    }


@pytest.fixture
def model(tiny_model):
    torch.manual_seed(0)
    return BertForSequenceClassification.from_pretrained(tiny_model, num_labels=3, dtype=torch.float64).train()


def test_ratios_at_the_embeddings_are_those_of_plain_autograd(model, batch) -> None:
    terms = [EmbeddingPush(0.7), AttentionPull(2, 0.3)]
    state = torch.get_rng_state()
    ratios = gradient_ratios(model, terms, 2, [batch])
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(parameter.grad is None for parameter in model.parameters())

    model.eval()
    model.set_attn_implementation("eager")
    taken = {}
    model.bert.embeddings.register_forward_hook(lambda *call: taken.setdefault("embeddings", call[2]))
    own = model.bert.encoder.layer[1].attention.self
    own.query.register_forward_hook(lambda *call: taken.setdefault("query", call[2]))
    own.key.register_forward_hook(lambda *call: taken.setdefault("key", call[2]))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    output = model(**inputs, output_attentions=True)
    losses = {
        "cross_entropy": 2 * torch.nn.functional.cross_entropy(output.logits, batch["labels"].repeat(2)),
        "embedding_push": -(taken["embeddings"].mean(1)[:B] - taken["embeddings"].mean(1)[B:]).square().mean(),
        "attention_pull.2": (output.attentions[1][:B] - output.attentions[1][B:]).square().mean(),
    }
    norms = {
        (name, place): gradient.norm().item()
        for name, loss in losses.items()
        for place, gradient in zip(
            taken, torch.autograd.grad(loss, list(taken.values()), retain_graph=True, allow_unused=True), strict=True
        )
        if gradient is not None
    }
    expected = {
        f"{name} at {place}": norm / norms["cross_entropy", place]
        for (name, place), norm in norms.items()
        if name != "cross_entropy"
    }
    both = [math.hypot(norms[name, "query"], norms[name, "key"]) for name in ("attention_pull.2", "cross_entropy")]
    expected["attention_pull.2 at query and key"] = both[0] / both[1]
    assert set(ratios) == {
        "embedding_push at embeddings",
        "attention_pull.2 at embeddings",
        "attention_pull.2 at query",
        "attention_pull.2 at key",
        "attention_pull.2 at query and key",
    }
    assert ratios == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("layers", ["middle", "bert.encoder.layer.*.attention.self", [1, 2], {1: 0.5, 2: 1.0}])
def test_layers_are_what_they_are_when_attached(model, batch, layers) -> None:
    with attach(model, [AttentionPull(layers)]) as attached:
        model(**{name: batch[name] for name in ("input_ids", "attention_mask")})
        attached.loss()
        names = list(attached.components())
    ratios = gradient_ratios(model, [AttentionPull(layers)], 1, [batch])
    measured = [name.removesuffix(" at embeddings") for name in ratios if name.endswith(" at embeddings")]
    assert measured == names
    one_by_one = {}
    for name in names:
        layer = name.removeprefix("attention_pull.")
        pull = AttentionPull(int(layer) if layer.isdigit() else layer)
        one_by_one |= gradient_ratios(model, [pull], 1, [batch])
    assert ratios == one_by_one


def test_several_batches_add_up_in_squares(model, batch) -> None:
    terms, other = [EmbeddingPush(1.0)], {**batch, "labels": batch["labels"].flip(0)}
    first, second, both = (gradient_squares(model, terms, 1, each) for each in ([batch], [other], [batch, other]))
    for place, at in both.items():
        assert at == pytest.approx({name: first[place][name] + second[place][name] for name in at})
    assert first["embeddings"]["cross_entropy"] != second["embeddings"]["cross_entropy"]
    assert gradient_ratios(model, terms, 1, [batch, batch]) == pytest.approx(gradient_ratios(model, terms, 1, [batch]))


def test_with_a_teacher_the_ratios_are_those_of_plain_autograd(model, batch) -> None:
    torch.manual_seed(1)
    teacher = copy.deepcopy(model).train()
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    one_view = {**{name: batch[name][:B] for name in ("input_ids", "attention_mask")}, "labels": batch["labels"]}
    terms = [AttentionPull(1, 0.3), HiddenPull(1)]
    ratios = gradient_ratios(model, terms, 1, [one_view, one_view], teacher=teacher, layer_map={1: 2})
    assert model.training and teacher.training

    model.eval()
    teacher.eval()
    taken = {}
    model.bert.embeddings.register_forward_hook(lambda *call: taken.setdefault("embeddings", call[2]))
    inputs = {name: one_view[name] for name in ("input_ids", "attention_mask")}
    outputs = []
    for each in (model, teacher):
        each.set_attn_implementation("eager")
        outputs.append(each(**inputs, output_attentions=True, output_hidden_states=True))
    student, target = outputs
    losses = {
        "cross_entropy": torch.nn.functional.cross_entropy(student.logits, one_view["labels"]),
        "attention_pull.1": (student.attentions[0] - target.attentions[1].detach()).square().mean(),
        "hidden_pull.1": (student.hidden_states[1] - target.hidden_states[2].detach()).square().mean(),
    }
    norms = {
        name: torch.autograd.grad(loss, taken["embeddings"], retain_graph=True)[0].norm().item()
        for name, loss in losses.items()
    }
    for name in ("attention_pull.1", "hidden_pull.1"):
        assert ratios[f"{name} at embeddings"] == pytest.approx(norms[name] / norms["cross_entropy"], rel=1e-6)
    assert {name for name in ratios if "query and key" in name} == {
        f"{name} at query and key" for name in list(losses)[1:]
    }


def test_words_are_compared_where_the_term_compares_words(model, batch) -> None:
    pull = AttentionPull(2, alignment="word")
    with pytest.raises(TypeError, match=r"attention_pull\.2: it compares words, so it needs word_ids"):
        gradient_ratios(model, [pull], 2, [batch])
    words = torch.tensor([[-1, 0, 0, 1, 2, -1]]).repeat(2 * B, 1)
    ratios = gradient_ratios(model, [pull], 2, [{**batch, "word_ids": words}])
    taken = {}
    model.bert.embeddings.register_forward_hook(lambda *call: taken.setdefault("embeddings", call[2]))
    with attach(model.eval(), [pull]) as ear:
        logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
        term, cross_entropy = ear.terms(word_ids=words)[pull.name], torch.nn.functional.cross_entropy
        losses = term, 2 * cross_entropy(logits, batch["labels"].repeat(2))
    norms = [torch.autograd.grad(loss, taken["embeddings"], retain_graph=True)[0].norm().item() for loss in losses]
    assert ratios["attention_pull.2 at embeddings"] == pytest.approx(norms[0] / norms[1], rel=1e-6)
    tokens = gradient_ratios(model, [AttentionPull(2)], 2, [{**batch, "word_ids": words}])
    assert ratios != pytest.approx(tokens, rel=1e-2)


def test_names_are_unique_as_when_attached(model, batch) -> None:
    with pytest.raises(ValueError, match=r"another name for each, got attention_pull\.1 more than once"):
        gradient_ratios(model, [AttentionPull(1), AttentionPull(1, divergence="js")], 1, [batch])
    with pytest.raises(TypeError, match="expected a list of regularisers"):
        gradient_ratios(model, AttentionPull(1), 1, [batch])


def test_every_module_keeps_its_mode(model, batch) -> None:
    model.train().bert.encoder.eval()
    modes = [module.training for module in model.modules()]
    gradient_ratios(model, [EmbeddingPush()], 1, [batch])
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2


def test_what_is_no_batch_is_refused(model, batch) -> None:
    with pytest.raises(TypeError, match=r"batches: expected several batches, .* got str .*; pass \[batch\]"):
        gradient_ratios(model, [EmbeddingPush()], 1, batch)
    del batch["labels"]
    with pytest.raises(
        ValueError, match="batches: expected 'labels' in every batch, got 'input_ids', 'attention_mask'"
    ):
        gradient_ratios(model, [EmbeddingPush()], 1, [batch])


def test_frozen_embeddings_are_not_looked_at(model, batch) -> None:
    terms = [EmbeddingPush(), AttentionPull(2)]
    whole = gradient_ratios(model, terms, 2, [batch])
    model.bert.embeddings.requires_grad_(False)
    ratios = gradient_ratios(model, terms, 2, [batch])
    assert ratios == pytest.approx({name: whole[name] for name in whole if "embeddings" not in name}) and ratios


def test_a_projection_is_made_before_it_is_measured(model, batch) -> None:
    pull = HiddenPull(2, projection="linear")
    state = torch.get_rng_state()
    first = gradient_ratios(model, [pull], 2, [batch])["hidden_pull.2 at embeddings"]
    assert pull.projection is not None and torch.equal(torch.get_rng_state(), state)
    unprojected = gradient_ratios(model, [HiddenPull(2)], 2, [batch])["hidden_pull.2 at embeddings"]
    attach(model, [pull]).detach()
    assert gradient_ratios(model, [pull], 2, [batch])["hidden_pull.2 at embeddings"] == first != unprojected
