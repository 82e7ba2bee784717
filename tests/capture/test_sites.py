"""What a site makes of a record: one structure per mask, one dtype per view."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ear_ops.capture import (
    AttentionInputs,
    AttentionSite,
    HiddenStates,
    Place,
    ProjectionSite,
    Record,
    align_attention,
    align_hidden,
    sites,
)
from ear_ops.capture.masks import attention_structure
from ear_ops.capture.records import AttentionCall, TensorCall


def recorded(length, allowed, received, dtypes=(torch.float32, torch.float32)):
    """A record of one call of two rows, whose mask is ``allowed`` [L, L] for both; ``received``: the model's mask."""
    record = Record()
    record.masks[""] = {"attention_mask": TensorCall(received)}
    query, key = (torch.randn(2, 4, length, 8, dtype=dtype) for dtype in dtypes)
    mask = None if allowed is None else allowed.expand(2, 1, length, length)
    record.add("attention", AttentionCall("sdpa", nn.Identity(), query, key, key, mask, is_causal=False))
    return record


def site():
    return AttentionSite(Place("attention", (nn.Identity(),)), model="")


def test_structure_is_checked_again_for_another_length():
    """A window that no keyword names shows only in batches longer than it."""
    attention = site()
    window = [(torch.arange(n)[:, None] - torch.arange(n)).abs() < 3 for n in (3, 6)]
    short = attention.read(recorded(3, window[0], torch.ones(2, 3)), "x")
    long = attention.read(recorded(6, window[1], torch.ones(2, 6)), "x")
    assert short.attn_bias is None and torch.equal(long.attn_bias[0, 0], window[1])


def test_structure_is_checked_again_for_another_batch():
    """A window that no keyword names does not show where all rows are short, whatever they are padded to."""
    attention, received = site(), torch.tensor([[1, 1, 1, 0, 0, 0]] * 2)
    window = (torch.arange(6)[:, None] - torch.arange(6)).abs() < 3
    short = attention.read(recorded(6, window & received[0].bool(), received), "x")
    long = attention.read(recorded(6, window, torch.ones(2, 6)), "x")
    assert short.attn_bias is None and torch.equal(long.attn_bias[0, 0], window)


def test_layers_that_share_a_mask_ask_it_once(monkeypatch):
    record = recorded(6, torch.ones(6, 6, dtype=torch.bool), torch.ones(2, 6))
    (call,) = record.calls["attention"]
    arguments = (call.query + 1, call.key, call.key, call.attention_mask)
    record.add("second", AttentionCall("sdpa", nn.Identity(), *arguments, is_causal=False))
    asked = []

    def counted(*arguments):
        asked.append(arguments)
        return attention_structure(*arguments)

    monkeypatch.setattr(sites, "attention_structure", counted)
    second = AttentionSite(Place("second", (nn.Identity(),)), model="")
    assert site().read(record, "x").is_causal == second.read(record, "x").is_causal
    assert len(asked) == 1


def test_queries_of_their_own_are_all_real():
    """A learnt query that pools a padded row is no padding."""
    query, key = nn.Linear(8, 8), nn.Linear(8, 8)
    pooled = ProjectionSite(nn.ModuleDict({"query": query, "key": key}), "query", "key", 2, 2, model="")
    for length in (1, 2, 5, 7):
        pooled.cross_attention = True if length == 5 else None  # of one length by coincidence
        record = Record()
        record.masks[""] = {"attention_mask": TensorCall(torch.tensor([[1, 1, 1, 0, 0]] * 4))}
        record.add("projection:query", TensorCall(query(torch.randn(4, length, 8))))
        record.add("projection:key", TensorCall(key(torch.randn(4, 5, 8))))
        inputs = pooled.read(record, "x")
        assert inputs.query_mask.shape == (4, length) and inputs.query_mask.all()
        assert inputs.attention_mask.sum().item() == 12


