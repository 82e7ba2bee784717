"""``torch.compile(fullgraph=True)`` of a model, attached before or after: gradients are those of eager attention."""

from __future__ import annotations

import copy

import pytest
import torch

from ear_ops import AttentionPull, EmbeddingPush, SentencePull, attach

TERMS = (EmbeddingPush(5.0), AttentionPull(2, 30.0), SentencePull(1, 1.0))  # gradients about as large as the logits'


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model, backend="eager"):
    # What can break is the tracing: "eager" does only that, "aot_eager" the backward too, and neither generates code.
    return torch.compile(model, fullgraph=True, backend=backend)


def total_and_gradients(tools, call, model, ear, batch):
    total = call(**batch).logits.square().mean() + ear.loss()
    return total.detach(), tools.gradients(model, total)


def of_eager_attention(tools, batch):
    """The same, written out in plain torch."""
    model = tools.build_model("bert", "eager", layers=2)
    out = model(**batch, output_attentions=True, output_hidden_states=True)
    mask = batch["attention_mask"]
    push, sentence = (tools.pooled_difference(out.hidden_states[n], mask) for n in (0, 1))
    total = out.logits.square().mean() - 5.0 * push + 30.0 * tools.attention_pull(out.attentions[1], mask) + sentence
    return total.detach(), tools.gradients(model, total)


@pytest.mark.parametrize(
    ("attached", "backend"), [("before", "eager"), ("after", "aot_eager"), ("to the compiled model", "eager")]
)
def test_compiled_model_gives_the_same_loss(tools, attached, backend):
    model = tools.build_model("bert", layers=2)
    batch = tools.build_batch()
    expected, gradients = of_eager_attention(tools, batch)
    call = compiled(model, backend)
    if attached != "before":
        plain = call(**batch).logits
        assert torch.equal(plain, model(**batch).logits)
    ear = attach(call if attached == "to the compiled model" else model, TERMS)
    for _ in range(2):
        total, actual = total_and_gradients(tools, call, model, ear, batch)
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=0.0)
        tools.assert_same_gradients(actual, gradients, rtol=1e-5)
    traced = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    total_and_gradients(tools, call, model, ear, batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == traced  # not traced again every step
    with torch.no_grad():
        call(**batch)
        with pytest.raises(RuntimeError, match="no forward was recorded"):
            ear.loss()
    ear.detach()
    call(**batch)
    assert ear._recorder.both is None


def test_eager_attention_compiled_before_attach_raises_and_says_what_to_do(tools):
    """Nothing that the compiler guards on changes then."""
    model = tools.build_model("bert", "eager", layers=2)
    batch = tools.build_batch()
    call = compiled(model)
    call(**batch)
    with attach(model, TERMS) as ear:
        call(**batch)
        with pytest.raises(RuntimeError, match=r"torch\.compiler\.reset\(\)"):
            ear.loss()
        torch.compiler.reset()
        call(**batch)
        assert ear.loss().requires_grad


def test_copy_of_an_attached_model_compiles(tools):
    model = tools.build_model("bert", layers=2)
    batch = tools.build_batch()
    with attach(model, TERMS):
        copied = copy.deepcopy(model)
    assert torch.equal(compiled(copied)(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("compiled_part", ["layer", "layer in its place", "attention"])
@pytest.mark.parametrize("attached", ["before", "after"])
def test_layers_that_are_compiled_one_by_one(tools, compiled_part, attached):
    """Layers share a graph, of which one layer alone is looked at."""
    model, batch = tools.build_model("bert", layers=4), tools.build_batch()
    terms = [AttentionPull(3), SentencePull(2)]
    with attach(model, terms) as ear:
        model(**batch)
        expected = ear.loss()
    if attached == "before":
        ear = attach(model, terms)
    layers = model.bert.encoder.layer
    for index, layer in enumerate(layers):
        if compiled_part == "layer in its place":
            layers[index] = torch.compile(layer, backend="eager")
        else:
            (layer if compiled_part == "layer" else layer.attention).compile(backend="eager")
    if attached == "after":
        ear = attach(model, terms)
    for _ in range(2):
        model(**batch)
        torch.testing.assert_close(ear.loss(), expected)
    ear.detach()
