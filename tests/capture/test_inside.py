"""Attention that no interface reports: seen inside the module, exact, and leaving nothing open."""

from __future__ import annotations

import copy
import gc
import pickle
import threading

import pytest
import torch
import transformers
from torch import nn
from torch.overrides import _len_torch_function_stack

from ear_ops import AttentionPull, EmbeddingPush, SentencePull, attach

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "intermediate_size": 48}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

CONFIGS = {
    "deberta": lambda: transformers.DebertaV2Config(
        **SIZES, **QUIET, relative_attention=True, pos_att_type=["p2c", "c2p"], max_relative_positions=16
    ),
    "mpnet": lambda: transformers.MPNetConfig(**SIZES, **QUIET, **IDS),
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=60, hidden_size=32, n_layer=3, n_head=4, hidden_dropout=0.0, attention_dropout=0.0, **IDS
    ),
    "falcon": lambda: transformers.FalconConfig(
        **SIZES, **IDS, multi_query=False, new_decoder_architecture=False, hidden_dropout=0.0, attention_dropout=0.0
    ),
    "xlm": lambda: transformers.XLMConfig(
        vocab_size=60, emb_dim=32, n_layers=3, n_heads=4, dropout=0.0, attention_dropout=0.0, pad_index=0
    ),
    "longformer": lambda: transformers.LongformerConfig(**SIZES, **QUIET, **IDS, attention_window=4),
}


def build(kind, implementation=None):
    torch.manual_seed(0)
    how = {} if implementation is None else {"attn_implementation": implementation}
    model = transformers.AutoModel.from_config(CONFIGS[kind](), **how)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
    return model.train()


def gradients_with(tools, model, batch, regularizer):
    with attach(model, [regularizer]) as ear:
        states = model(**batch)[0]
        loss = ear.loss()
        return states, loss.detach(), tools.gradients(model, loss)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["deberta", "mpnet", "bloom", "falcon", "xlm"])
def test_loss_and_gradients_are_those_of_eager_attention(tools, kind, side):
    model, oracle = build(kind), build(kind, "eager")
    batch = tools.build_batch(side=side)
    attn = oracle(**batch, output_attentions=True).attentions[1]
    expected = tools.attention_pull(attn, batch["attention_mask"])
    with torch.no_grad():
        plain = model(**batch)[0]
    states, loss, gradients = gradients_with(tools, model, batch, AttentionPull(2, 1.0))
    assert torch.equal(states, plain)
    assert float(expected.detach()) > 1e-4
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0.0)
    tools.assert_same_gradients(gradients, tools.gradients(oracle, expected))
    assert _len_torch_function_stack() == 0


@pytest.mark.parametrize("kind", ["deberta", "mpnet", "bloom", "falcon"])
def test_regularizers_that_share_a_layer_leave_nothing_open(tools, kind):
    model, batch = build(kind), tools.build_batch()
    pull, divergence = AttentionPull(2, 1.0), AttentionPull(2, 1.0, divergence="js", name="divergence")
    _, *expected = gradients_with(tools, model, batch, pull)
    with attach(model, [pull, divergence]) as ear, attach(model, [AttentionPull(2, 1.0)]) as other:
        for _ in range(2):
            model(**batch)
            assert _len_torch_function_stack() == 0
            ear.loss()
            assert torch.equal(ear.components()["attention_pull.2"].detach(), expected[0])
            loss = other.loss()
            assert torch.equal(loss.detach(), expected[0])
            tools.assert_same_gradients(tools.gradients(model, loss), expected[1])


def test_sparse_attention_is_refused_in_loss(tools):
    model = build("longformer")
    with attach(model, [AttentionPull(2)]) as ear:
        model(**tools.build_batch(length=8))
        with pytest.raises(
            ValueError, match=r"attention_pull\.2: .* no attention matrix .* sparse and local attention"
        ):
            ear.loss()


class OwnAttention(nn.Module):
    """One head on vectors ``[B, L, C]``; a softmax over the keys, ``dim=-1``, or over the queries."""

    def __init__(self, dim):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.dim = nn.Linear(8, 8), nn.Linear(8, 8), dim

    def forward(self, vectors, attention_mask=None):
        scores = self.query(vectors) @ self.key(vectors).transpose(-1, -2)
        return torch.softmax(scores[:, None], self.dim)[:, 0] @ vectors


