"""What padding, keys that one view lacks, rows without keys and bad numbers do to the divergences."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.cases import LOSSES, Case
from support.changes import fill_padding, same_results
from support.divergences import (
    FORMS,
    RAGGED,
    case_of,
    drawn,
    in_every_way,
    loss_of,
)
from support.strategies import MASK_KINDS
from torch import Tensor

import ear_ops


@in_every_way(FORMS)
@given(data=st.data())
def test_padding_is_never_looked_at(form: str, backend: str, data: st.DataObject) -> None:
    case = drawn(data, form, dtypes=(torch.float32, torch.bfloat16), mask_kinds=MASK_KINDS, layouts=("contiguous",))
    value = data.draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e4]))
    expected, found = fill_padding(case, 0.0).run(backend), fill_padding(case, value).run(backend)
    assert torch.isfinite(found[0]).all() and all(torch.isfinite(g).all() for g in found[1])
    assert same_results(expected, found)


@in_every_way(FORMS)
@pytest.mark.parametrize("side", ["right", "left"])
@given(data=st.data(), extra=st.integers(1, 20))
def test_more_padding_changes_nothing(form: str, backend: str, side: str, data: st.DataObject, extra: int) -> None:
    reductions = ("mean", "equations", "sum", "none")
    limits = {"reductions": reductions, "mask_kinds": MASK_KINDS, "same_length": True, "dtypes": (torch.float64,)}
    case = replace(drawn(data, form, biased=False, **limits), layout="contiguous")
    padding = (0, extra) if side == "right" else (extra, 0)
    masks = {name: F.pad(mask, padding) for name, mask in case.masks.items()}
    where = (0, 0, *padding) if form.startswith("qk") else (*padding, *padding)
    x, x_aug = (tuple(F.pad(t, where, value=math.nan) for t in view) for view in (case.x, case.x_aug))
    value, gradients = case.run(backend)
    longer_value, longer_gradients = replace(case, x=x, x_aug=x_aug, masks=masks).run(backend)
    torch.testing.assert_close(value, longer_value, rtol=1e-11, atol=1e-11)
    for gradient, longer in zip(gradients, longer_gradients, strict=True):
        torch.testing.assert_close(F.pad(gradient, where), longer, rtol=1e-11, atol=1e-11)


SAME = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
FEWER = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]])
QUERIES = {"query_mask": torch.ones(2, 4), "query_mask_aug": torch.ones(2, 4)}


def masks_of(first: Tensor, second: Tensor) -> dict[str, Tensor]:
    every_query = torch.ones(2, 4, dtype=torch.bool)
    return {
        "attention_mask": first,
        "attention_mask_aug": second,
        "query_mask": every_query,
        "query_mask_aug": every_query,
    }


@pytest.mark.parametrize("kind", ["qk", "maps"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_key_that_only_the_target_has_makes_kl_infinite(kind: str, direction: str) -> None:
    first, second = (FEWER, SAME) if direction == "forward" else (SAME, FEWER)
    case = replace(case_of(f"{kind} {direction}", 4), masks=masks_of(first, second), reduction="none")
    with pytest.raises(ValueError, match=r"attention_mask: .*same keys.*KL is infinite.*_js.*support='shared'"):
        case.run("reference")
    if direction == "forward":
        compiled = torch.compile(loss_of(f"{kind} {direction}"), fullgraph=True, backend="eager")
        inputs = case.inputs()
        first = [tensor.requires_grad_() for tensor in inputs[: len(inputs) // 2]]
        value = compiled(*inputs, **case.arguments())
        assert (value[0] == math.inf).all() and torch.isfinite(value[1]).all()
        gradients = torch.autograd.grad(value.sum(), first)
        assert all(torch.isfinite(gradient).all() and gradient.any() for gradient in gradients)
        assert not gradients[-1].narrow(2 if kind == "qk" else 3, 2, 2)[:1].any()  # keys that it does not have
    check_a_head_left_out(case)
    shared = replace(case, options={**case.options, "support": "shared"})
    both_fewer = replace(case, masks=masks_of(FEWER, FEWER))
    if kind == "qk":
        assert same_results(shared.run("reference"), both_fewer.run("reference"))
    else:
        assert torch.isfinite(shared.run("reference")[0]).all()


def check_a_head_left_out(case: Case) -> None:
    """A weight of 0 leaves out a head whose KL is infinite, with its gradients, in eager mode and compiled."""
    for call in (LOSSES[case.op], torch.compile(LOSSES[case.op], fullgraph=True, backend="eager")):
        inputs = [tensor.requires_grad_() for tensor in case.inputs()]
        value = call(*inputs, **case.arguments(), head_weights=torch.zeros(inputs[0].shape[1]))
        assert not value.any()
        for gradient in torch.autograd.grad(value.sum(), inputs):
            assert torch.equal(gradient, torch.zeros_like(gradient))


def test_infinite_kl_of_maps_may_come_from_underflow() -> None:
    first, second = torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2), torch.full((1, 1, 1, 2), 0.5)
    with pytest.raises(ValueError, match=r"KL is infinite; a probability of exactly 0 may also have underflowed"):
        ear_ops.attention_kl(first, second)


def test_a_key_that_a_bias_forbids_has_no_gradient() -> None:
    """Also where the target has it, so that the loss is infinite: compiled, since the CPU refuses it otherwise."""
    forbidden = torch.zeros(4, 4, dtype=torch.float64)
    forbidden[:, 3] = -math.inf
    query, key, query_aug, key_aug = case_of("qk forward", 4).inputs()
    biases = {"attn_bias": forbidden, "attn_bias_aug": torch.zeros(4, 4, dtype=torch.float64)}
    compiled = torch.compile(ear_ops.qk_attention_kl, fullgraph=True, backend="eager")
    value = compiled(query, key.requires_grad_(), query_aug, key_aug, **biases)
    (gradient,) = torch.autograd.grad(value, key)
    assert value.item() == math.inf and torch.isfinite(gradient).all()
    assert gradient[:, :, :3].all() and not gradient[:, :, 3].any()


@pytest.mark.parametrize("kind", ["qk", "maps"])
def test_a_key_without_target_adds_nothing(kind: str) -> None:
    case = replace(case_of(f"{kind} forward", 4), masks=masks_of(SAME, FEWER), reduction="none")
    value, gradients = case.run("reference")
    if kind == "qk":
        expected, plain_gradients = case.run_plain()
        torch.testing.assert_close(value, expected)
        for gradient, plain_gradient in zip(gradients, plain_gradients, strict=True):
            torch.testing.assert_close(gradient, plain_gradient)
    assert torch.isfinite(value).all() and all(torch.isfinite(gradient).all() for gradient in gradients)


@in_every_way(FORMS)
def test_rows_without_keys(form: str, backend: str) -> None:
    """A row that is empty in one view: never NaN, and no gradient where one is empty, but log(2) / 2 for JS."""
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    case = replace(case_of(form, 4), reduction="none")
    target_of = {"forward": (SAME, nothing), "reverse": (nothing, SAME)}.get(form.split()[1], (SAME, nothing))
    value, gradients = replace(case, masks=masks_of(*target_of)).run(backend)
    if form == "qk js":
        torch.testing.assert_close(value, torch.full_like(value, 4 * math.log(2) / 2))
    elif form != "maps js":
        assert not value.any()
    if form.startswith("qk"):
        assert all(not gradient.abs().gt(1e-15).any() for gradient in gradients)
    value, gradients = replace(case, masks=masks_of(nothing, nothing)).run(backend)
    assert not value.any() and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@in_every_way(FORMS)
def test_bad_numbers_show(form: str, backend: str, bad: float) -> None:
    case = case_of(form, 9, pairs=2, **RAGGED, reduction="none")
    first = case.x[0].clone()
    first[0, 1, 3, 5] = bad
    spoilt = replace(case, x=(first, *case.x[1:]))
    expected, _ = case.run(backend)
    try:
        value, gradients = spoilt.run(backend)
    except ValueError as error:  # an infinite score may make an infinite loss
        assert not math.isnan(bad) and "KL is infinite" in str(error)
    else:
        assert not torch.isfinite(value[0, 1]) and torch.equal(value[1], expected[1])
        assert gradients[0][0, 1].isnan().any() and not gradients[0][1].isnan().any()
