"""KL, JS and squared scores of the CUDA kernels on the host, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.cases import Case, lengths_mask, qk_case
from support.host_cases import CAUSAL, all_queries, check, ragged
from support.rules import check_strides_and_forms, l2_error

import ear_ops
from ear_ops.ops.problem import AttentionProblem
from ear_ops.ops.qk_divergences import QK_DIVERGENCES

COMPARISONS: dict[str, tuple[str, dict[str, object]]] = {
    "kl": ("qk_attention_kl", {}),
    "reverse kl": ("qk_attention_kl", {"direction": "reverse"}),
    "js": ("qk_attention_js", {}),
    "scores": ("qk_scores_mse", {}),
}
every_comparison = pytest.mark.parametrize("comparison", COMPARISONS)


def compared(comparison: str, *sizes: int, **rest: Any) -> Case:
    op, options = COMPARISONS[comparison]
    return replace(qk_case(*sizes, **rest), op=op, options={**options, **rest.get("options", {})})


@every_comparison
@pytest.mark.parametrize(
    ("sizes", "rest"),
    [
        ((18, 21, 17), {"pairs": 1, "heads": 1}),
        ((5, 66, 160), {"pairs": 1, "heads": 1}),
        ((33, 130, 64), {"heads": 1, "masks": ragged([130, 67], 33, 130)}),
        ((40, 70, 32), {"heads": 2, "key_heads": 1, "masks": ragged([70, 3], 40, 70), "options": CAUSAL}),
    ],
    ids=["one tile", "chunks", "three tiles and padding", "positions and groups"],
)
def test_comparisons(comparison: str, sizes: tuple[int, int, int], rest: dict[str, Any], dtype: torch.dtype) -> None:
    check(compared(comparison, *sizes, reduction="none", **rest), dtype)


@every_comparison
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize(
    ("queries", "keys", "dim"),
    [(1, 1, 32), (64, 64, 64), (20, 40, 96), (65, 64, 32), (70, 100, 64), (128, 128, 16), (66, 70, 128)],
    ids=str,
)
def test_comparisons_of_short_rows(
    comparison: str, queries: int, keys: int, dim: int, masked: bool, dtype: torch.dtype
) -> None:
    masks = ragged([keys, max(1, keys // 2)], queries, keys) if masked and queries > 2 else {}
    check(compared(comparison, queries, keys, dim, pairs=2, heads=1, masks=masks, reduction="none"), dtype)


@every_comparison
def test_more_queries_than_a_block_owns_and_few_keys(comparison: str, dtype: torch.dtype) -> None:
    check(compared(comparison, 140, 30, 32, pairs=1, heads=1, reduction="none"), dtype)


@every_comparison
def test_comparisons_under_a_bias_that_forbids_keys(comparison: str, dtype: torch.dtype) -> None:
    bias = torch.randn((2, 1, 9, 70), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bias = bias.masked_fill(bias > 1, -torch.inf)
    bias[:, :, 4] = -torch.inf  # a row without keys
    check(compared(comparison, 9, 70, 16, biases={"attn_bias": bias}, reduction="sum"), dtype)


ONE_SIDED = {"kl": [70, 60], "reverse kl": [60, 70], "js": [70, 60], "scores": [60, 70]}


@every_comparison
@pytest.mark.parametrize("queries", [9, 70])
def test_keys_of_one_view_alone(comparison: str, queries: int, dtype: torch.dtype) -> None:
    """Those that only the target has are left to the next test; the second pair has no target at all."""
    first, second = ONE_SIDED[comparison]
    masks = all_queries(queries) | {
        "attention_mask": lengths_mask([first, 0 if first < second else 70], 70),
        "attention_mask_aug": lengths_mask([second, 0 if second < first else 70], 70),
    }
    check(compared(comparison, queries, 70, 16, heads=1, masks=masks, reduction="none"), dtype)


@pytest.mark.parametrize("name", ["kl", "reverse_kl"])
def test_a_key_that_only_the_target_has_makes_kl_infinite(name: str, dtype: torch.dtype) -> None:
    """The function would refuse it on a CPU, so the operator is called."""
    mask = torch.ones(4, 70, dtype=torch.bool)
    mask[2 if name == "reverse_kl" else 0, 66] = False  # of the first pair
    views = [tensor.to(dtype).requires_grad_() for tensor in qk_case(9, 70).inputs()]
    problem = AttentionProblem(*views, mask, None, None, None, 0.25, False, 0, None)
    sums = QK_DIVERGENCES[name].sums(problem, "cpu")
    assert (sums[0] == torch.inf).all() and sums[1].isfinite().all()
    first, others = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.5]])
    compared_first = views[2:] if name == "reverse_kl" else views[:2]
    assert all(g.isfinite().all() and g.any() for g in torch.autograd.grad(sums, compared_first, first, True))
    for gradient in torch.autograd.grad(sums, views, others):
        assert gradient.isfinite().all() and gradient[1].any() and not gradient[0].any()


@every_comparison
@pytest.mark.parametrize("closeness", [1e-4, 1e-2])
@pytest.mark.parametrize("keys", [40, 100, 130])
def test_nearly_equal_views_keep_their_digits(comparison: str, closeness: float, keys: int) -> None:
    case = compared(comparison, 20, keys, reduction="none", closeness=closeness).to(torch.float32)
    value, gradients = case.run("cpu")
    exact, exact_gradients = case.to(torch.float64).run("reference")
    rounding = 4e-7 / closeness  # scores are of size 1 and have an error of 1e-7
    assert l2_error(value, exact) < rounding
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        assert l2_error(gradient, exact_gradient) < 10 * rounding


@pytest.mark.parametrize("comparison", ["kl", "reverse kl"])
def test_a_row_without_a_target_has_no_gradient_where_scores_are_large(comparison: str, dtype: torch.dtype) -> None:
    """Their exponentials are infinite where no maximum is taken off."""
    masks = all_queries(9) | {name: lengths_mask([40, 40], 40) for name in ("attention_mask", "attention_mask_aug")}
    masks["attention_mask" if comparison == "reverse kl" else "attention_mask_aug"] = lengths_mask([0, 40], 40)
    case = compared(comparison, 9, 40, gain=400.0, masks=masks, reduction="none").to(dtype)
    value, gradients = case.run("cpu")
    assert not value[0].any()
    assert not any(gradient[0].any() for gradient in gradients)


@every_comparison
@pytest.mark.parametrize("options", [{}, CAUSAL], ids=["plain", "positions"])
@pytest.mark.parametrize("keys", [40, 100, 130])
def test_equal_views_give_exactly_zero(comparison: str, keys: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    case = compared(comparison, 20, keys, gain=3.0, options=options).to(dtype)
    value, gradients = replace(case, x_aug=case.x).run("cpu")
    assert value == 0 and not any(gradient.any() for gradient in gradients)


@every_comparison
def test_views_that_are_far_apart(comparison: str) -> None:
    """Probabilities underflow, and the largest score so far rises from tile to tile in one view alone."""
    for keys in (40, 100, 200):
        case = compared(comparison, 20, keys, pairs=1, gain=40.0, reduction="none")
        check(replace(case, x_aug=tuple(view / 5 for view in case.x_aug)), torch.float32)
    rising = torch.linspace(-300, 300, 200, dtype=torch.float64).expand(1, 2, 20, 200)
    biases = {"attn_bias": torch.zeros_like(rising), "attn_bias_aug": rising}
    check(compared(comparison, 20, 200, pairs=1, biases=biases, reduction="none"), torch.float32)


@pytest.mark.parametrize("comparison", ["kl", "reverse kl", "js"])
@pytest.mark.parametrize("name", ["attn_bias", "attn_bias_aug"])
def test_a_row_that_the_smallest_float_masks_in_one_view(comparison: str, name: str) -> None:
    """All of its keys are equal there. The sums of its exponentials must not be lost beside such a maximum."""
    biases = {"attn_bias": torch.zeros(1, 1, 9, 100, dtype=torch.float64)}
    biases["attn_bias_aug"] = biases["attn_bias"].clone()
    biases[name][:, :, 4] = torch.finfo(torch.float32).min
    check(compared(comparison, 9, 100, pairs=1, biases=biases, reduction="none"), torch.float32)


@every_comparison
def test_gradients_of_a_comparison_that_are_asked_for(comparison: str) -> None:
    case = compared(comparison, 10, 70, 160, pairs=1, heads=2, key_heads=1, reduction="sum").to(torch.bfloat16)
    _, all_gradients = case.run("cpu")
    for needs in ((True, True, False, False), (False, False, True, True), (False, True, False, False)):
        _, gradients = case.run("cpu", needs=needs)
        for needed, gradient, expected in zip(needs, gradients, all_gradients, strict=True):
            assert (gradient is not None) == needed
            assert not needed or torch.equal(gradient, expected)


@every_comparison
@pytest.mark.parametrize("stacked", [False, True], ids=["two tensors", "one tensor"])
def test_strides_and_forms_of_comparisons(comparison: str, stacked: bool) -> None:
    case = compared(comparison, 20, 33, 24, heads=2, masks=ragged([33, 9], 20, 33), reduction="sum")
    check_strides_and_forms(case, "slices", stacked, torch.bfloat16, "cpu")


@every_comparison
def test_bad_numbers_show_in_comparisons(comparison: str) -> None:
    case = compared(comparison, 9, 70, 8, reduction="none").to(torch.float32)
    clean, _ = case.run("cpu")
    for view, bad in (("x", torch.nan), ("x_aug", torch.nan), ("x", torch.inf)):
        query, key = (tensor.clone() for tensor in getattr(case, view))
        query[0, 0, 3, 4] = bad
        try:
            value, gradients = replace(case, **{view: (query, key)}).run("cpu")
        except ear_ops.EarOpsError:  # KL may be infinite
            assert bad == torch.inf
        else:
            assert not value[0, 0].isfinite() and torch.equal(value[1], clean[1])
            assert gradients[0][0, 0].isnan().any() and gradients[0][1].isfinite().all()
