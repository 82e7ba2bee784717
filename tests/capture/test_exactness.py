"""The promise: loss and gradients are those of eager ``output_attentions``, and the model's own output is unchanged."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.modeling_utils import AttentionInterface

from ear_ops import AttentionPull, EmbeddingPush, SentencePull, attach

ENCODERS = ("bert", "xlm-roberta", "roberta", "distilbert")
DECODERS = ("llama", "mistral")
LAYER = 3


def expected_total(tools, model, batch):
    """The logits' sum and the three terms from a model run with eager attention, in plain torch."""
    out = model(**batch, output_attentions=True, output_hidden_states=True)
    mask = batch.get("attention_mask")
    pull = tools.attention_pull(out.attentions[LAYER - 1], mask)
    push = -tools.pooled_difference(out.hidden_states[0], mask)
    sentence = tools.pooled_difference(out.hidden_states[LAYER], mask)
    return out.logits.square().sum() + 0.5 * push + 3.0 * pull + 0.25 * sentence, (push, pull, sentence)


def attached_total(model, batch):
    terms = [EmbeddingPush(0.5), AttentionPull(LAYER, 3.0), SentencePull(LAYER, 0.25)]
    with attach(model, terms) as ear:
        out = model(**batch)
        return out.logits.square().sum() + ear.loss(), tuple(ear.components().values()), out.logits


def check(tools, kind, implementation, batch, device="cpu"):
    oracle = tools.build_model(kind, "eager").to(device)
    model = tools.build_model(kind, implementation).to(device)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    with torch.no_grad():
        plain = model(**batch).logits
    total, terms = expected_total(tools, oracle, batch)
    actual, components, logits = attached_total(model, batch)
    assert torch.equal(logits, plain)  # bit for bit
    assert float(terms[1].detach()) > 1e-4  # the maps differ, so the comparison means something
    for component, term in zip(components, terms, strict=True):
        torch.testing.assert_close(component, term.detach(), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(actual, total, rtol=1e-5, atol=0.0)
    tools.assert_same_gradients(tools.gradients(model, actual), tools.gradients(oracle, total))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_padded_batch(tools, kind, implementation, model_device):
    check(tools, kind, implementation, tools.build_batch(), model_device)


@pytest.mark.parametrize("kind", ENCODERS)
def test_batch_without_a_mask(tools, kind):
    batch = tools.build_batch(length=7)
    del batch["attention_mask"]
    batch["input_ids"] = batch["input_ids"].clamp(min=3)
    check(tools, kind, "sdpa", batch)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", DECODERS)
def test_causal_model_with_grouped_queries(tools, kind, implementation, side):
    check(tools, kind, implementation, tools.build_batch(side=side))


@pytest.mark.parametrize("kind", DECODERS)
def test_causal_model_without_a_mask(tools, kind):
    batch = tools.build_batch(length=9)
    del batch["attention_mask"]
    batch["input_ids"] = batch["input_ids"].clamp(min=3)
    check(tools, kind, "sdpa", batch)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_bidirectional_window_and_rotary_embedding(tools, implementation):
    check(tools, "modernbert", implementation, tools.build_batch(length=12))


@pytest.mark.parametrize("mask_kind", ["bool", "additive"])
def test_four_dimensional_mask(tools, mask_kind):
    """A mask that the user built: the keys that exist are those attended to, and packed rows stay apart."""
    model, oracle = tools.build_model("bert", "sdpa"), tools.build_model("bert", "eager")
    batch = tools.build_batch()
    keys = batch["attention_mask"].bool()
    segment = (torch.arange(9) >= 4).long()  # two sequences packed into each row
    allowed = (keys[:, None, :] & keys[:, :, None] & (segment[:, None] == segment[None, :]))[:, None]
    allowed = allowed | torch.zeros(6, 1, 9, 9, dtype=torch.bool)
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    attn = oracle(input_ids=batch["input_ids"], attention_mask=additive, output_attentions=True).attentions[LAYER - 1]
    with attach(model, [AttentionPull(LAYER)]) as ear:
        model(input_ids=batch["input_ids"], attention_mask=allowed if mask_kind == "bool" else additive)
        ear.loss()
    expected = tools.attention_pull(attn, batch["attention_mask"])
    torch.testing.assert_close(ear.components()["attention_pull.3"], expected.detach(), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_encoder_of_an_encoder_decoder_with_position_bias(tools, implementation):
    """T5: unscaled scores plus a learned bias that only the loss treats as a constant."""
    config = transformers.T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=4, num_decoder_layers=4, num_heads=4, dropout_rate=0.0
    )
    batch = tools.build_batch()
    decoder = {"decoder_input_ids": batch["input_ids"][:, :3]}
    losses = []
    for attention in ("eager", implementation):
        torch.manual_seed(0)
        model = transformers.T5ForConditionalGeneration._from_config(config, attn_implementation=attention).train()
        if not losses:
            out = model(**batch, **decoder, output_attentions=True)
            losses.append(tools.attention_pull(out.encoder_attentions[LAYER - 1], batch["attention_mask"]))
        with attach(model, [AttentionPull(LAYER, 1.0)]) as ear:
            model(**batch, **decoder)
            losses.append(ear.loss())
    assert float(losses[0].detach()) > 1e-6
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0.0)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-5, atol=0.0)


@pytest.fixture
def flash_stand_in():
    """Flash attention is not at hand: the same signature and mask ``[B, K]``, computed in plain torch."""

    def flash(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = scaling * query @ key.transpose(-1, -2)
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool)
        if module.is_causal:
            allowed = allowed.tril()
        if kwargs.get("sliding_window") is not None:
            allowed = allowed & ~allowed.tril(-kwargs["sliding_window"])
        if attention_mask is not None:
            assert attention_mask.dim() == 2
            allowed = allowed & attention_mask.bool()[:, None, None, :]
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    original = AttentionInterface()["flash_attention_2"]
    AttentionInterface.register("flash_attention_2", flash)
    yield
    AttentionInterface.register("flash_attention_2", original)


