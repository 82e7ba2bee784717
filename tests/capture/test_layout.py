"""Everything that can be wrong with a request is found at attach time, and the model is left as it was."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_utils import AttentionInterface

from ear_ops import AttentionPull, EmbeddingPush, SentencePull, attach

SMALL = {"vocab_size": 60, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
BY_PATH = {"query": "bert.encoder.layer.1.attention.self.query", "key": "bert.encoder.layer.1.attention.self.key"}


def refused(model, regularizer, error, match):
    """The request raises, also beside a good one, and nothing is left on the model."""
    registry = dict(AttentionInterface())
    lookup = AttentionInterface.get_interface
    for regularizers in ([regularizer], [EmbeddingPush(), regularizer]):
        with pytest.raises(error, match=match):
            attach(model, regularizers)
    assert dict(AttentionInterface()) == registry and AttentionInterface.get_interface is lookup
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and "_ear_taps" not in module.__dict__


@pytest.mark.parametrize("regularizer", [AttentionPull(5), SentencePull(5)])
def test_layer_out_of_range_says_how_many_there_are(tools, regularizer):
    refused(tools.build_model("bert"), regularizer, ValueError, r"layer: expected 1 to 4, .* has 4 layers .*; got 5")


def test_unknown_path_suggests_a_known_one(tools):
    pull = AttentionPull(query="encoder.query", key=BY_PATH["key"], num_heads=4)
    refused(tools.build_model("bert"), pull, ValueError, r"query: .*no module 'encoder\.query'.*layer\.0\.attention")


def test_heads_that_do_not_divide(tools):
    refused(tools.build_model("bert"), AttentionPull(**BY_PATH, num_heads=5), ValueError, "query: the 32 features")


def test_fused_projection(tools):
    pull = AttentionPull(query=BY_PATH["key"], key=BY_PATH["key"], num_heads=4)
    refused(tools.build_model("bert"), pull, ValueError, "fused projection")


def test_projections_before_a_rotary_embedding(tools):
    path = "model.layers.1.self_attn"
    pull = AttentionPull(query=f"{path}.q_proj", key=f"{path}.k_proj", num_heads=4, num_key_value_heads=2)
    refused(tools.build_model("llama"), pull, ValueError, r"LlamaRotaryEmbedding.*use layer=")


def test_attention_that_is_no_softmax():
    config = transformers.FNetConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        pad_token_id=0,
        hidden_dropout_prob=0.0,
    )
    model = transformers.FNetModel(config)
    refused(model, AttentionPull(1), ValueError, "layer 1 .*FNetLayer.* no self-attention that calls")
    with attach(model, [EmbeddingPush(), SentencePull(2)]) as ear:  # hidden states need no attention
        hidden = model(torch.randint(3, 60, (2, 5)), output_hidden_states=True).hidden_states
        ear.loss()
    expected = [-(hidden[i].mean(1)[0] - hidden[i].mean(1)[1]).square().mean() for i in (0, 2)]
    torch.testing.assert_close(ear.components()["embedding_push"], expected[0].detach())
    torch.testing.assert_close(ear.components()["sentence_pull.2"], -expected[1].detach())


def test_attention_sinks():
    config = transformers.GptOssConfig(
        **SMALL, num_hidden_layers=2, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, head_dim=8
    )
    refused(transformers.GptOssModel(config), AttentionPull(1), ValueError, r"layers\.0\.self_attn .*attention sinks")


@pytest.mark.parametrize(
    ("layer", "error", "match"),
    [
        (
            "bert.encoder.layer.9.attention",
            ValueError,
            r"no module 'bert\.encoder\.layer\.9\.attention'; attentions of",
        ),
        ("bert.encoder.layer.*.attention.other", ValueError, "no module path of .* matches"),
        ("bert.encoder.layer.*.intermediate", ValueError, "matches 4 modules of .*, none of them an attention"),
        ("bert.encoder", ValueError, r"expected one attention at 'bert\.encoder', found bert\.encoder\.layer\.0"),
        ([1, 5], ValueError, "expected 1 to 4"),
        ([2, "middle"], ValueError, r"another name for each, got attention_pull\.2"),
    ],
)
def test_layers_that_do_not_resolve(tools, layer, error, match):
    refused(tools.build_model("bert"), AttentionPull(layer), error, match)


def test_two_models_in_one():
    class TwoTowers(nn.Module):
        def __init__(self):
            super().__init__()
            config = transformers.BertConfig(**SMALL, num_hidden_layers=2)
            self.left, self.right = transformers.BertModel(config), transformers.BertModel(config)

    refused(
        TwoTowers(), AttentionPull(1), ValueError, r"holds several models \(left \(BertModel\), right \(BertModel\)\)"
    )


def test_module_without_layers():
    refused(nn.Linear(2, 2), SentencePull(1), ValueError, "found no module list in Linear")


def test_decoder_with_cross_attention(tools):
    """The self-attention of a block, not its cross-attention."""
    config = transformers.BertConfig(
        **SMALL, num_hidden_layers=2, is_decoder=True, add_cross_attention=True, attention_probs_dropout_prob=0.0
    )
    torch.manual_seed(0)
    model = transformers.BertModel._from_config(config, attn_implementation="eager")
    batch = tools.build_batch()
    with attach(model, [AttentionPull(2)]) as ear:
        out = model(**batch, encoder_hidden_states=torch.randn(6, 4, 32), output_attentions=True, use_cache=False)
        ear.loss()
    expected = tools.attention_pull(out.attentions[1], batch["attention_mask"]).detach()
    assert expected > 0
    torch.testing.assert_close(ear.components()["attention_pull.2"], expected, rtol=1e-5, atol=0.0)


def test_layers_of_an_encoder_decoder_are_the_encoders():
    config = transformers.BartConfig(
        vocab_size=60, d_model=32, encoder_layers=3, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
    )  # fmt: skip
    refused(transformers.BartModel(config), AttentionPull(4), ValueError, r"expected 1 to 3.*\(encoder\.layers\)")


def test_mask_of_the_model_inside_a_plain_wrapper(tools):
    """The mask is the one that the model received, under whatever name the wrapper takes it."""

    class Wrapper(nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder = encoder

        def forward(self, tokens, real):
            return self.encoder(tokens, real).logits

    batch = tools.build_batch()
    model = tools.build_model("bert")
    with attach(model, [AttentionPull(2), EmbeddingPush()]) as ear:
        model(**batch)
        expected = ear.loss()
    wrapper = Wrapper(model)
    with attach(wrapper, [AttentionPull(2), EmbeddingPush()]) as ear:
        wrapper(batch["input_ids"], batch["attention_mask"])
        assert torch.equal(ear.loss(), expected)


@pytest.mark.parametrize(("regularizer", "argument"), [(EmbeddingPush(), "model"), (SentencePull(1), "layer")])
def test_a_model_with_two_stacks_is_refused_by_what_a_pooled_regulariser_has(regularizer, argument):
    """Neither takes the path of an attention, and the push has no layer at all."""
    config = {**SMALL, "num_hidden_layers": 2}
    vision = {**config, "image_size": 8, "patch_size": 4}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=config, vision_config=vision, projection_dim=8))
    stacks = r"text_model.encoder.layers \(2 entries\), vision_model.encoder.layers \(2 entries\)"
    words = (
        rf"^{argument}: several module lists of CLIPModel .*{stacks}; attach to the submodel that has only one of them$"
    )
    for refusing, refusal in (
        (model, words),
        (nn.Linear(2, 2), rf"^{argument}: found no module list .*one nn.ModuleList$"),
    ):
        with pytest.raises(ValueError, match=refusal):
            attach(refusing, [regularizer])


class Engine(nn.Module):
    """Keeps its model as ``.module``, as the engine of DeepSpeed does."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **batch):
        return self.module(**batch)


