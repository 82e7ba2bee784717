"""Forwards that no ``loss()`` took: which of them are warned of, and which belong to no loss."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from torch import nn

from ear_ops import AttentionPull, EmbeddingPush, SentencePull, attach

TERMS = (EmbeddingPush(0.5), AttentionPull(3, 3.0), SentencePull(2, 0.25))


@contextlib.contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_forwards_that_no_loss_took_warn_once(tools):
    """One forward a column, as sentence-transformers makes them: the loss has the last one alone."""
    model, batch = tools.build_model("bert"), tools.build_batch()
    with attach(model, TERMS) as ear:
        columns = [model(**batch).logits.sum() for _ in range(3)]
        with pytest.warns(UserWarning, match=r"ran several times before one loss\(\).*ear\.forget\(\)") as caught:
            loss = ear.loss()
        assert len(caught) == 1 and caught[0].filename == __file__
        (sum(columns) + loss).backward()
        columns = [model(**batch).logits.sum() for _ in range(2)]
        with no_warning():
            ear.loss()
    with attach(model, TERMS) as ear:  # of each attachment
        with ear.view("original"):
            columns = [model(**batch).logits.sum() for _ in range(2)]
        with ear.view("augmented"):
            model(**batch)
        with pytest.warns(UserWarning, match="ran several times"):
            ear.loss()
    with attach(model, TERMS) as ear:
        with ear.view("original"):
            kept = model(**batch)
        columns = [kept, model(**batch)]  # without a name: taken for both views
        with pytest.warns(UserWarning, match="ran several times"):
            ear.loss()


def test_forwards_that_belong_to_no_loss_do_not_warn(tools):
    model, batch = tools.build_model("bert"), tools.build_batch()
    with no_warning(), attach(model, TERMS) as ear:
        shape = model(**batch).logits.shape  # a try, whose result is thrown away
        assert shape == (6, 2)
        model(**batch)
        ear.loss()

        kept = model(**batch)  # a step without regularisers
        kept.logits.sum().backward()
        again = model(**batch)
        (again.logits.sum() + ear.loss()).backward()

        kept = model(**batch)  # a search in which the result has been differentiated
        torch.autograd.grad(kept.logits.sum(), model.classifier.weight)
        again = model(**batch)
        ear.loss()

        with torch.no_grad():
            kept = model(**batch), model(**batch)
        model.eval()
        kept = model(**batch)  # in evaluation, with grad
        model.train()
        again = model(**batch)
        ear.loss()

        kept = model(**batch)  # another task, then two views of a name
        for view in ("original", "augmented"):
            with ear.view(view):
                again = model(**batch)
        ear.loss()

        kept = model(**batch)
        ear.forget()
        again = model(**batch)
        ear.loss()
        ear.forget()
        with pytest.raises(RuntimeError, match="no forward was recorded"):
            ear.loss()
        del kept, again


def test_forwards_of_a_teacher_do_not_warn_and_those_of_its_student_do(tools):
    model, batch = tools.build_model("bert"), tools.build_batch()
    teacher = tools.build_model("bert", seed=1).eval()
    with attach(model, TERMS, teacher=teacher) as ear:
        with no_warning():
            kept = [teacher(**batch) for _ in range(2)]
            model(**batch)
            ear.loss()
            kept = [teacher(**batch) for _ in range(2)]
            ear.forget()
            model(**batch)
            with pytest.raises(RuntimeError, match="the teacher has not seen this batch"):
                ear.loss()
        kept += [teacher(**batch), model(**batch), model(**batch)]
        with pytest.warns(UserWarning, match="ran several times") as caught:
            ear.loss()
        assert "ear.view" not in str(caught[0].message)


@pytest.mark.parametrize("early_stop", [False, True])
def test_a_model_that_checkpointing_runs_again_whole_is_recorded_once(tools, early_stop):
    model, batch = tools.build_model("bert"), tools.build_batch()
    stopping = torch.utils.checkpoint.set_checkpoint_early_stop(early_stop)
    with no_warning(), stopping, attach(model, TERMS) as ear:
        for _ in range(2):
            out = torch.utils.checkpoint.checkpoint(model, **batch, use_reentrant=False)
            total = out.logits.square().sum() + ear.loss()
            gradients = tools.gradients(model, total)
            with pytest.raises(RuntimeError, match="no forward was recorded"):
                ear.loss()
    with attach(model, TERMS) as ear:
        out = model(**batch)
        plain = tools.gradients(model, out.logits.square().sum() + ear.loss())
    for name, gradient in plain.items():
        assert torch.equal(gradients[name], gradient), name


def test_results_that_hold_no_tensors_of_their_own():
    """A root that returns what was recorded keeps nothing waiting by that."""

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, hidden):
            return {"states": [self.blocks[0](hidden)], "name": "root"}

    model, hidden = Root(), torch.randn(4, 3, 4)
    with attach(model, [SentencePull(1)]) as ear:
        with no_warning():
            model(hidden)
            model(hidden)
            ear.loss()
        kept = model(hidden)
        model(hidden)
        with pytest.warns(UserWarning, match="ran several times"):
            ear.loss()
        del kept


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_model_that_ran_several_times_warns(tools, fullgraph):
    model, batch = tools.build_model("bert"), tools.build_batch()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=fullgraph, backend="eager")
    with attach(compiled, TERMS) as ear:
        with no_warning():
            for _ in range(2):
                compiled(**batch)
                ear.loss()
        kept = [compiled(**batch) for _ in range(2)]
        with pytest.warns(UserWarning, match="ran several times"):
            ear.loss()
        del kept
    torch.compiler.reset()
