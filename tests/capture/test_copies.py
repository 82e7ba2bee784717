"""Copies, pickles and saved files of an attached model leave the attachment behind."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from ear_ops import AttentionPull, EmbeddingPush, LinearWarmupSchedule, SentencePull, attach

TERMS = (EmbeddingPush(0.5), AttentionPull(3, 3.0), SentencePull(2, 0.25))


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_copies_are_plain_models(tools, how):
    model = tools.build_model("bert")
    batch = tools.build_batch()
    with attach(model, TERMS) as ear:
        logits = model(**batch).logits  # a record with tensors in the graph is being held
        if how == "deepcopy":
            copied = copy.deepcopy(model)
        else:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            copied = torch.load(buffer, weights_only=False)
        expected = ear.loss()
        assert torch.equal(copied(**batch).logits, logits)
        with pytest.raises(RuntimeError, match="no forward was recorded"):
            ear.loss()  # the copy reports to nobody
        with attach(copied, TERMS) as second:
            copied(**batch)
            assert torch.equal(second.loss(), expected)
        model(**batch)
        assert torch.equal(ear.loss(), expected)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_module_that_holds_its_attachment_is_copied_with_a_detached_one(tools, how):
    model = tools.build_model("bert")
    batch = tools.build_batch()
    pulls = AttentionPull({2: 0.5, 3: 1.0}, LinearWarmupSchedule(0.1, steps=10))
    with attach(model, [*TERMS[::2], pulls]) as ear:
        model.ear = ear
        logits = model(**batch).logits
        copied = how(model)
        expected = ear.loss(step=5)
        heading, *rows = repr(copied.ear).splitlines()
        assert heading == repr(ear).splitlines()[0] + ", detached" and "BertFor" in heading
        assert [row.split()[:2] for row in rows] == [row.split()[:2] for row in repr(ear).splitlines()[1:]]
        assert torch.equal(copied(**batch).logits, logits) and copied.ear.components() == {}
        for use in (lambda: copied.ear.loss(step=5), lambda: copied.ear.view("original")):
            with pytest.raises(RuntimeError, match=r"copied or unpickled, so it is detached.*ear\.regularizers\)"):
                use()
        copied.ear.detach()
        with attach(copied, copied.ear.regularizers) as second:
            copied(**batch)
            assert torch.equal(second.loss(step=5), expected)
        model(**batch)
        assert torch.equal(ear.loss(step=5), expected), "the original goes on"


def test_pickle_does_not_know_ear_ops(tools):
    """So that it loads in a process where ear_ops is not installed."""
    model = tools.build_model("bert")
    batch = tools.build_batch()
    with attach(model, TERMS):
        logits = model(**batch).logits
        data = pickle.dumps(model)
    assert b"ear_ops" not in data
    assert torch.equal(pickle.loads(data)(**batch).logits, logits)


def test_saving_is_untouched(tools, tmp_path):
    model = tools.build_model("bert")
    names = list(model.state_dict())
    with attach(model, TERMS):
        assert list(model.state_dict()) == names
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.modules())
        batch = tools.build_batch()
        assert torch.equal(loaded.train()(**batch).logits, model(**batch).logits)