@pytest.mark.parametrize("dim", [-1, 3])
def test_a_module_of_ones_own(dim):
    model = nn.ModuleDict({"attention": OwnAttention(dim)})
    model.forward = lambda vectors: model["attention"](vectors)
    vectors = torch.randn(4, 5, 8)
    with attach(model, [AttentionPull("attention", 1.0)]) as ear:
        model(vectors)
        loss = ear.loss()
    own = model["attention"]
    attn = (own.query(vectors) @ own.key(vectors).transpose(1, 2)).softmax(-1)
    torch.testing.assert_close(loss, (attn[:2] - attn[2:]).square().mean())


def test_a_softmax_over_queries_is_refused_in_loss():
    model = nn.ModuleDict({"attention": OwnAttention(2)})
    model.forward = lambda vectors: model["attention"](vectors)
    with attach(model, [AttentionPull("attention")]) as ear:
        model(torch.randn(4, 5, 8))
        with pytest.raises(ValueError, match=r"softmax of shape \[4, 1, 5, 5\].* no attention matrix"):
            ear.loss()


class OneWeightAToken(nn.Module):
    """What SwiftFormer calls attention: a softmax over the one weight of each token, which is always 1."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Linear(8, 1)

    def forward(self, vectors):
        return self.weight(vectors).softmax(dim=-1) * vectors


def test_a_softmax_over_a_single_key_is_refused_in_loss():
    model = nn.ModuleDict({"attention": OneWeightAToken()})
    model.forward = lambda vectors: model["attention"](vectors)
    with attach(model, [AttentionPull("attention")]) as ear:
        model(torch.randn(4, 5, 8))
        with pytest.raises(ValueError, match=r"softmax of shape \[4, 5, 1\].* no attention matrix"):
            ear.loss()


def test_views_head_weights_and_reductions(tools):
    model = build("mpnet")
    batch = tools.build_batch()
    halves = [{name: tensor[rows] for name, tensor in batch.items()} for rows in (slice(3), slice(3, 6))]
    pull = AttentionPull(2, 1.0, head_weights=[2.0, 2.0, 2.0, 2.0], reduction="sum")
    with attach(model, [pull, AttentionPull(1)]) as ear:
        model(**batch)
        ear.loss()
        once = ear.components()
        for name, half in zip(("original", "augmented"), halves, strict=True):
            with ear.view(name):
                model(**half)
        ear.loss()
        for name, component in ear.components().items():
            torch.testing.assert_close(component, once[name], rtol=1e-5, atol=0.0)
    with attach(model, [AttentionPull(2, 1.0, reduction="sum")]) as ear:
        model(**batch)
        torch.testing.assert_close(2 * ear.loss(), once["attention_pull.2"], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("attached", ["before", "after"])
def test_compiled_in_one_graph(tools, attached):
    model = build("mpnet")
    batch = tools.build_batch()
    _, expected, gradients = gradients_with(tools, model, batch, AttentionPull(2, 1.0))
    torch.compiler.reset()
    call = torch.compile(model, fullgraph=True, backend="aot_eager")
    if attached == "after":
        call(**batch)
    with attach(model, [AttentionPull(2, 1.0)]) as ear:
        if attached == "after":  # the compiler does not guard on hooks
            call(**batch)
            with pytest.raises(RuntimeError, match=r"torch\.compiler\.reset\(\)"):
                ear.loss()
            torch.compiler.reset()
        for _ in range(2):
            call(**batch)
            loss = ear.loss()
            torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0.0)
            tools.assert_same_gradients(tools.gradients(model, loss), gradients)
    torch.compiler.reset()
    assert _len_torch_function_stack() == 0


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_checkpointing_is_exact_or_refused(tools):
    batch = tools.build_batch()
    _, _, plain = gradients_with(tools, build("bloom"), batch, AttentionPull(2, 1.0))
    model = build("bloom")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, _, checkpointed = gradients_with(tools, model, batch, AttentionPull(2, 1.0))
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        gradients_with(tools, model, batch, AttentionPull(2, 1.0))


def test_bfloat16_autocast(tools):
    model, oracle = build("mpnet"), build("mpnet", "eager")
    batch = tools.build_batch()
    attn = oracle(**batch, output_attentions=True).attentions[1]
    with attach(model, [AttentionPull(2, 1.0)]) as ear:
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch)
        loss = ear.loss()
    assert all(torch.isfinite(gradient).all() for gradient in tools.gradients(model, loss).values())
    expected = tools.attention_pull(attn, batch["attention_mask"]).detach()
    torch.testing.assert_close(loss.detach(), expected, rtol=0.2, atol=0.0)


def test_copies_are_plain_models(tools):
    model = build("mpnet")
    batch = tools.build_batch()
    with attach(model, [AttentionPull(2)]) as ear:
        states = model(**batch)[0]
        data = pickle.dumps(model)
        copies = [copy.deepcopy(model), pickle.loads(data)]
        expected = ear.loss()
        for copied in copies:
            assert torch.equal(copied(**batch)[0], states)
        with pytest.raises(RuntimeError, match="no forward was recorded"):
            ear.loss()  # a copy reports to nobody
        model(**batch)
        assert torch.equal(ear.loss(), expected)
    assert b"ear_ops" not in data
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_interrupted_forward_leaves_nothing_open(tools, error):
    """No hook runs on KeyboardInterrupt: what was left open is closed by the next forward, or by detach()."""
    model = build("mpnet")
    batch = tools.build_batch()

    def interrupt(*_):
        raise error

    ear = attach(model, [AttentionPull(2)])
    model(**batch)
    expected = ear.loss()
    inner = model.encoder.layer[1].attention.attn.q
    for after in ("forward", "detach"):
        handle = inner.register_forward_pre_hook(interrupt)
        with pytest.raises(error):
            model(**batch)
        handle.remove()
        if after == "forward":
            model(**batch)
            assert torch.equal(ear.loss(), expected)
        else:
            ear.detach()
        assert _len_torch_function_stack() == 0


def test_two_models_in_two_threads(tools):
    batch = tools.build_batch()
    models = [build("mpnet"), build("bloom")]
    results = {}

    def work(index):
        with attach(models[index], [AttentionPull(2)]) as ear:
            for _ in range(3):
                models[index](**batch)
                results.setdefault(index, []).append(float(ear.loss().detach()))

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results[0]) == len(results[1]) == 3
    assert len(set(results[0])) == len(set(results[1])) == 1 and results[0] != results[1]


def test_evaluation_opens_nothing_and_a_record_is_released(tools):
    model = build("mpnet")
    batch = tools.build_batch()
    opened = []
    with attach(model, [AttentionPull(2)]) as ear:
        handle = model.encoder.layer[1].attention.attn.q.register_forward_pre_hook(
            lambda *_: opened.append(_len_torch_function_stack())
        )
        with torch.no_grad():
            model(**batch)
        model(**batch)
        handle.remove()
        ear.loss()
        gc.collect()
        assert ear._recorder.both is None
    assert opened == [0, 1]


def shared(implementation="sdpa", groups=1):
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        **{**SIZES, "num_hidden_layers": 4}, **QUIET, embedding_size=16, num_hidden_groups=groups
    )
    model = transformers.AlbertModel._from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
    return model.train()


@pytest.mark.parametrize("groups", [1, 2])
def test_shared_layers_are_told_apart_by_their_call(tools, groups):
    """ALBERT runs one layer as all of its layers, or a layer a group of layers."""
    model, oracle = shared(groups=groups), shared("eager", groups)
    batch = tools.build_batch()
    mask = batch["attention_mask"]
    out = oracle(**batch, output_attentions=True, output_hidden_states=True)
    pulls = [tools.attention_pull(out.attentions[n - 1], mask) for n in (1, 3)]
    sentence, push = (tools.pooled_difference(out.hidden_states[n], mask) for n in (2, 0))
    terms = [AttentionPull([1, 3], 1.0), SentencePull(2, 0.5), EmbeddingPush(0.25)]
    with attach(model, terms) as ear:
        model(**batch)
        loss = ear.loss()
        components = list(ear.components().values())
    for component, term in zip(components, [*pulls, sentence, -push], strict=True):
        torch.testing.assert_close(component, term.detach(), rtol=1e-5, atol=1e-9)
    assert float(pulls[0].detach()) != pytest.approx(float(pulls[1].detach()), rel=1e-2)
    expected = tools.gradients(oracle, sum(pulls) + 0.5 * sentence - 0.25 * push)
    tools.assert_same_gradients(tools.gradients(model, loss), expected)