@pytest.mark.parametrize("wrapped", [Engine, lambda model: Engine(Engine(model))], ids=["once", "twice"])
@pytest.mark.parametrize(
    "pull",
    [
        lambda: AttentionPull("bert.encoder.layer.1.attention.self"),
        lambda: AttentionPull("bert.encoder.layer.*.attention.self"),
        lambda: AttentionPull(**BY_PATH, num_heads=4),
        lambda: AttentionPull(2),
    ],
    ids=["path", "pattern", "projections", "number"],
)
def test_paths_are_those_of_the_model_inside_a_wrapper(tools, wrapped, pull):
    model = tools.build_model("bert")
    batch = tools.build_batch()
    found = []
    for root in (model, wrapped(model)):
        with attach(root, [pull()]) as ear:
            root(**batch)
            ear.loss()
            found.append(ear.components())
        teacher = tools.build_model("bert", seed=1).eval()
        with attach(root, [pull()], teacher=teacher) as ear:
            with torch.no_grad():
                teacher(**batch)
            root(**batch)
            ear.loss()
            found.append(ear.components())
    assert found[:2] == found[2:] and found[0].keys() == found[1].keys()
    refused(wrapped(model), AttentionPull("encoder.nowhere"), ValueError, "has no module 'encoder.nowhere'")