@pytest.mark.parametrize("kind", ["bert", "mistral"])
def test_stand_in_for_flash_attention(tools, flash_stand_in, kind):
    model, oracle = tools.build_model(kind), tools.build_model(kind, "eager")
    model.config._attn_implementation = "flash_attention_2"
    batch = tools.build_batch()
    total, terms = expected_total(tools, oracle, batch)
    actual, components, _ = attached_total(model, batch)
    for component, term in zip(components, terms, strict=True):
        torch.testing.assert_close(component, term.detach(), rtol=1e-5, atol=1e-8)
    tools.assert_same_gradients(tools.gradients(model, actual), tools.gradients(oracle, total))


def test_projections_give_what_the_layer_gives(tools):
    model = tools.build_model("bert")
    batch = tools.build_batch()
    path = "bert.encoder.layer.2.attention.self"
    by_path = AttentionPull(query=f"{path}.query", key=f"{path}.key", num_heads=4, weight=1.0)
    results = []
    for regularizer in (by_path, AttentionPull(3, 1.0)):
        with attach(model, [regularizer]) as ear:
            model(**batch)
            loss = ear.loss()
            results.append((loss.detach(), tools.gradients(model, loss)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0.0)
    tools.assert_same_gradients(results[0][1], results[1][1], rtol=1e-6)


def test_two_forwards_equal_one(tools):
    model = tools.build_model("bert")
    batch = tools.build_batch()
    terms = [EmbeddingPush(0.5), AttentionPull(LAYER, 3.0), SentencePull(LAYER, 0.25)]
    with attach(model, terms) as ear:
        model(**batch)
        once = tools.gradients(model, ear.loss())
        once_components = ear.components()
        with ear.view("original"):
            model(**{name: tensor[:3] for name, tensor in batch.items()})
        with ear.view("augmented"):
            model(**{name: tensor[3:] for name, tensor in batch.items()})
        twice = tools.gradients(model, ear.loss())
    for name, component in ear.components().items():
        torch.testing.assert_close(component, once_components[name], rtol=1e-5, atol=1e-9)
    tools.assert_same_gradients(twice, once)


def test_two_forwards_where_only_one_has_a_mask(tools):
    model = tools.build_model("bert")
    batch = tools.build_batch()
    batch["attention_mask"][:3] = 1
    with attach(model, [EmbeddingPush(), AttentionPull(LAYER)]) as ear:
        model(**batch)
        once = ear.loss()
        with ear.view("original"):
            model(input_ids=batch["input_ids"][:3])
        with ear.view("augmented"):
            model(**{name: tensor[3:] for name, tensor in batch.items()})
        torch.testing.assert_close(ear.loss(), once, rtol=1e-5, atol=1e-9)


def test_a_view_without_grad_is_a_constant_target(tools):
    model = tools.build_model("bert")
    batch = tools.build_batch()
    with attach(model, [AttentionPull(LAYER, 1.0)]) as ear:
        with ear.view("original"), torch.no_grad():
            model(**{name: tensor[:3] for name, tensor in batch.items()})
        with ear.view("augmented"):
            out = model(**{name: tensor[3:] for name, tensor in batch.items()})
        actual = tools.gradients(model, ear.loss())
    del out
    oracle = tools.build_model("bert", "eager")
    attn = oracle(**batch, output_attentions=True).attentions[LAYER - 1]
    attn = torch.cat([attn[:3].detach(), attn[3:]])
    tools.assert_same_gradients(actual, tools.gradients(oracle, tools.attention_pull(attn, batch["attention_mask"])))


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_bfloat16_autocast(tools, kind, monkeypatch):
    """The loss is the same whether it is called inside or outside, also where torch operations compute it."""
    monkeypatch.setenv("EAR_OPS_BACKEND", "reference")
    model, oracle = tools.build_model(kind), tools.build_model(kind, "eager")
    batch = tools.build_batch()
    results = []
    with attach(model, [AttentionPull(LAYER, 1.0), EmbeddingPush(1.0)]) as ear:
        for inside in (True, False):
            with torch.autocast("cpu", torch.bfloat16):
                model(**batch)
                loss = ear.loss() if inside else None
            loss = loss if inside else ear.loss()
            results.append(loss)
            assert all(torch.isfinite(g).all() for g in tools.gradients(model, loss).values())
    assert torch.equal(*results) and results[0].dtype == torch.float32
    expected = oracle(**batch, output_attentions=True).attentions[LAYER - 1]
    expected = tools.attention_pull(expected, batch["attention_mask"]).detach()
    torch.testing.assert_close(ear.components()["attention_pull.3"], expected, rtol=0.2, atol=0.0)


def test_two_training_steps_in_a_bare_loop(tools):
    batch = tools.build_batch()

    def train(implementation, regularised):
        model = tools.build_model("bert", implementation)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        for _ in range(2):
            total = regularised(model, batch)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            losses.append(float(total.detach()))
        return losses, model

    expected, oracle = train("eager", lambda model, batch: expected_total(tools, model, batch)[0])
    actual, model = train("sdpa", lambda model, batch: attached_total(model, batch)[0])
    assert expected[1] != expected[0]
    assert actual == pytest.approx(expected, rel=1e-4)
    for (name, parameter), reference in zip(model.named_parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(parameter, reference, rtol=1e-3, atol=1e-5, msg=name)
