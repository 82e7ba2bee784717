"""The CUDA kernels, compiled for the host and run thread by thread, against the float64 reference.

Everything about indices, masks, barriers and rounding is tried here; races between instructions and speed are for a
GPU, where the other tests run these kernels through their ``device`` parameter.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import cuda_on_host
from support.cases import LAYOUTS, attention_case, pooled_case, qk_case
from support.host_cases import DTYPES, all_queries, check
from support.rules import check_case, check_pairs_without_upstream, check_strides_and_forms
from support.strategies import MASK_KINDS, OPS, REDUCTIONS, cases

import ear_ops

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
