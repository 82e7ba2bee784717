"""What holds for the kernels that compare averages over heads, beside what holds for the reference."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import MEAN_FORMS as FORMS
from support.cases import in_form
from support.cases import mean_case as case_of
from support.changes import fill_padding, same_results
from support.mean_heads import FEATURES, FORM_NAMES, check_close, drawn, run
from support.memory import peak_memory
from support.rules import check_case
from support.strategies import MASK_KINDS, cases

import ear_ops
from ear_ops.ops.mean_heads import QK_MEAN_HEADS

KERNELS = [form for form in FORMS if "cpu" in QK_MEAN_HEADS[FORM_NAMES[form]].kernels]
every_kernel = pytest.mark.parametrize("form", KERNELS)
KERNEL_FEATURES: dict[str, dict[str, Any]] = {
    **FEATURES,
    "several blocks and tiles": {"queries": 130, "keys": 333, "heads": 4, "key_heads": 2},
    "causal": {"queries": 70, "keys": 90, "options": {"is_causal": True}},
    "window": {"queries": 70, "options": {"window": 9}, "side": "left", "lengths": ([70, 40], [70, 40])},
    "many pairs": {"queries": 7, "pairs": 5},
    "many heads": {"queries": 9, "heads": 30},
    "two tiles with a bias": {
        "queries": 20,
        "keys": 280,
        "biases": {"attn_bias": torch.linspace(-3.0, 3.0, 20 * 280, dtype=torch.float64).view(20, 280).sin()},
        "options": {"is_causal": True},
    },
    "rows that do not stay in memory": {"queries": 18, "keys": 720, "heads": 18, "key_heads": 6, "dim": 8},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("feature", KERNEL_FEATURES)
@every_kernel
def test_the_error_rule_of_kernels(form: str, feature: str, dtype: torch.dtype, device: str) -> None:
    if (device, dtype) == ("cuda", torch.float64):
        pytest.skip("the CUDA kernels take no float64")
    sizes = {"queries": 33, **KERNEL_FEATURES[feature]}
    slack = 4.0 if "closeness" in sizes else 1.0  # what cancels leaves chance, in the yardstick too
    check_case(case_of(form, reduction="sum", **sizes), dtype, device, device, slack=slack)


@every_kernel
@given(data=st.data())
def test_kernels_equal_the_reference(form: str, data: st.DataObject) -> None:
    case = drawn(data, form, dtypes=(torch.float64,))
    weights = None
    if case.x[0].shape[1] == case.x_aug[0].shape[1]:
        weights = data.draw(st.sampled_from([None, torch.arange(case.x[0].shape[1]) + 1.0]))
    upstream = case.upstream()
    found, expected = (run(case, backend, upstream, head_weights=weights) for backend in ("cpu", "reference"))
    check_close(found, expected)


@every_kernel
@given(data=st.data())
def test_kernels_in_single_precision(form: str, device: str, data: st.DataObject) -> None:
    case = drawn(data, form, dtypes=(torch.float32, torch.bfloat16, torch.float16), empty=False)
    check_case(case, case.x[0].dtype, device, device, slack=4.0, negligible=1e-6)


@every_kernel
@given(data=st.data())
def test_kernels_are_exactly_zero_for_equal_views(form: str, device: str, data: st.DataObject) -> None:
    case = in_form(data.draw(cases("qk_attention_mse", dtypes=(torch.float32, torch.bfloat16))), form)
    masks = {name: case.masks[name.removesuffix("_aug")] for name in case.masks}
    biases = {name: case.biases["attn_bias"] for name in case.biases}
    value, gradients = run(replace(case, x_aug=case.x, masks=masks, biases=biases).to(device), device)
    assert torch.equal(value, torch.zeros_like(value))
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


@every_kernel
@given(data=st.data())
def test_kernels_never_look_at_padding_and_repeat_bit_for_bit(form: str, device: str, data: st.DataObject) -> None:
    case = drawn(data, form, dtypes=(torch.float32, torch.bfloat16), mask_kinds=MASK_KINDS, layouts=("contiguous",))
    value = data.draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e4]))
    assert same_results(*(run(fill_padding(case, filled).to(device), device) for filled in (0.0, value)))


@every_kernel
def test_kernels_do_not_depend_on_threads_and_forms(form: str) -> None:
    case = case_of(form, 130, lengths=([130, 70], [130, 70]), heads_aug=None).to(torch.float32)
    expected = run(case, "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        assert same_results(run(case, "cpu"), expected)
    finally:
        torch.set_num_threads(threads)
    value, gradients = run(replace(case, stacked=True), "cpu")
    assert torch.equal(value, expected[0])
    for gradient, *views in zip(gradients, expected[1][:2], expected[1][2:], strict=True):
        assert torch.equal(gradient, torch.cat(views))


@every_kernel
def test_a_head_without_weight_has_no_gradient_in_kernels(form: str) -> None:
    case = case_of(form, 9, heads_aug=None).to(torch.float32)
    weights = torch.tensor([0.0, 2.0])
    value, gradients = run(case, "cpu", head_weights=weights)
    expected, _ = run(case, "reference", head_weights=weights)
    torch.testing.assert_close(value, expected)
    assert all(gradient[:, 1].any() and not gradient[:, 0].any() for gradient in gradients)


@every_kernel
def test_a_part_of_the_gradients_and_pairs_without_upstream(form: str) -> None:
    case = case_of(form, 9, lengths=([9, 6], [9, 6]), reduction="none").to(torch.float32)
    _, gradients = run(case, "cpu")
    for n in range(4):
        inputs = [tensor.requires_grad_(n == m) for m, tensor in enumerate(case.inputs())]
        value = case.call(inputs, "cpu")
        (gradient,) = torch.autograd.grad(value, inputs[n], torch.tensor([1.0, 0.0]))
        assert torch.equal(gradient[0], gradients[n][0]) and not gradient[1].any()


@every_kernel
def test_memory_of_kernels_grows_with_the_length(form: str) -> None:
    peaks = []
    for length in (1024, 2048):  # both of as many parts as a pair is ever cut into
        case = case_of(form, length, None, 8, pairs=1).to(torch.float32)
        peaks.append(peak_memory(lambda case=case: run(case, "cpu")))
    assert peaks[1] < 2.2 * peaks[0]


@every_kernel
def test_opcheck(form: str) -> None:
    case = case_of(form, 5, lengths=([5, 3], [5, 3])).to(torch.float32)
    name = f"qk_mean_attention_{FORM_NAMES[form]}"
    mask = torch.cat([case.masks["attention_mask"], case.masks["attention_mask_aug"]]).bool()
    problem = (*case.inputs(), mask, None, None, None, None, 0.25, 0.2, False, 0, None)
    forward = getattr(torch.ops.ear_ops, name).default
    for needs in ([False] * 4, [True, True, False, True]):
        torch.library.opcheck(forward, (*problem, needs))
        assert [len(gradient) for gradient in forward(*problem, needs)[1]] == [2] * sum(needs)


@every_kernel
def test_gradients_are_made_once_and_kept(form: str) -> None:
    """A second backward gives the same, whatever the first one was multiplied by."""
    case = case_of(form, 9, reduction="none").to(torch.float32)
    inputs = [tensor.requires_grad_() for tensor in case.inputs()]
    value = case.call(inputs, "cpu")
    first, doubled, again = (
        torch.autograd.grad(value, inputs, torch.tensor(upstream), retain_graph=True)
        for upstream in ([1.0, 1.0], [2.0, 2.0], [1.0, 1.0])
    )
    for gradient, twice, repeated in zip(first, doubled, again, strict=True):
        assert torch.equal(gradient, repeated) and torch.equal(2 * gradient, twice) and gradient.any()


def test_float16_keeps_gradients_that_only_the_reduction_makes_small() -> None:
    """Those of the sum are 131072, which float16 does not have; the mean divides them by the 4096 queries."""
    query, key = torch.full((1, 1, 4096, 1), 64.0), torch.zeros(1, 1, 2, 1)
    target = torch.tensor([[[[30.0], [0.0]]]])
    views = [tensor.half().requires_grad_() for tensor in (query, key, query / 64, target)]
    value = ear_ops.qk_attention_kl(*views, heads="mean", scale=1.0, backend="cpu")
    (gradient,) = torch.autograd.grad(value, views[1])
    torch.testing.assert_close(gradient, torch.tensor([[[[-32.0], [32.0]]]]).half())


@every_kernel
def test_no_gradient_is_made_where_none_can_be_asked_for(form: str) -> None:
    case = case_of(form, 64, None, 8).to(torch.float32)
    recorded = [tensor.requires_grad_() for tensor in case.inputs()]
    with torch.no_grad():
        peak = peak_memory(lambda: case.call(recorded, "cpu"))
    assert peak == peak_memory(lambda: case.call(case.inputs(), "cpu"))
    assert peak < peak_memory(lambda: case.call(recorded, "cpu"))


@every_kernel
def test_the_operator_checks_its_inputs(form: str) -> None:
    forward = getattr(torch.ops.ear_ops, f"qk_mean_attention_{FORM_NAMES[form]}")
    query, key, query_aug, key_aug = case_of(form, 5).to(torch.float32).inputs()
    rest = (None, None, None, None, 0.25, 0.2, False, 0, None)
    for problem, message in (
        ((query, key, query_aug, key_aug[:, :, :4], None, *rest), r"key_aug: expected shape \[2, 1, 5, 32\]"),
        ((query, key, query_aug[:, :, :4], key_aug, None, *rest), r"query_aug: expected shape \[2, 3, 5, 32\]"),
        ((query, key, query_aug, key_aug.repeat(1, 2, 1, 1), None, *rest), "key_aug: expected a number of heads"),
        ((query, key, query_aug, None, None, *rest), "query_aug, key_aug: expected both or neither"),
        ((query, key, query_aug, key_aug, torch.ones(2, 5), *rest), "key_mask: expected shape"),
        ((query, key, query_aug, key_aug, None, *rest[:-1], 2.0), "softcap: computed by the reference only"),
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
            forward(*problem, [False] * 4)
    with pytest.raises(ValueError, match="needs: expected 4 entries, got 1"):
        forward(query, key, query_aug, key_aug, None, *rest, [True])
