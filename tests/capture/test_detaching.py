"""What is left of an attachment once it is detached, dropped or gone with its model: nothing."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from transformers.modeling_utils import AttentionInterface

from ear_ops import AttentionPull, EmbeddingPush, SentencePull, attach

TERMS = (EmbeddingPush(0.5), AttentionPull(3, 3.0), SentencePull(2, 0.25))


def hook_count(model):
    return sum(
        len(hooks) for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)
    )


def snapshot():
    return dict(AttentionInterface()), AttentionInterface.get_interface


def leave_no_trace(model, before):
    assert hook_count(model) == 0
    assert not any("_ear_taps" in m.__dict__ for m in model.modules())
    assert snapshot() == before


def test_detach_leaves_no_trace(tools):
    before = snapshot()
    model = tools.build_model("bert")
    ear = attach(model, TERMS)
    assert snapshot() != before and hook_count(model) > 0
    ear.detach()
    leave_no_trace(model, before)
    ear.detach()  # twice does nothing
    leave_no_trace(model, before)
    model(**tools.build_batch())
    with pytest.raises(RuntimeError, match="detached"):
        ear.loss()


def test_context_manager_detaches_when_the_body_raises(tools):
    before = snapshot()
    model = tools.build_model("bert")
    with pytest.raises(KeyError), attach(model, TERMS):
        model(**tools.build_batch())
        raise KeyError
    leave_no_trace(model, before)


@pytest.mark.parametrize("first", [0, 1])
def test_two_attachments_detach_in_any_order(tools, first):
    before = snapshot()
    model = tools.build_model("bert")
    batch = tools.build_batch()
    ears = [attach(model, [AttentionPull(3, 1.0)]), attach(model, [AttentionPull(3, 2.0), AttentionPull(1)])]
    model(**batch)
    losses = [ear.loss() for ear in ears]
    pull = ears[1].components()["attention_pull.3"]
    assert torch.equal(losses[0], pull) and losses[1] > 2 * pull
    ears[first].detach()
    model(**batch)
    assert torch.equal(ears[1 - first].loss(), losses[1 - first])
    ears[1 - first].detach()
    leave_no_trace(model, before)


def test_an_attachment_that_nobody_holds_is_taken_off(tools):
    before = snapshot()
    model = tools.build_model("bert")
    for _ in range(3):
        ear = attach(model, TERMS)  # as in a cell of a notebook that runs again
    model(**tools.build_batch())
    ear.loss()
    hooks = hook_count(model)
    del ear
    gc.collect()
    leave_no_trace(model, before)
    with attach(model, TERMS):
        assert hook_count(model) == hooks, "the first two were gone when the third was there"


@pytest.mark.parametrize("detached", [False, True])
def test_a_model_that_holds_its_own_attachment_is_freed(tools, detached):
    before = snapshot()
    model = tools.build_model("bert")
    model.ear = attach(model, TERMS)
    if detached:
        model.ear.detach()
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None and snapshot() == before


def test_two_models_at_once(tools):
    models = [tools.build_model("bert", seed=seed) for seed in (0, 1)]
    batch = tools.build_batch()
    alone = []
    for model in models:
        with attach(model, TERMS) as ear:
            model(**batch)
            alone.append(ear.loss())
    with attach(models[0], TERMS) as first, attach(models[1], TERMS) as second:
        models[0](**batch)
        models[1](**batch)
        assert torch.equal(second.loss(), alone[1]) and torch.equal(first.loss(), alone[0])


def test_two_models_in_two_threads(tools):
    models = [tools.build_model("bert", seed=seed) for seed in (0, 1)]
    batch = tools.build_batch()
    results = {}

    def work(index):
        with attach(models[index], TERMS) as ear:
            for _ in range(5):
                models[index](**batch)
                results.setdefault(index, []).append(float(ear.loss().detach()))

    before = snapshot()
    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert snapshot() == before
    assert len(set(results[0])) == len(set(results[1])) == 1 and results[0] != results[1]


def test_failing_to_attach_takes_off_what_was_hung_on(tools):
    class Broken(SentencePull):
        def site(self, layout):
            site = super().site(layout)
            site.install = lambda listener: 1 / 0
            return site

    before = snapshot()
    model = tools.build_model("bert")
    with pytest.raises(ZeroDivisionError):
        attach(model, [*TERMS, Broken(4)])
    leave_no_trace(model, before)
