"""Which layers an attention pull stands for: numbers, names, paths and patterns, in encoders and decoders."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import transformers
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_utils import AttentionInterface

from ear_ops import AttentionPull, EmbeddingPush, attach
from ear_ops.capture import Layout

PATH = "bert.encoder.layer.{}.attention.self"


def terms(model, batch, regularizers, **call):
    with attach(model, regularizers) as ear:
        model(**batch)
        return ear.loss(**call), ear.components()


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        ("all", [1, 2, 3, 4]),
        ("middle", [2]),
        ([3, 1], [3, 1]),
        (PATH.format(2), [PATH.format(2)]),
        ("bert.encoder.layer.0", ["bert.encoder.layer.0"]),
        ("bert.encoder.layer.[13].*", [PATH.format(1), PATH.format(3)]),
        ([4, "*.0.attention.*"], [4, PATH.format(0)]),
    ],
)
def test_layers(tools, layer, names):
    model, batch = tools.build_model("bert"), tools.build_batch()
    maps = tools.build_model("bert", "eager")(**batch, output_attentions=True).attentions
    loss, components = terms(model, batch, [AttentionPull(layer, 0.5)])
    assert list(components) == [f"attention_pull.{name}" for name in names]
    for name, component in zip(names, components.values(), strict=True):
        number = name if isinstance(name, int) else int(name.split(".")[3]) + 1
        expected = tools.attention_pull(maps[number - 1], batch["attention_mask"]).detach()
        torch.testing.assert_close(component, expected, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(loss.detach(), 0.5 * sum(components.values()))


def test_factors_of_the_weight(tools):
    model, batch = tools.build_model("bert"), tools.build_batch()
    pull = AttentionPull({2: 1.0, "bert.encoder.layer.3": 0.25}, weight=lambda step: 0.1 * step)
    loss, components = terms(model, batch, [pull], step=3)
    first, second = components.values()
    torch.testing.assert_close(loss.detach(), 0.3 * first + 0.075 * second)
    assert pull.layer == {2: 1.0, "bert.encoder.layer.3": 0.25}  # as it was: it may be attached again


@pytest.mark.parametrize("layer", [[], {}, "", {2: float("nan")}, {2: "x"}, [2.0], [0]])
def test_layers_that_are_none(layer):
    with pytest.raises((TypeError, ValueError), match=r"^layer: "):
        AttentionPull(layer)


def bart(implementation):
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=60, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, dropout=0.0,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = transformers.BartModel._from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
    return model.train()


def cross_pull(attn, queries, keys):
    """Mean of (P - T)^2 of a map ``[2B, H, L, S]``; ``queries`` [2B, L] and ``keys`` [2B, S]: the real ones."""
    half = len(attn) // 2
    query = (queries[:half] & queries[half:]).to(attn.dtype)
    key = (keys[:half] | keys[half:]).to(attn.dtype)
    weight = query[:, None, :, None] * key[:, None, None, :]
    return ((attn[:half] - attn[half:]).square() * weight).sum() / (attn.shape[1] * weight.sum())


@pytest.mark.parametrize("length", [5, 9])  # 9: as long as the encoder's, so that no shape tells the masks apart
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_decoder_and_cross_attention(tools, implementation, length):
    model, oracle = bart(implementation), bart("eager")
    batch = tools.build_batch()
    target = tools.build_batch(length=length, seed=2)
    batch |= {"decoder_input_ids": target["input_ids"], "decoder_attention_mask": target["attention_mask"]}
    batch["use_cache"] = False
    out = oracle(**batch, output_attentions=True)
    source, decoded = batch["attention_mask"].bool(), batch["decoder_attention_mask"].bool()
    expected = [
        cross_pull(out.decoder_attentions[1], decoded, decoded),
        cross_pull(out.cross_attentions[1], decoded, source),
        cross_pull(out.encoder_attentions[1], source, source),
    ]
    layers = ["decoder.layers.1.self_attn", "decoder.layers.1.encoder_attn", 2]
    loss, components = terms(model, batch, [AttentionPull(layers, 1.0)])
    for component, term in zip(components.values(), expected, strict=True):
        assert float(term.detach()) > 1e-4
        torch.testing.assert_close(component, term.detach(), rtol=1e-5, atol=0.0)
    tools.assert_same_gradients(tools.gradients(model, loss), tools.gradients(oracle, sum(expected)))


def test_masks_of_a_decoder_that_is_no_model_of_its_own():
    """The whole model receives the masks then: the encoder's under the plain name, the decoder's under another."""
    config = transformers.FSMTConfig(
        langs=["en", "de"], src_vocab_size=60, tgt_vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
    )  # fmt: skip
    layout = Layout(transformers.FSMTModel(config))
    masks = {}
    for path in ("encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.encoder_attn"):
        site = layout.attention(path)
        masks[path] = site.model, site.key_mask, site.query_mask
    assert list(masks.values()) == [
        ("", "attention_mask", "attention_mask"),
        ("", "decoder_attention_mask", "decoder_attention_mask"),
        ("", "attention_mask", "decoder_attention_mask"),
    ]


def test_cross_attention_without_masks(tools):
    model, oracle = bart("sdpa"), bart("eager")
    ids = {"input_ids": torch.randint(3, 60, (4, 6)), "decoder_input_ids": torch.randint(3, 60, (4, 6))}
    out = oracle(**ids, output_attentions=True)
    _, components = terms(model, ids, [AttentionPull("decoder.layers.0.encoder_attn")])
    everything = torch.ones(4, 6, dtype=torch.bool)
    expected = cross_pull(out.cross_attentions[0], everything, everything).detach()
    torch.testing.assert_close(*components.values(), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("kind", ["bert", "mistral"])
def test_stand_in_for_flex_attention(tools, kind):
    """Its masks are functions of positions; under its own name, computed in plain torch."""
    masks = []

    def flex(module, query, key, value, attention_mask, scaling=None, **kwargs):
        masks.append(attention_mask)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        rows, _, length, _ = query.shape
        allowed = torch.nn.attention.flex_attention.create_mask(
            attention_mask.mask_mod, rows, 1, length, length, device="cpu"
        )
        scores = (scaling * query @ key.transpose(-1, -2)).masked_fill(~allowed, torch.finfo(query.dtype).min)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    original = AttentionInterface()["flex_attention"]
    AttentionInterface.register("flex_attention", flex)
    try:
        model, oracle = tools.build_model(kind), tools.build_model(kind, "eager")
        model.config._attn_implementation = "flex_attention"
        batch = tools.build_batch()
        attn = oracle(**batch, output_attentions=True).attentions[2]
        expected = tools.attention_pull(attn, batch["attention_mask"])
        loss, _ = terms(model, batch, [AttentionPull(3, 1.0)])
    finally:
        AttentionInterface.register("flex_attention", original)
    assert isinstance(masks[0], BlockMask)
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=0.0)
    tools.assert_same_gradients(tools.gradients(model, loss), tools.gradients(oracle, expected))


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.parametrize("order", ["attach, then adapt", "adapt, then attach"])
def test_lora(tools, order):
    """The adapters get the gradients that eager attention gives them; the rest is frozen."""
    import peft

    def adapt(model):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, target_modules=["query", "key"], init_lora_weights=False, lora_dropout=0.0)
        return peft.get_peft_model(model, config)

    batch = tools.build_batch()
    base = tools.build_model("bert")
    if order == "attach, then adapt":
        ear = attach(base, [AttentionPull(3, 1.0)])
        model = adapt(base)
    else:
        model = adapt(base)
        ear = attach(model, [AttentionPull(3, 1.0)])
    oracle = adapt(tools.build_model("bert", "eager"))
    with ear:
        model(**batch)
        loss = ear.loss()
    expected = tools.attention_pull(oracle(**batch, output_attentions=True).attentions[2], batch["attention_mask"])
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=0.0)
    actual, reference = tools.gradients(model, loss), tools.gradients(oracle, expected)
    tools.assert_same_gradients(actual, reference)
    trained = [name for name, gradient in actual.items() if gradient.abs().max() > 0]
    assert trained and all("lora" in name for name in trained)


def test_a_projection_that_was_replaced_is_refused(tools):
    """As peft does: what was tapped lies inside of what replaced it, and lacks the adapter."""
    model, path = tools.build_model("bert"), "bert.encoder.layer.2.attention.self"
    with attach(model, [AttentionPull(query=f"{path}.query", key=f"{path}.key", num_heads=4, name="pull")]) as ear:
        model(**tools.build_batch())
        ear.loss()
        inside = model.get_submodule(path)
        inside.query = torch.nn.Sequential(inside.query)
        model(**tools.build_batch())
        with pytest.raises(
            RuntimeError, match=rf"pull: {path}.query was replaced by Sequential after attach.*again after"
        ):
            ear.loss()


def test_two_terms_of_one_kind_on_one_layer_have_names(tools):
    model, batch = tools.build_model("bert"), tools.build_batch()
    mean, summed = AttentionPull(2), AttentionPull(2, reduction="sum", name="sum_of_pull")
    with attach(model, [mean, summed, AttentionPull([1, 2], name="several")]) as ear:
        model(**batch)
        ear.loss()
        terms = ear.components()
    assert list(terms) == ["attention_pull.2", "sum_of_pull", "several.1", "several.2"]
    assert terms["sum_of_pull"] > terms["attention_pull.2"] == terms["several.2"]
    assert AttentionPull("middle", name="chosen").expand(Layout(model))[0].name == "chosen"
    with pytest.raises(ValueError, match=r"got attention_pull\.2 more than once; pass name="):
        attach(model, [mean, AttentionPull(2, reduction="sum")])
    with pytest.raises(TypeError, match="name: expected a text that is not empty, got ''"):
        EmbeddingPush(name="")
