"""Averages over heads of the CUDA kernels on the host, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import cuda_on_host
from support.cases import MEAN_FORMS, lengths_mask, mean_case
from support.host_cases import CAUSAL, all_queries, check, ragged
from support.rules import check_strides_and_forms, l2_error

from ear_ops.ops.mean_heads import QK_MEAN_HEADS, MeanHeadsProblem

every_form = pytest.mark.parametrize("form", MEAN_FORMS)


@every_form
@pytest.mark.parametrize(
    ("sizes", "rest"),
    [
        ((18, 21, 17), {"pairs": 1}),
        ((5, 66, 48), {"pairs": 1, "heads": 1}),
        ((70, 130, 16), {"heads": 2, "key_heads": 1, "masks": ragged([130, 67], 70, 130)}),
        ((40, 70, 32), {"masks": ragged([70, 3], 40, 70), "options": CAUSAL}),
    ],
    ids=["one tile", "chunks", "strips, padding and groups", "positions"],
)
def test_averages(form: str, sizes: tuple[int, int, int], rest: dict[str, Any], dtype: torch.dtype) -> None:
    check(mean_case(form, *sizes, reduction="none", **rest), dtype)


@every_form
def test_averages_of_one_strip(form: str) -> None:
    """Its slopes serve the gradients of queries and of keys, which otherwise have strips of their own."""
    check(mean_case(form, 70, 70, 64, heads=4, pairs=1, reduction="sum"), torch.bfloat16)


@every_form
def test_averages_under_a_bias_that_forbids_keys(form: str) -> None:
    """Some in all heads, some in one head alone; and a row without keys."""
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn((2, 2, 9, 70), generator=generator, dtype=torch.float64)
    bias = bias.masked_fill(bias > 1, -torch.inf)
    bias[:, :, 4] = bias[:, :, :, 5] = -torch.inf
    check(mean_case(form, 9, 70, 16, heads_aug=None, biases={"attn_bias": bias}, reduction="sum"), torch.float16)


@every_form
def test_a_head_without_weight_is_never_looked_at(form: str) -> None:
    case = mean_case(form, 9, 70, 16, heads=3, heads_aug=None, options={"head_weights": torch.tensor([1.0, 0.0, 3.0])})
    check(case, torch.bfloat16)
    case = case.to(torch.bfloat16)
    value, gradients = case.run("cpu")
    bad = case.x[0].clone()
    bad[:, 1] = torch.nan
    found, of_bad = replace(case, x=(bad, case.x[1])).run("cpu")
    assert torch.equal(found, value) and all(map(torch.equal, of_bad, gradients))
    assert not any(gradient[:, 1].any() for gradient in gradients)


@every_form
@pytest.mark.parametrize("closeness", [1e-4, 1e-2])
def test_averages_of_nearly_equal_views_keep_their_digits(form: str, closeness: float) -> None:
    case = mean_case(form, 20, 70, reduction="none", closeness=closeness, heads_aug=None).to(torch.float32)
    value, gradients = case.run("cpu")
    exact, exact_gradients = case.to(torch.float64).run("reference")
    rounding = 8e-7 / closeness  # an average has the rounding of several heads
    assert l2_error(value, exact) < rounding
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        assert l2_error(gradient, exact_gradient) < 10 * rounding


@every_form
def test_averages_of_equal_views_give_exactly_zero(form: str, dtype: torch.dtype) -> None:
    case = mean_case(form, 20, 70, gain=30.0, heads_aug=None, options=CAUSAL).to(dtype)
    value, gradients = replace(case, x_aug=case.x).run("cpu")
    assert value == 0 and not any(gradient.any() for gradient in gradients)


@every_form
def test_averages_that_underflow(form: str) -> None:
    """In one view alone the scores differ by hundreds, which shows in the logarithms of KL."""
    case = mean_case(form, 9, 70, pairs=1, gain=60.0, reduction="none")
    check(replace(case, x_aug=tuple(view / 5 for view in case.x_aug)), torch.float32)


@every_form
def test_padding_is_not_in_averages(form: str) -> None:
    masks = ragged([70, 9], 70, 70)
    masks = {**masks, "query_mask": masks["query_mask"] & masks["attention_mask"].bool()}
    masks["query_mask_aug"] = masks["query_mask"]
    case = mean_case(form, 70, 70, heads=2, masks=masks, reduction="none").to(torch.bfloat16)
    value, gradients = case.run("cpu")
    for bad in (torch.nan, 1e30):
        views = [tuple(tensor.clone() for tensor in view) for view in (case.x, case.x_aug)]
        for view in views:
            for tensor in view:
                tensor[1, :, 9:] = bad
        found, of_bad = replace(case, x=views[0], x_aug=views[1]).run("cpu")
        assert torch.equal(found, value) and all(map(torch.equal, of_bad, gradients))


@every_form
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_numbers_show_in_averages(form: str, bad: float) -> None:
    case = mean_case(form, 9, 70, 8, masks=ragged([70, 40], 9, 70), reduction="none").to(torch.float32)
    clean, _ = case.run("cpu")
    query = case.x[0].clone()
    query[0, 1, 3, 4] = bad
    value, gradients = replace(case, x=(query, case.x[1])).run("cpu")
    assert value[0].isnan() and torch.equal(value[1], clean[1])
    assert gradients[0][0, 1].isnan().any() and not gradients[0][1].isnan().any()


@every_form
def test_keys_of_one_view_in_averages(form: str) -> None:
    """The target lacks some, and in the second pair it lacks all."""
    first, second = ([70, 70], [60, 0]) if form != "reverse" else ([60, 0], [70, 70])
    masks = all_queries(9) | {"attention_mask": lengths_mask(first, 70), "attention_mask_aug": lengths_mask(second, 70)}
    case = mean_case(form, 9, 70, masks=masks, reduction="none")
    if form != "js":  # a row that is empty in one view has no gradient, which rounding does not give
        return check(case, torch.float32)
    value, _ = case.to(torch.float32).run("cpu")
    expected, _ = case.to(torch.float32).to(torch.float64).run("reference")
    assert l2_error(value, expected) < 1e-6


@pytest.mark.parametrize("name", ["kl", "reverse_kl"])
def test_a_key_that_only_the_target_has_makes_kl_of_averages_infinite(name: str, dtype: torch.dtype) -> None:
    """The function would refuse it on a CPU, so the operator is called."""
    mask = torch.ones(4, 70, dtype=torch.bool)
    mask[2 if name == "reverse_kl" else 0, 66] = False  # of the first pair
    views = [tensor.to(dtype).requires_grad_() for tensor in mean_case("mse", 9, 70).inputs()]
    problem = MeanHeadsProblem(*views, mask, None, None, None, None, 0.25, 0.2, False, 0, None)
    sums = QK_MEAN_HEADS[name].sums(problem, "cpu")
    assert sums[0] == torch.inf and sums[1].isfinite()
    compared_first = views[2:] if name == "reverse_kl" else views[:2]
    of_infinite, of_finite = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert all(g.isfinite().all() and g.any() for g in torch.autograd.grad(sums, compared_first, of_infinite, True))
    for gradient in torch.autograd.grad(sums, views, of_finite):
        assert gradient.isfinite().all() and gradient[1].any() and not gradient[0].any()


@every_form
def test_gradients_of_averages_that_are_asked_for(form: str) -> None:
    case = mean_case(form, 10, 70, 48, pairs=1, heads=2, key_heads=1, reduction="sum").to(torch.bfloat16)
    _, all_gradients = case.run("cpu")
    for needs in ((True, True, False, False), (False, False, True, False), (False, True, False, False)):
        _, gradients = case.run("cpu", needs=needs)
        for needed, gradient, expected in zip(needs, gradients, all_gradients, strict=True):
            assert (gradient is not None) == needed
            assert not needed or torch.equal(gradient, expected)


@every_form
@pytest.mark.parametrize("stacked", [False, True], ids=["two tensors", "one tensor"])
def test_strides_and_forms_of_averages(form: str, stacked: bool) -> None:
    heads_aug = None if stacked else 3
    case = mean_case(form, 20, 33, 24, heads_aug=heads_aug, masks=ragged([33, 9], 20, 33), reduction="sum")
    check_strides_and_forms(case, "slices", stacked, torch.bfloat16, "cpu")


def test_the_order_in_which_threads_run_changes_no_bit_of_averages(dtype: torch.dtype) -> None:
    case = mean_case("forward", 70, 70, pairs=1, reduction="none").to(dtype)
    expected, expected_gradients = case.run("cpu")
    cuda_on_host.configure(seed=1)
    value, gradients = case.run("cpu")
    assert torch.equal(value, expected) and all(map(torch.equal, gradients, expected_gradients))


def test_averages_of_nothing() -> None:
    for queries, keys, pairs in ((0, 5, 1), (5, 0, 1), (5, 5, 0)):
        masks = {name: torch.ones(pairs, queries, dtype=torch.bool) for name in ("query_mask", "query_mask_aug")}
        case = mean_case("js", queries, keys, pairs=pairs, masks=masks, reduction="sum").to(torch.float32)
        value, gradients = case.run("cpu")
        assert value == 0 and not any(gradient.any() for gradient in gradients)
