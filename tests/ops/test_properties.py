"""What holds for every loss, whatever the shapes, strides, masks, options and reductions: drawn by hypothesis."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from support.cases import attention_case, case_of, qk_case
from support.changes import bits_equal, fill_padding, padding_of, pairs_of, same_results
from support.rules import check_case
from support.strategies import DTYPES, MASK_KINDS, OPS, cases
from torch import Tensor
from torch.utils.checkpoint import checkpoint

every_op = pytest.mark.parametrize("op", OPS)
PLAIN = ("contiguous",)  # layouts
EXACT = (torch.float32, torch.bfloat16, torch.float64)  # dtypes that a factor of 2 never drives out of range


def close(a: Tensor, b: Tensor) -> None:
    """Equal to the rounding of float32 sums of up to a few thousand numbers; NaN equals NaN."""
    torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6, equal_nan=True)


@every_op
@given(data=st.data())
def test_the_kernels_are_the_reference(op: str, device: str, data: st.DataObject) -> None:
    dtypes = DTYPES if device == "cpu" else DTYPES[:3]
    case = data.draw(cases(op))
    # Rows that are empty in one view have a gradient of nothing but rounding.
    negligible = 1e-6 if op == "qk_attention_js" else 0.0
    # The yardstick of a tiny case may be right by luck, so the bounds are wider than in the tests of chosen cases.
    check_case(case, data.draw(st.sampled_from(dtypes)), device, device, slack=16.0, negligible=negligible)


@every_op
@given(data=st.data())
def test_repeated_bit_for_bit(op: str, device: str, data: st.DataObject) -> None:
    case = data.draw(cases(op, dtypes=DTYPES[:3])).to(device)
    upstream = case.upstream()
    assert same_results(case.run(device, upstream=upstream), case.run(device, upstream=upstream))


@every_op
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_inside_a_checkpoint(op: str, device: str, use_reentrant: bool) -> None:
    case = case_of(op, 9).to(torch.float32).to(device)
    expected = case.run(device)
    inputs = [tensor.requires_grad_() for tensor in case.inputs()]
    value = checkpoint(lambda *tensors: case.call(tensors, device), *inputs, use_reentrant=use_reentrant)
    value.backward()
    assert same_results((value.detach(), [tensor.grad for tensor in inputs]), expected)


@every_op
def test_a_default_device_changes_nothing(op: str, device: str) -> None:
    case = case_of(op, 9, lengths=([9, 6], [9, 6]), pairs=2).to(torch.float32).to(device)
    inputs = case.inputs()
    with torch.device("meta"):
        value = case.call(inputs, device)
    assert bits_equal(value, case.run(device)[0])


@every_op
@given(data=st.data())
def test_the_number_of_threads_changes_no_bit(op: str, data: st.DataObject) -> None:
    case = data.draw(cases(op, dtypes=DTYPES, empty=False))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(case.run("cpu"))
    finally:
        torch.set_num_threads(before)
    assert same_results(*results)


@pytest.mark.parametrize("op", [op for op in OPS if op != "qk_attention_kl"])
@given(data=st.data())
def test_symmetric_in_its_views(op: str, device: str, data: st.DataObject) -> None:
    case = replace(data.draw(cases(op)), stacked=False).to(device)

    def swapped(given: dict[str, Tensor]) -> dict[str, Tensor]:
        pairs = {name: given[name] for name in given}
        for name in [n for n in given if not n.endswith("_aug")]:
            pairs[name], pairs[f"{name}_aug"] = given.get(f"{name}_aug", given[name]), given[name]
        return pairs

    other = replace(case, x=case.x_aug, x_aug=case.x, masks=swapped(case.masks), biases=swapped(case.biases))
    value, gradients = case.run(device)
    other_value, other_gradients = other.run(device)
    close(value, other_value)
    half = len(case.x)
    for gradient, other_gradient in zip(gradients, other_gradients[half:] + other_gradients[:half], strict=True):
        close(gradient, other_gradient)


@every_op
@given(data=st.data())
def test_exactly_zero_for_equal_views(op: str, device: str, data: st.DataObject) -> None:
    case = data.draw(cases(op, dtypes=DTYPES[:3])).to(device)
    masks = {name: case.masks[name.removesuffix("_aug")] for name in case.masks}
    biases = {name: case.biases["attn_bias"] for name in case.biases}
    value, gradients = replace(case, x_aug=case.x, masks=masks, biases=biases).run(device)
    assert torch.equal(value, torch.zeros_like(value))
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


@every_op
@given(data=st.data())
def test_exactly_zero_where_everything_is_masked(op: str, device: str, data: st.DataObject) -> None:
    case = data.draw(cases(op, dtypes=DTYPES[:3], mask_kinds=("empty",))).to(device)
    value, gradients = case.run(device)
    assert torch.equal(value, torch.zeros_like(value))
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


@every_op
@pytest.mark.parametrize("reduction", ["mean", "padded_mean", "equations", "sum"])
@pytest.mark.parametrize("stacked", [False, True])
def test_batch_of_no_pairs(op: str, reduction: str, stacked: bool, device: str) -> None:
    case = case_of(op, 5, pairs=0, reduction=reduction, stacked=stacked).to(torch.float32).to(device)
    value, gradients = case.run(device)
    assert value.item() == 0.0
    assert all(gradient.shape == t.shape for gradient, t in zip(gradients, case.inputs(), strict=True))


# --- padding ------------------------------------------------------------------------------------------------------


def test_the_reference_does_not_look_at_uncounted_rows() -> None:
    case = attention_case(5, lengths=([3, 5], [4, 5])).to(torch.float32)
    expected, found = (fill_padding(case, value).run("reference") for value in (0.0, math.nan))
    assert same_results(expected, found)


def test_the_reference_does_not_look_at_the_bias_of_uncounted_rows() -> None:
    results = []
    for value in (0.0, math.nan):
        bias = torch.zeros(5, 5).index_fill(0, torch.tensor([4]), value)
        case = qk_case(5, lengths=([4, 5], [4, 4]), biases={"attn_bias": bias}).to(torch.float32)
        results.append(case.run("reference"))
    assert same_results(*results)


@pytest.mark.parametrize("backend", ["kernels", "reference"])
@every_op
@given(data=st.data())
def test_padding_is_never_looked_at(op: str, backend: str, device: str, data: st.DataObject) -> None:
    backend = device if backend == "kernels" else backend
    case = data.draw(cases(op, dtypes=DTYPES[:3], mask_kinds=MASK_KINDS, layouts=PLAIN)).to(device)
    value = data.draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e4]))
    clean, spoilt = fill_padding(case, 0.0), fill_padding(case, value)
    expected, found = clean.run(backend), spoilt.run(backend)
    assert torch.isfinite(found[0]).all()
    assert same_results(expected, found)
    padding = padding_of(case)
    where = list(padding[0]) + list(padding[1])
    if case.stacked:
        where = [None if a is None else torch.cat([a, b]) for a, b in zip(*padding, strict=True)]
    for gradient, padded in zip(found[1], where, strict=True):
        assert padded is None or not gradient.masked_select(padded).any()


@every_op
@pytest.mark.parametrize("side", ["right", "left"])
@given(data=st.data(), extra=st.integers(1, 20))
def test_more_padding_changes_nothing(op: str, side: str, device: str, data: st.DataObject, extra: int) -> None:
    reductions = ("mean", "equations", "sum", "none")
    case = data.draw(cases(op, reductions=reductions, mask_kinds=MASK_KINDS, biased=False, same_length=True))
    case = case.to(device)
    padding = (0, extra) if side == "right" else (extra, 0)
    masks = {name: F.pad(mask, padding) for name, mask in case.masks.items()}
    where = (*padding, *padding) if op == "attention_mse" else (0, 0, *padding)
    x, x_aug = (tuple(F.pad(t, where, value=math.nan) for t in view) for view in (case.x, case.x_aug))
    longer = replace(case, x=x, x_aug=x_aug, masks=masks, layout="contiguous")
    value, gradients = replace(case, layout="contiguous").run(device)
    longer_value, longer_gradients = longer.run(device)
    close(value, longer_value)
    for gradient, longer_gradient in zip(gradients, longer_gradients, strict=True):
        close(F.pad(gradient, where), longer_gradient)


# --- NaN and infinity ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_bad_numbers_in_queries_and_keys_show(
    bad: float, backend: str, which: int, dtype: torch.dtype, device: str
) -> None:
    """One number of one real row: its pair and head are NaN, the other pair and its gradients are as before."""
    backend = device if backend == "kernels" else backend
    case = qk_case(9, None, 8, lengths=([9, 7], [9, 8]), reduction="none").to(dtype).to(device)
    tensors = [t.clone() for t in (*case.x, *case.x_aug)]
    tensors[which][0, 1, 3, 5] = bad
    spoilt = replace(case, x=tuple(tensors[:2]), x_aug=tuple(tensors[2:]))
    (value, gradients), (expected, expected_gradients) = spoilt.run(backend), case.run(backend)
    assert value[0, 1].isnan() and torch.equal(value[1], expected[1]) and torch.equal(value[0, 0], expected[0, 0])
    assert gradients[which][0, 1].isnan().any()
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(gradient[1], other[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize("which", range(2))
@pytest.mark.parametrize("op", ["attention_mse", "pooled_distance"])
def test_bad_numbers_show(bad: float, backend: str, which: int, op: str, device: str) -> None:
    backend = device if backend == "kernels" else backend
    case = case_of(op, 9, pairs=2, lengths=([9, 7], [9, 8]), reduction="none").to(torch.float32).to(device)
    tensors = [case.x[0].clone(), case.x_aug[0].clone()]
    tensors[which][0, 0, 3] = bad
    spoilt = replace(case, x=(tensors[0],), x_aug=(tensors[1],))
    (value, gradients), (expected, expected_gradients) = spoilt.run(backend), case.run(backend)
    assert not torch.isfinite(value[0]).all() and torch.equal(value[1], expected[1])
    assert all(not torch.isfinite(gradient[0]).all() for gradient in gradients)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(gradients, expected_gradients, strict=True))


# --- parts and wholes ---------------------------------------------------------------------------------------------


@every_op
@given(data=st.data())
def test_batches_add_up_and_concatenate(op: str, device: str, data: st.DataObject) -> None:
    case = data.draw(cases(op, reductions=("none",), layouts=PLAIN)).to(device)
    cut = data.draw(st.integers(0, case.pairs))
    index = torch.arange(case.pairs, device=device)
    parts = [pairs_of(case, index[:cut]), pairs_of(case, index[cut:])]
    whole, gradients = case.run(device)
    assert bits_equal(torch.cat([part.run(device)[0] for part in parts]), whole)
    total, total_gradients = replace(case, reduction="sum").run(device)
    close(total, sum(replace(part, reduction="sum").run(device)[0] for part in parts))
    assert all(bits_equal(a, b) for a, b in zip(gradients, total_gradients, strict=True))


@every_op
@given(data=st.data())
def test_permuted_pairs(op: str, device: str, data: st.DataObject) -> None:
    case = data.draw(cases(op, layouts=PLAIN)).to(device)
    order = torch.tensor(data.draw(st.permutations(range(case.pairs))), dtype=torch.int64, device=device)
    value, permuted = case.run(device)[0], pairs_of(case, order).run(device)[0]
    close(value[order] if case.reduction == "none" else value, permuted)


@pytest.mark.parametrize("op", [op for op in OPS if op != "pooled_distance"])
@given(data=st.data())
def test_permuted_heads(op: str, device: str, data: st.DataObject) -> None:
    case = data.draw(cases(op, layouts=PLAIN, biased=False)).to(device)
    heads, key_heads = case.x[0].shape[1], case.x[-1].shape[1]
    key_order = torch.tensor(data.draw(st.permutations(range(key_heads))), dtype=torch.int64, device=device)
    group = heads // key_heads
    order = (key_order[:, None] * group + torch.arange(group, device=device)).flatten()
    orders = (order,) if op == "attention_mse" else (order, key_order)
    x, x_aug = (tuple(t[:, o] for t, o in zip(view, orders, strict=True)) for view in (case.x, case.x_aug))
    value, permuted = case.run(device)[0], replace(case, x=x, x_aug=x_aug).run(device)[0]
    close(value[:, order] if case.reduction == "none" else value, permuted)


# --- gradients ----------------------------------------------------------------------------------------------------


@every_op
@given(data=st.data())
def test_any_subset_of_gradients(op: str, device: str, data: st.DataObject) -> None:
    case = data.draw(cases(op, dtypes=DTYPES[:3])).to(device)
    count = len(case.inputs())
    needs = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    _, every = case.run(device)
    _, some = case.run(device, needs)
    assert [gradient is not None for gradient in some] == needs
    assert all(bits_equal(a, b) for a, b, needed in zip(some, every, needs, strict=True) if needed)


@every_op
@given(data=st.data())
def test_twice_the_loss_has_exactly_twice_the_gradient(op: str, device: str, data: st.DataObject) -> None:
    case = data.draw(cases(op, dtypes=EXACT if device == "cpu" else EXACT[:2])).to(device)
    upstream = case.upstream()
    _, once = case.run(device, upstream=upstream)
    _, twice = case.run(device, upstream=2 * upstream)
    assume(all(not ((g != 0) & (g.abs() < 1e-30)).any() for g in once))
    assert all(bits_equal(2 * a, b) for a, b in zip(once, twice, strict=True))


@every_op
@given(data=st.data())
def test_upstream_gradients_per_head_are_per_head(op: str, device: str, data: st.DataObject) -> None:
    """The gradient for upstream u equals that of the sum over heads of u times the loss of that head alone."""
    case = data.draw(cases(op, reductions=("none",), empty=False)).to(device)
    upstream = case.upstream()
    _, gradients = case.run(device, upstream=upstream)
    inputs = [t.requires_grad_() for t in case.inputs()]
    weighted = (case.call(inputs, "reference") * upstream).sum()
    for gradient, expected in zip(gradients, torch.autograd.grad(weighted, inputs), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


@every_op
def test_inside_a_larger_graph(op: str, device: str) -> None:
    """Inputs that are not leaves, a loss that is not the last node, added to another term of the same tensors."""
    case = case_of(op, 9, lengths=([9, 4, 7], [6, 9, 7]), pairs=3).to(torch.float32).to(device)
    grads = []
    for backend in (device, "reference"):
        inputs = [t.requires_grad_() for t in case.inputs()]
        deeper = [torch.sin(1.5 * t) for t in inputs]
        loss = torch.tanh(40.0 * case.call(deeper, backend)) ** 2 + 1e-3 * sum(t.square().sum() for t in deeper)
        loss.backward()
        grads.append([t.grad for t in inputs])
    for gradient, expected in zip(*grads, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@every_op
def test_gradients_accumulate_over_calls(op: str, device: str) -> None:
    case = case_of(op, 9, stacked=True).to(torch.float32).to(device)
    inputs = [t.requires_grad_() for t in case.inputs()]
    first = case.call(inputs, device)
    (first + 3.0 * case.call(inputs, device)).backward()
    _, once = case.run(device)
    for t, gradient in zip(inputs, once, strict=True):
        torch.testing.assert_close(t.grad, 4.0 * gradient)


@every_op
@pytest.mark.parametrize("upstream_requires_grad", [False, True], ids=["constant upstream", "upstream of the graph"])
def test_no_second_derivative_says_so(op: str, upstream_requires_grad: bool, device: str) -> None:
    """Without the error the second derivative of the loss would silently count as zero."""
    case = case_of(op, 5).to(torch.float32).to(device)
    inputs = [t.requires_grad_() for t in case.inputs()]
    loss = case.call(inputs, device)
    loss = loss.square() if upstream_requires_grad else loss
    with pytest.raises(RuntimeError, match=f"{op}: .*second derivative.*create_graph=True.*backend='reference'"):
        (gradient,) = torch.autograd.grad(loss, inputs[:1], create_graph=True)
        torch.autograd.grad(gradient.square().sum(), inputs[:1])


@every_op
def test_the_reference_has_second_derivatives(op: str) -> None:
    case = case_of(op, 3, pairs=1)
    inputs = [t.requires_grad_() for t in case.inputs()]
    assert torch.autograd.gradgradcheck(lambda *tensors: case.call(tensors, "reference"), inputs, fast_mode=True)
