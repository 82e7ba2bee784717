"""The CUDA kernels, compiled for the host and run thread by thread, against the float64 reference.

Everything about indices, masks, barriers and rounding is tried here; races between instructions and speed are for a
GPU, where the other tests run these kernels through their ``device`` parameter.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import cuda_on_host
from support.cases import LAYOUTS, MEAN_FORMS, Case, attention_case, lengths_mask, mean_case, pooled_case, qk_case
from support.rules import check_case, check_pairs_without_upstream, check_strides_and_forms, l2_error
from support.strategies import MASK_KINDS, OPS, REDUCTIONS, cases

import ear_ops
from ear_ops.ops.mean_heads import QK_MEAN_HEADS, MeanHeadsProblem
from ear_ops.ops.problem import AttentionProblem
from ear_ops.ops.qk_divergences import QK_DIVERGENCES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif(
    not cuda_on_host.LIBRARY.exists(), reason="not compiled: python tests/cuda_on_host/build.py"
)


@pytest.fixture(autouse=True, scope="module")
def kernels() -> Iterator[None]:
    with cuda_on_host.in_place_of_cpu_kernels():
        yield


@pytest.fixture(autouse=True)
def device_as_usual(kernels: None) -> Iterator[None]:
    cuda_on_host.configure()
    yield
    cuda_on_host.configure()


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def check(case: Case, dtype: torch.dtype) -> None:
    # One rounded score spreads over a whole row of gradients, so the errors of so few rows do not average out.
    check_case(case, dtype, "cpu", slack=2.0)


def all_queries(queries: int) -> dict[str, torch.Tensor]:
    """Query masks of two pairs, needed where there are key masks and another number of keys."""
    return {name: torch.ones(2, queries, dtype=torch.bool) for name in ("query_mask", "query_mask_aug")}


# --- qk_attention_mse ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 17, 32, 40, 64, 80, 96, 128, 160])
def test_head_dimensions(dim: int, dtype: torch.dtype) -> None:
    check(qk_case(18, 21, dim, pairs=1, heads=1, reduction="sum"), dtype)


def test_the_gradient_of_a_single_key_is_exactly_zero() -> None:
    """The backward subtracts what the forward has summed: with rows and columns swapped it must be the same bits."""
    check_case(qk_case(513, 1, 16, reduction="none"), torch.float32, "cpu")


def test_no_chunk_of_the_head_dimension_is_less_exact_than_the_others() -> None:
    """As it would be if its pass summed the scores in another order than the forward."""
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(1, 1, length, 256, generator=generator) for length in (64, 2, 64, 2)]
    gradients = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "cpu")):
        given = [view.to(dtype).clone().requires_grad_() for view in views]
        ear_ops.qk_attention_mse(*given, reduction="sum", backend=backend).backward()
        gradients.append(given[0].grad.double())
    exact, found = (gradient.unflatten(-1, (-1, 64)) for gradient in gradients)
    errors = (found - exact).square().sum((0, 1, 2, 4)).sqrt() / exact.square().sum((0, 1, 2, 4)).sqrt()
    assert errors.max() < 4 * errors.min(), errors


@pytest.mark.parametrize(("architecture", "dim"), [("sm_80", 128), ("sm_86", 64), ("sm_86", 128), ("sm_80", 256)])
def test_head_dimensions_in_chunks_where_shared_memory_is_scarce(
    architecture: str, dim: int, dtype: torch.dtype
) -> None:
    cuda_on_host.configure(architecture=architecture)
    check(qk_case(5, 66, dim, pairs=1, heads=1, reduction="sum"), dtype)


@pytest.mark.parametrize(
    ("queries", "keys"),
    [(1, 1), (1, 130), (64, 64), (64, 65), (65, 64), (65, 128), (128, 128), (129, 128), (70, 129), (3, 200), (130, 2)],
    ids=str,
)
def test_lengths(queries: int, keys: int, dtype: torch.dtype) -> None:
    check(qk_case(queries, keys, 16, pairs=1, heads=1, reduction="none"), dtype)


@pytest.mark.parametrize("lengths", [([150, 9], [120, 131]), ([0, 3], [0, 150]), ([64, 65], [128, 1])], ids=str)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding(lengths: tuple[list[int], list[int]], side: str) -> None:
    check(qk_case(150, None, 32, heads=1, lengths=lengths, side=side), torch.bfloat16)


@pytest.mark.parametrize(
    ("length", "lengths"),
    [(31, ([30, 9], [20, 31])), (31, ([0, 3], [0, 31])), (100, ([100, 65], [30, 64])), (128, ([3, 97], [128, 0]))],
    ids=str,
)
def test_padding_of_short_rows(length: int, lengths: tuple[list[int], list[int]], dtype: torch.dtype) -> None:
    check(qk_case(length, None, 16, lengths=lengths, reduction="padded_mean"), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "dim", "lengths"),
    [(70, 129, 64, None), (200, 450, 40, None), (140, 130, 128, None), (150, 150, 64, ([150, 9], [70, 131]))],
    ids=str,
)
def test_long_rows_on_hopper(
    queries: int,
    keys: int,
    dim: int,
    lengths: tuple[list[int], list[int]] | None,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EAR_OPS_CUDA_HOPPER", "1")
    case = qk_case(queries, keys, dim, heads=2, key_heads=1, lengths=lengths, reduction="none")
    check(case, dtype)
    rounded, sizes = case.to(dtype), []
    for asked in ("1", "0"):
        monkeypatch.setenv("EAR_OPS_CUDA_HOPPER", asked)
        ear_ops.qk_attention_mse(*rounded.x, *rounded.x_aug, backend="cpu")
        sizes.append(torch.ops.ear_ops_cuda_on_host.memory()[1::3])  # a sum for each block
    assert sizes[0] != sizes[1], "the same kernel ran"


def test_a_negative_or_no_scale(dtype: torch.dtype) -> None:
    for scale in (-0.3, 0.0):
        check(qk_case(18, 21, 16, pairs=1, heads=1, options={"scale": scale}, reduction="sum"), dtype)


@pytest.mark.parametrize("keys", [100, 140])
def test_a_bias_of_the_smallest_float_masks(keys: int, dtype: torch.dtype) -> None:
    """Masks are made of it. A row of nothing else has equal probabilities, as in torch."""
    bias = torch.zeros(1, 1, 9, keys, dtype=torch.float64)
    bias[..., 3:] = torch.finfo(torch.float32).min
    bias[:, :, 4] = torch.finfo(torch.float32).min
    check(qk_case(9, keys, 16, pairs=1, biases={"attn_bias": bias}, reduction="sum"), dtype)


@pytest.mark.parametrize("exponent", [-80, -30, 20, 80])
@pytest.mark.parametrize("keys", [30, 150])
def test_powers_of_two_in_floats_change_no_digit(keys: int, exponent: int) -> None:
    """Floats are multiplied as pairs of float16, which have few exponents: each vector is brought into their range."""
    case = qk_case(20, keys, 48, reduction="sum").to(torch.float32)
    powers = 2.0**exponent, 2.0**-exponent
    scaled = replace(case, **{side: tuple(map(torch.mul, getattr(case, side), powers)) for side in ("x", "x_aug")})
    value, gradients = case.run("cpu")
    value_of_scaled, gradients_of_scaled = scaled.run("cpu")
    assert value == value_of_scaled
    for power, gradient, of_scaled in zip(powers * 2, gradients, gradients_of_scaled, strict=True):
        assert torch.equal(gradient / power, of_scaled)


@pytest.mark.parametrize("keys", [2, 70, 150])
def test_huge_vectors_at_right_angles_give_finite_scores(keys: int) -> None:
    huge = 2.0**80
    query, key = torch.tensor([[0.0, huge]]), torch.zeros(keys, 2)
    key[0, 0] = huge
    query_aug, key_aug = torch.tensor([[0.0, 1.0]]), torch.linspace(-1, 1, 2 * keys).view(keys, 2)
    views = [view[None, None].requires_grad_() for view in (query, key, query_aug, key_aug)]
    value = ear_ops.qk_attention_mse(*views, scale=1.0, reduction="sum", backend="cpu")
    exact = ear_ops.qk_attention_mse(
        *(view.double() for view in views), scale=1.0, reduction="sum", backend="reference"
    )
    assert torch.allclose(value.double(), exact, rtol=1e-5)
    value.backward()
    assert all(view.grad is not None and view.grad.isfinite().all() for view in views)


@pytest.mark.parametrize("keys", [30, 150])
def test_floats_whose_features_differ_in_size(keys: int) -> None:
    case = qk_case(20, keys, 48, reduction="sum")
    powers = torch.exp2(torch.arange(48) % 13 - 6.0).double()  # sizes from 1 to 4096
    spread = {side: (getattr(case, side)[0] * powers, getattr(case, side)[1] / powers) for side in ("x", "x_aug")}
    check(replace(case, **spread), torch.float32)


@pytest.mark.parametrize("keys", [5, 100, 140])
def test_scores_of_any_finite_size(keys: int, dtype: torch.dtype) -> None:
    case = qk_case(9, keys, 16, pairs=1, reduction="none").to(dtype)
    huge = replace(case, x=tuple(view * 1e5 if dtype != torch.float16 else view * 1e4 for view in case.x))
    value, gradients = huge.run("cpu")
    assert value.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
    expected, _ = huge.to(torch.float64).run("reference")
    assert torch.allclose(value.double(), expected, rtol=1e-3)


@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(70, 150), (150, 70), (40, 40)], ids=str)
def test_structure(queries: int, keys: int, is_causal: bool, window: int | None) -> None:
    options = {"is_causal": is_causal, "window": window}
    check(qk_case(queries, keys, 8, pairs=1, heads=1, options=options, reduction="sum"), torch.float16)


@pytest.mark.parametrize(
    ("queries", "keys", "options"),
    [(64, 129, {"is_causal": True}), (64, 129, {"window": 3}), (128, 191, {"window": 3})],
    ids=["last key of a causal row", "far end of a window", "near end of a window"],
)
def test_a_tile_that_holds_one_pair_in_its_corner_is_not_passed_over(
    queries: int, keys: int, options: dict[str, object]
) -> None:
    check(qk_case(queries, keys, 8, pairs=1, heads=1, options=options, reduction="sum"), torch.float32)


@pytest.mark.parametrize("both", [False, True], ids=["one bias", "a bias for each view"])
def test_bias(both: bool, dtype: torch.dtype) -> None:
    biases = {}
    for seed, name in enumerate(("attn_bias", "attn_bias_aug")[: 1 + both]):
        generator = torch.Generator().manual_seed(seed)
        bias = torch.randn((2, 1, 9, 23), generator=generator, dtype=torch.float64)
        biases[name] = bias.masked_fill(bias > 1, -torch.inf)
    check(qk_case(9, 23, 16, biases=biases, reduction="sum"), dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_grouped_queries_under_every_reduction(reduction: str, dtype: torch.dtype) -> None:
    case = qk_case(10, 12, 16, heads=4, key_heads=2, lengths=([12, 7], [11, 12]), reduction=reduction)
    case = replace(case, masks={**case.masks, **all_queries(10)})
    check(case, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stacked", [False, True], ids=["two tensors", "one tensor"])
def test_strides_and_forms(layout: str, stacked: bool) -> None:
    case = qk_case(20, 33, 24, heads=4, key_heads=2, lengths=([33, 9], [20, 31]), reduction="sum")
    check_strides_and_forms(case, layout, stacked, torch.bfloat16, "cpu")


@pytest.mark.parametrize("dim", [32, 160])
def test_only_the_gradients_asked_for(dim: int) -> None:
    case = qk_case(10, 12, dim, pairs=1, heads=2, key_heads=1, reduction="sum").to(torch.bfloat16)
    _, all_gradients = case.run("cpu")
    for needs in itertools.product([False, True], repeat=4):
        _, gradients = case.run("cpu", needs=needs)
        for needed, gradient, expected in zip(needs, gradients, all_gradients, strict=True):
            assert (gradient is not None) == needed
            assert not needed or torch.equal(gradient, expected)


def test_heads_of_a_group_with_upstream_gradients_of_different_sizes() -> None:
    """The largest sets the scale: under the first's, the others' gradients would leave the range of float16."""
    case = qk_case(10, 12, 16, pairs=1, heads=2, key_heads=1, reduction="none").to(torch.float16)
    for upstream in (torch.tensor([[1e-7, 1.0]]), torch.tensor([[1.0, 1e-7]])):
        _, gradients = case.run("cpu", upstream=upstream)
        _, expected = case.to(torch.float64).run("reference", upstream=upstream)
        for gradient, reference in zip(gradients[1::2], expected[1::2], strict=True):  # of the keys
            assert (gradient.double() - reference).norm() < 2e-3 * reference.norm()


@pytest.mark.parametrize("make", [qk_case, attention_case, pooled_case], ids=["qk", "attention", "pooled"])
def test_a_pair_without_upstream_gradient(make, dtype: torch.dtype) -> None:
    check_pairs_without_upstream(make(7, 9, pairs=2), dtype, "cpu")


def test_small_gradients_survive_float16() -> None:
    close = qk_case(40, None, 32, pairs=1, heads=1, closeness=1e-2, reduction="sum").to(torch.float16)
    upstream = torch.tensor(2.0**12)
    _, gradients = close.run("cpu", upstream=upstream)
    _, expected = close.to(torch.float64).run("reference", upstream=upstream)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert (gradient.double() - reference).norm() < 2e-3 * reference.norm()


@pytest.mark.parametrize("make", [qk_case, attention_case, pooled_case], ids=["qk", "attention", "pooled"])
def test_the_order_in_which_threads_run_changes_no_bit(make, dtype: torch.dtype) -> None:
    case = make(70, 40, pairs=2, lengths=None, reduction="none").to(dtype)
    upstream = case.upstream()
    expected, expected_gradients = case.run("cpu", upstream=upstream)
    for seed in (1, 2):
        cuda_on_host.configure(seed=seed)
        value, gradients = case.run("cpu", upstream=upstream)
        assert torch.equal(value, expected)
        assert all(map(torch.equal, gradients, expected_gradients))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("keys", [9, 100, 140])
def test_bad_numbers_show_where_they_are_real_and_only_there(bad: float, keys: int, dtype: torch.dtype) -> None:
    mask = torch.ones(2, keys, dtype=torch.bool)
    mask[1, 4] = mask[0, 5] = False
    masks = {"attention_mask": mask, "attention_mask_aug": mask, **all_queries(9)}
    case = qk_case(9, keys, 8, masks=masks, reduction="none").to(dtype)
    clean, clean_gradients = case.run("cpu")
    for pair in (0, 1):
        key = case.x[1].clone()
        key[pair, 0, 4] = bad
        value, gradients = replace(case, x=(case.x[0], key)).run("cpu")
        if pair == 1:  # padding
            assert torch.equal(value, clean) and all(map(torch.equal, gradients, clean_gradients))
        else:
            assert value[0, 0].isnan() and torch.equal(value.flatten()[1:], clean.flatten()[1:])
            assert gradients[0][0, 0].isnan().any() and gradients[0][0, 1:].isfinite().all()
            assert not gradients[1][0, :, 5].any()  # of a padded key, which nothing reaches


@pytest.mark.parametrize("keys", [1, 9, 100, 140])
def test_a_row_of_nothing_but_minus_infinity_shows(keys: int, dtype: torch.dtype) -> None:
    case = qk_case(3, keys, 8, pairs=1, reduction="none").to(dtype)
    query, key = torch.ones_like(case.x[0]), case.x[1].clone()
    key[0, 0] = -torch.inf
    for backend in ("cpu", "reference"):
        value, _ = replace(case, x=(query, key)).run(backend)
        assert value[0, 0].isnan() and value[0, 1].isfinite()


# --- divergences, and squared errors of scores ---------------------------------------------------------------------

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


def ragged(lengths: list[int], queries: int, keys: int) -> dict[str, torch.Tensor]:
    """The same padding in both views, and a query that does not count."""
    masks = {
        **all_queries(queries),
        **dict.fromkeys(("attention_mask", "attention_mask_aug"), lengths_mask(lengths, keys)),
    }
    masks["query_mask"][1, 2] = False
    return masks


CAUSAL = {"is_causal": True, "window": 30}


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


# --- averages over heads ------------------------------------------------------------------------------------------

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


# --- the other losses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [1, 13, 16, 200])
@pytest.mark.parametrize("lengths", [None, ([1, 1], [1, 0])], ids=["no padding", "padding"])
def test_attention_mse(keys: int, lengths: tuple[list[int], list[int]] | None, dtype: torch.dtype) -> None:
    if lengths is not None:
        lengths = tuple([n * keys * 2 // 3 for n in view] for view in lengths)
    masks = all_queries(90)
    masks["query_mask"][0, 7] = 0
    check(attention_case(90, keys, lengths=lengths, masks=masks, reduction="none"), dtype)


@pytest.mark.parametrize("length", [1, 31, 300])
@pytest.mark.parametrize("features", [1, 24, 64, 100])
@pytest.mark.parametrize("lengths", [None, (1.0, 0.3, 0.0)], ids=["no padding", "padding"])
def test_pooled_distance(length: int, features: int, lengths: tuple[float, ...] | None, dtype: torch.dtype) -> None:
    ragged = lengths and ([int(n * length) for n in lengths], [length, int(0.6 * length), length])
    check(pooled_case(length, features, lengths=ragged, offset=5.0, reduction="none"), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stacked", [False, True], ids=["two tensors", "one tensor"])
@pytest.mark.parametrize("make", [attention_case, pooled_case], ids=["attention", "pooled"])
def test_strides_and_forms_of_the_others(make, layout: str, stacked: bool) -> None:
    case = make(24, 32, pairs=2, lengths=([24, 9], [20, 24]), reduction="sum")
    check_strides_and_forms(case, layout, stacked, torch.bfloat16, "cpu")


@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
@settings(max_examples=10)
def test_anything(op: str, data: st.DataObject) -> None:
    case = data.draw(cases(op, dtypes=DTYPES, mask_kinds=MASK_KINDS))
    # Rows with one key in a view have a gradient of nothing but rounding.
    negligible = 1e-6 if op == "qk_attention_js" else 0.0
    check_case(case, data.draw(st.sampled_from(DTYPES)), "cpu", slack=16.0, negligible=negligible)


# --- what is reported ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (1, "global memory: an access of 4 bytes outside of every tensor .*thread 63"),
        (2, "shared memory: an access of 4 bytes at offset 256 of 256 .*thread 63"),
        (3, "global memory: an access of 16 bytes is not aligned"),
        (4, "sync_block: not every thread of a warp is there .*thread 5 has finished"),
        (5, "shuffle_xor: not every thread of a warp is there .*thread 5 has finished"),
        (6, "not every thread of a warp is there .*thread"),
    ],
)
def test_mistakes_are_reported(mistake: int, message: str) -> None:
    data = torch.zeros(64)
    assert torch.ops.ear_ops_cuda_on_host.run_mistaken(data, 0) == "" and data.eq(1).all()
    assert re.search(message, torch.ops.ear_ops_cuda_on_host.run_mistaken(data, mistake))


@pytest.mark.parametrize("mistake", [7, 8, 9], ids=["no barrier", "no wait for a copy", "nothing written"])
def test_what_is_read_too_early_is_nan(mistake: int) -> None:
    data = torch.zeros(64)
    assert torch.ops.ear_ops_cuda_on_host.run_mistaken(data, mistake) == ""
    assert data.isnan().any()


@pytest.mark.parametrize("blocks", [2**31, 2**32 + 65536])
def test_a_grid_that_is_too_large_is_refused(blocks: int) -> None:
    """CUDA takes 32 bits of the number of blocks, so most of the result would never be written."""
    data = torch.zeros(64)
    assert "split the batch" in torch.ops.ear_ops_cuda_on_host.run_mistaken(data, 0, blocks)
    assert data.eq(0).all()  # no block ran


def test_a_mask_at_an_odd_address_is_read_byte_by_byte() -> None:
    """Masks are read as many at a time as probabilities, where all of them lie evenly."""
    attn = torch.rand(4, 2, 3, 8)
    mask = torch.ones(1 + 4 * 8, dtype=torch.bool)[1:].view(4, 8)
    mask[1, 3:] = False
    expected = torch.ops.ear_ops_cuda_on_host.attention_mse(attn, None, mask.clone(), None)
    assert torch.equal(torch.ops.ear_ops_cuda_on_host.attention_mse(attn, None, mask, None), expected)


def test_statistics_of_another_kind_are_refused() -> None:
    query = torch.randn(2, 1, 3, 8)
    inputs = (query, query, None, None, None, None, None, None, 1.0, False, 0, None)
    sums, stats = torch.ops.ear_ops_cuda_on_host.qk_attention_mse(*inputs)
    with pytest.raises(TypeError, match="row_stats: expected dtype Float"):
        torch.ops.ear_ops_cuda_on_host.qk_attention_mse_backward(sums, *inputs, stats.double(), [True] * 4)