@pytest.mark.parametrize("cross_attention", [None, False, True])
def test_projections_of_different_tensors_of_one_length_ask_what_they_are(cross_attention):
    """The mask of the keys was taken for the queries' because both have five positions by coincidence."""
    query, key = nn.Linear(8, 8), nn.Linear(8, 8)
    root = nn.ModuleDict({"query": query, "key": key})
    place = ProjectionSite(root, "query", "key", 2, 2, model="", cross_attention=cross_attention)
    tokens, memory = torch.randn(4, 5, 8), torch.randn(4, 5, 8)
    record = Record()
    record.masks[""] = {"attention_mask": TensorCall(torch.tensor([[1, 1, 1, 0, 0]] * 4))}
    record.add("projection:query", TensorCall(query(tokens), tokens))
    record.add("projection:key", TensorCall(key(memory), memory))
    if cross_attention is None:
        with pytest.raises(
            ValueError, match=r"x: query and key project different tensors of one length, 5.*pass cross"
        ):
            place.read(record, "x")
    else:
        inputs = place.read(record, "x")
        assert inputs.query_mask.sum().item() == (20 if cross_attention else 12)


def test_structure_is_checked_for_every_batch_without_a_two_dimensional_mask():
    """Packed sequences of one length differ from batch to batch."""
    attention = site()
    packed = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).bool()
    for allowed in (torch.ones(6, 6, dtype=torch.bool), packed, packed.flip(0, 1)):
        for received in (None, allowed.expand(2, 1, 6, 6)):
            bias = attention.read(recorded(6, allowed, received), "x").attn_bias
            assert (bias is None) == bool(allowed.all())
            assert bias is None or torch.equal(bias[0, 0], allowed)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_queries_and_keys_get_the_wider_dtype(dtypes):
    inputs = site().read(recorded(4, None, None, dtypes), "x")
    assert inputs.query.dtype == inputs.key.dtype == torch.float32


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_views_get_the_wider_dtype(dtypes):
    def attention(dtype):
        return AttentionInputs(*torch.randn(2, 1, 2, 3, 4).to(dtype), None, None, None)

    def hidden(dtype):
        return HiddenStates(torch.randn(1, 3, 4).to(dtype), None)

    for view in align_attention(attention(dtypes[0]), attention(dtypes[1]), "x"):
        assert view.query.dtype == view.key.dtype == torch.float32
    for states in align_hidden(hidden(dtypes[0]), hidden(dtypes[1]), "x"):
        assert states.states.dtype == torch.float32


def test_views_that_attend_differently_do_not_compare():
    tensors = torch.randn(2, 1, 2, 3, 4)
    bidirectional = AttentionInputs(*tensors, None, None, None)
    for other in (bidirectional._replace(is_causal=True), bidirectional._replace(attn_bias=torch.zeros(3, 3))):
        with pytest.raises(
            ValueError,
            match=r"x: expected attention of one structure in both views, got is_.* and is_.*; compare words",
        ):
            align_attention(bidirectional, other, "x")


def test_calls_that_change_the_probabilities_otherwise_are_refused():
    record = recorded(4, None, None)
    record.calls["attention"][0].unsupported = "s_aux"
    with pytest.raises(ValueError, match="x: the attention was called with s_aux"):
        site().read(record, "x")


def test_a_tensor_that_changes_the_scores_is_refused_under_any_name():
    """Sinks come as ``s_aux``, ``sinks``, ...; positions and lengths, which are integers, change nothing."""
    query = torch.randn(2, 4, 5, 8)
    harmless = {"position_ids": torch.arange(5), "position_bias": torch.zeros(1, 4, 5, 5), "dropout": 0.0}
    for kwargs, refused in ((harmless, None), (harmless | {"anything": torch.zeros(4)}, "anything")):
        call = AttentionCall("eager", nn.Identity(), query, query, query, None, is_causal=False, **kwargs)
        assert call.unsupported == refused
