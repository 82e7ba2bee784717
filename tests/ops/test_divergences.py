"""What holds for the divergences between attention: Kullback-Leibler, Jensen-Shannon, squared errors of scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import LOSSES, Case, qk_case
from support.changes import bits_equal, check_blocks_change_nothing, same_results
from support.divergences import (
    DIVERGENCES,
    FORMS,
    QK,
    RAGGED,
    case_of,
    drawn,
    every_divergence,
    every_form,
    in_every_way,
    in_form,
    loss_of,
)
from support.rules import check_case, l2_error
from support.strategies import cases
from torch import Tensor

import ear_ops
from ear_ops.ops import blocks

# --- equal to what one writes without the package -------------------------------------------------------------------


@in_every_way(FORMS)
@given(data=st.data())
def test_equal_to_plain_pytorch(form: str, backend: str, data: st.DataObject) -> None:
    case = drawn(data, form, dtypes=(torch.float64,))
    if form.startswith("qk"):
        softcap = data.draw(st.sampled_from([None, 2.0])) if backend == "reference" else None
        case = replace(case, options={**case.options, "softcap": softcap})
    if form in DIVERGENCES:
        options = {"temperature": data.draw(st.sampled_from([1.0, 2.5])), "support": "all"}
        case = replace(case, options={**case.options, **options})
    upstream = case.upstream()
    value, gradients = case.run(backend, upstream=upstream)
    expected, plain_gradients = case.run_plain(upstream)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    for gradient, plain_gradient in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(gradient, plain_gradient, rtol=1e-9, atol=1e-11)


@in_every_way(DIVERGENCES)
@given(data=st.data())
def test_over_shared_keys_equal_to_plain_pytorch(form: str, backend: str, data: st.DataObject) -> None:
    """The views have masks and biases of their own, so KL without this would be infinite."""
    case = in_form(data.draw(cases("qk_attention_mse", dtypes=(torch.float64,))), form, support="shared")
    value, gradients = case.run(backend)
    expected, plain_gradients = case.run_plain()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    for gradient, plain_gradient in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(gradient, plain_gradient, rtol=1e-9, atol=1e-11)


# --- precision ------------------------------------------------------------------------------------------------------

FEATURES = {
    "plain": {},
    "ragged": {"lengths": ([33, 20], [33, 20])},
    "peaked": {"gain": 6.0},
    "nearly equal": {"closeness": 1e-4},
    "nearly equal and ragged": {"closeness": 1e-4, "lengths": ([33, 20], [33, 20])},
}


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
@in_every_way(QK)
def test_the_error_rule(form: str, backend: str, feature: str, dtype: torch.dtype) -> None:
    options = FEATURES[feature]
    if form == "qk scores" and "closeness" in options:  # closer scores differ by little more than their rounding
        options = options | {"closeness": 0.1}
    check_case(case_of(form, 33, reduction="sum", **options), dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(130, 333), (100, 100)], ids=["130 and 333", "100"])
@pytest.mark.parametrize("form", QK)
def test_the_error_rule_of_long_rows(form: str, lengths: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    """Rows of up to 128 keys and longer ones have kernels of their own on CUDA."""
    check_case(case_of(form, *lengths, dim=64, reduction="sum"), dtype, device, device)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)  # float16 has no probabilities of less than 6e-8
@pytest.mark.parametrize("closeness", [1e-4, 1.0])
@pytest.mark.parametrize("form", [name for name in FORMS if name not in QK])
def test_the_error_rule_of_maps(form: str, closeness: float, dtype: torch.dtype) -> None:
    case = case_of(form, 33, reduction="sum", closeness=closeness, lengths=([33, 20], [33, 20]))
    check_case(case, dtype, "reference")


@in_every_way(FORMS)
@pytest.mark.parametrize("closeness", [1e-4, 1e-2, 0.3], ids=str)
def test_nearly_equal_views_keep_their_digits(form: str, backend: str, closeness: float) -> None:
    """``sum T (log T - log P)`` loses them all: half of its rows are negative at 1e-4."""
    case = case_of(form, 65, reduction="none", closeness=closeness).to(torch.float32)
    value, gradients = case.run(backend)
    exact, exact_gradients = case.to(torch.float64).run("reference")
    rounding = 4e-7 / closeness  # scores are of size 1 and have an error of 1e-7
    assert l2_error(value, exact) < rounding
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        assert l2_error(gradient, exact_gradient) < 10 * rounding


@in_every_way([name for name in FORMS if name != "qk scores"])
def test_small_and_large_distances(form: str, backend: str) -> None:
    """P = (1/2, 1/2) against scores (-d, d) for d of 1e-9 to 16: both sides of where the series ends."""
    for exponent in range(-36, 6):
        distance = 10.0 ** (exponent / 4)
        scores = torch.tensor([[0.0, 0.0], [-distance, distance]], dtype=torch.float64)  # both views, two keys
        if form.startswith("qk"):
            query, key = torch.ones(2, 1, 1, 1, dtype=torch.float64), scores[:, None, :, None]
            value = loss_of(form)(query, key, scale=1.0, reduction="sum", backend=backend, **FORMS[form][1])
        else:
            value = loss_of(form)(scores.softmax(-1)[:, None, None], reduction="sum", **FORMS[form][1])
        tanh, log_cosh = math.tanh(distance), math.log1p(math.sinh(distance) ** 2) / 2
        expected = {
            "forward": distance * tanh - log_cosh,
            "reverse": log_cosh,
            "js": _missing_entropy(tanh) / 2 - _missing_entropy(tanh / 2),
        }[form.split()[1]]
        of_scores = form.startswith("qk") and (form, backend) != ("qk js", "cpu")
        rounded = 0.0 if of_scores else 1e-15 / distance  # what probabilities tell of a small distance
        assert value.item() == pytest.approx(expected, rel=1e-11 + rounded, abs=0.0)


def _missing_entropy(d: float) -> float:
    """``log 2`` minus the entropy of (1 - d) / 2 and (1 + d) / 2."""
    if d < 0.5:
        return sum(d ** (2 * n) / (2 * n * (2 * n - 1)) for n in range(1, 40))
    return sum((1 + s * d) / 2 * math.log1p(s * d) for s in (-1, 1) if s * d > -1)


# --- signs, zeros and symmetry --------------------------------------------------------------------------------------


@in_every_way(FORMS)
@given(data=st.data(), closeness=st.sampled_from([1e-6, 1e-4, 1e-2, 1.0, 30.0]))
def test_never_negative(form: str, backend: str, data: st.DataObject, closeness: float) -> None:
    case = drawn(data, form, reductions=("none",), dtypes=(torch.float32, torch.float64, torch.bfloat16))
    if form.startswith("qk"):
        noise = [t - u for t, u in zip(case.x_aug, case.x, strict=True)]
        case = replace(case, x_aug=tuple(t + closeness * n for t, n in zip(case.x, noise, strict=True)))
    value, _ = case.run(backend)
    assert (value >= 0).all()


@in_every_way(FORMS)
@given(data=st.data())
def test_exactly_zero_for_equal_views(form: str, backend: str, data: st.DataObject) -> None:
    case = drawn(data, form, dtypes=(torch.float32, torch.bfloat16))
    masks = {name: case.masks[name.removesuffix("_aug")] for name in case.masks}
    biases = {name: case.biases["attn_bias"] for name in case.biases}
    value, gradients = replace(case, x_aug=case.x, masks=masks, biases=biases).run(backend)
    assert torch.equal(value, torch.zeros_like(value))
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


@pytest.mark.parametrize("op", ["qk_attention_mse", "qk_attention_kl", "qk_attention_js", "qk_scores_mse"])
def test_equal_views_anywhere_in_memory_and_in_any_order(op: str) -> None:
    """How a product is rounded depends on both, and must not show."""
    for length, width, dim in ((1, 33, 7), (3, 65, 5), (33, 13, 40), (17, 33, 9)):
        query, key = (torch.randn(2, 3, n, dim) for n in (length, width))
        shifted = torch.empty(query.numel() + 1)[1:].view(query.shape).copy_(query)
        length_first = key.transpose(1, 2).contiguous().transpose(1, 2)
        for views in ((query, key, shifted, length_first), (torch.cat([query, query]), torch.cat([key, key]))):
            assert LOSSES[op](*views, backend="reference").item() == 0.0


@pytest.mark.parametrize("form", ["qk js", "qk scores", "maps js"])
@given(data=st.data())
def test_symmetric_in_its_views(form: str, data: st.DataObject) -> None:
    case = replace(drawn(data, form, biased=False, dtypes=(torch.float64,)), stacked=False)
    names = [name for name in case.masks if not name.endswith("_aug")]
    masks = {f"{n}_aug": case.masks[n] for n in names} | {n: case.masks[f"{n}_aug"] for n in names}
    value, gradients = case.run("reference")
    other, other_gradients = replace(case, x=case.x_aug, x_aug=case.x, masks=masks).run("reference")
    torch.testing.assert_close(value, other, rtol=1e-11, atol=1e-11)
    half = len(case.x)
    for gradient, expected in zip(gradients, other_gradients[half:] + other_gradients[:half], strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-11)


def test_the_reverse_direction_is_the_forward_one_of_exchanged_views() -> None:
    query, key, query_aug, key_aug = qk_case(9).inputs()
    reverse = ear_ops.qk_attention_kl(query, key, query_aug, key_aug, direction="reverse")
    assert torch.equal(reverse, ear_ops.qk_attention_kl(query_aug, key_aug, query, key))
    assert not torch.allclose(reverse, ear_ops.qk_attention_kl(query, key, query_aug, key_aug))


# --- definitions ----------------------------------------------------------------------------------------------------


def rows(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, -1, 1)


def test_worked_by_hand() -> None:
    """P = (1/2, 1/2) and T = (1/4, 3/4) in the first row, equal rows in the second."""
    log3 = math.log(3.0)
    query, query_aug, key = rows(0.0, log3), rows(log3, log3), rows(0.0, 1.0)
    arguments = (query, key, query_aug, key)
    kl = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    reverse = 0.5 * math.log(2.0) + 0.5 * math.log(2 / 3)
    js = sum(0.5 * a * math.log(2 * a / (a + b)) for p, t in ((0.5, 0.25), (0.5, 0.75)) for a, b in ((p, t), (t, p)))
    call = {"scale": 1.0, "reduction": "sum"}
    assert ear_ops.qk_attention_kl(*arguments, **call).item() == pytest.approx(kl, abs=1e-15)
    assert ear_ops.qk_attention_kl(*arguments, direction="reverse", **call).item() == pytest.approx(reverse, abs=1e-15)
    assert ear_ops.qk_attention_js(*arguments, **call).item() == pytest.approx(js, abs=1e-15)
    assert ear_ops.qk_scores_mse(*arguments, **call).item() == pytest.approx(log3**2, abs=1e-15)
    for reduction, divisor in {"mean": 2, "padded_mean": 2, "equations": 1}.items():
        found = ear_ops.qk_attention_kl(*arguments, scale=1.0, reduction=reduction).item()
        assert found == pytest.approx(kl / divisor, abs=1e-15)
    assert ear_ops.qk_scores_mse(*arguments, scale=1.0).item() == pytest.approx(log3**2 / 4, abs=1e-15)
    causal = ear_ops.qk_scores_mse(query.flip(2), key.flip(2), query_aug, key.flip(2), scale=1.0, is_causal=True)
    assert causal.item() == pytest.approx(log3**2 / 3, abs=1e-15)  # rows log 3 and 0: three pairs are allowed


def test_the_gradient_is_not_clipped() -> None:
    """P underflows at the second key, which has half of the target: the gradient of its score is -1/2."""
    key = torch.tensor([0.0, -500.0]).reshape(1, 1, 2, 1).requires_grad_()
    query = torch.ones(1, 1, 1, 1)
    loss = ear_ops.qk_attention_kl(query, key, query, torch.zeros(1, 1, 2, 1), scale=1.0)
    assert loss.item() == pytest.approx(250.0 - math.log(2.0))
    (gradient,) = torch.autograd.grad(loss, key)
    assert gradient.flatten().tolist() == pytest.approx([0.5, -0.5])


@every_divergence
def test_temperature_divides_the_final_scores(form: str) -> None:
    bias = torch.randn(7, 7, dtype=torch.float64).masked_fill(torch.eye(7) > 0, -math.inf)
    case = case_of(form, 7, 7, 4, biases={"attn_bias": bias}, options={"softcap": 2.0})
    query, key, query_aug, key_aug = case.inputs()
    scores = [2.0 * torch.tanh(q @ k.mT / 4.0) + bias for q, k in ((query, key), (query_aug, key_aug))]
    eye = torch.eye(7, dtype=torch.float64).expand(2, 2, 7, 7)  # keys that pick an entry of the scores
    finite = [torch.where(bias == -math.inf, 0.0, s / 3.0) for s in scores]
    expected = loss_of(form)(finite[0], eye, finite[1], eye, scale=1.0, attn_bias=bias > -math.inf, **FORMS[form][1])
    options = {**case.arguments(), "temperature": 3.0}
    torch.testing.assert_close(loss_of(form)(query, key, query_aug, key_aug, **options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@every_divergence
def test_temperature_leaves_a_finite_bias_finite(form: str, dtype: torch.dtype) -> None:
    """A row of which every key has the smallest number keeps its keys: as with scores twice as large."""
    views = [tensor.to(dtype) for tensor in case_of(form, 5).inputs()]
    zeros = torch.zeros(5, 5, dtype=dtype)
    bias = zeros.clone()
    bias[1] = torch.finfo(dtype).min
    options = {**FORMS[form][1], "attn_bias": bias, "attn_bias_aug": zeros}
    value = loss_of(form)(*views, temperature=0.5, **options)
    query, key, query_aug, key_aug = views
    expected = loss_of(form)(2 * query, key, 2 * query_aug, key_aug, **options)
    torch.testing.assert_close(value, expected, rtol=1e-2, atol=1e-4)


@in_every_way(DIVERGENCES)
def test_a_row_of_nothing_but_the_smallest_number(form: str, backend: str) -> None:
    """Its scores are all equal in float32, so it is uniform: the sum of its exponentials counts, however small."""
    query, key, query_aug, key_aug = (tensor.float() for tensor in case_of(form, 5).inputs())
    smallest, zeros = torch.full((5, 5), torch.finfo(torch.float32).min), torch.zeros(5, 5)
    options = {**FORMS[form][1], "backend": backend}
    value = loss_of(form)(query, key, query_aug, key_aug, attn_bias=smallest, attn_bias_aug=zeros, **options)
    expected = loss_of(form)(torch.zeros_like(query), key, query_aug, key_aug, **options)
    torch.testing.assert_close(value, expected)


@every_form
def test_head_weights_and_stacked_views(form: str) -> None:
    case = case_of(form, 9, **RAGGED)
    weights = torch.tensor([0.0, 2.0])
    value = loss_of(form)(*case.inputs(), **case.arguments(), head_weights=weights)
    sums, _ = replace(case, reduction="none").run(None)
    total, _ = replace(case, reduction="sum").run(None)
    mean, _ = case.run(None)
    torch.testing.assert_close(value, (sums * weights).sum() * mean / total)
    stacked = replace(case, stacked=True)
    assert torch.equal(stacked.run(None)[0], mean)


# --- gradients and graphs -------------------------------------------------------------------------------------------


def small(form: str) -> Case:
    mask = torch.tensor([[1, 1, 0, 1, 1]])
    sizes = (4, 5, 3) if form.startswith("qk") else (4, 5)
    return case_of(form, *sizes, pairs=1, masks={"attention_mask": mask, "attention_mask_aug": mask})


@in_every_way(FORMS)
def test_gradcheck(form: str, backend: str) -> None:
    case = replace(small(form), stacked=form.endswith("reverse"), reduction="none")
    inputs = [t.requires_grad_() for t in case.inputs()]
    assert torch.autograd.gradcheck(lambda *tensors: case.call(tensors, backend), inputs)


@every_form
def test_second_derivatives(form: str) -> None:
    case = small(form)
    inputs = [t.requires_grad_() for t in case.inputs()]
    assert torch.autograd.gradgradcheck(lambda *tensors: case.call(tensors, "reference"), inputs, fast_mode=True)
    equal = [t.detach().clone().requires_grad_() for t in inputs[: len(inputs) // 2]]
    target = [t.detach().clone() for t in equal]
    assert torch.autograd.gradgradcheck(lambda *first: case.call([*first, *target], "reference"), equal, fast_mode=True)


@in_every_way(FORMS)
def test_the_target_needs_no_gradient(form: str, backend: str) -> None:
    case = case_of(form, 9, **RAGGED)
    count = len(case.inputs())
    _, every = case.run(backend)
    _, some = case.run(backend, [n < count // 2 for n in range(count)])
    assert all(bits_equal(a, b) for a, b in zip(some[: count // 2], every, strict=False))


@in_every_way(FORMS)
@given(data=st.data())
def test_repeated_bit_for_bit(form: str, backend: str, data: st.DataObject) -> None:
    case = drawn(data, form)
    assert same_results(case.run(backend), case.run(backend))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(blocks, "BLOCK_ENTRIES", 1000)
    yield


@every_form
@given(data=st.data())
def test_blocks_change_nothing(form: str, data: st.DataObject) -> None:
    check_blocks_change_nothing(drawn(data, form, dtypes=(torch.float64,)))


@in_every_way(QK)
def test_memory_grows_with_the_length_alone(form: str, backend: str, small_blocks: None) -> None:
    """The tensors that autograd keeps between forward and backward."""
    kept = []
    for length in (64, 128):
        sizes: dict[int, int] = {}

        def note(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        case = case_of(form, length, None, 8, lengths=([length, 9], [length, 9]))
        inputs = [t.requires_grad_() for t in case.inputs()]
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            case.call(inputs, backend)
        kept.append(sum(sizes.values()))
    assert kept[1] < 2.5 * kept[0]


@pytest.mark.parametrize(
    ("form", "stacked"), [("qk reverse", False), ("qk js", True), ("qk scores", False), ("maps forward", True)]
)
def test_full_graph(form: str, stacked: bool) -> None:
    torch.compiler.reset()
    options = {"is_causal": True, "window": 4} if form.startswith("qk") else {}
    case = replace(case_of(form, 7, **{"lengths": ([7, 3], [7, 3])}), stacked=stacked).to(torch.float32)
    case = replace(case, options={**case.options, **options})
    compiled = torch.compile(loss_of(form), fullgraph=True, backend="aot_eager_decomp_partition")
    inputs = [t.requires_grad_() for t in case.inputs()]
    value = compiled(*inputs, **case.arguments())
    expected, gradients = case.run("reference")
    torch.testing.assert_close(value.detach(), expected)
    for found, gradient in zip(torch.autograd.grad(value, inputs), gradients, strict=True):
        torch.testing.assert_close(found, gradient)


@every_form
def test_transforms_of_torch_func(form: str) -> None:
    case = replace(case_of(form, 5, pairs=3), options=FORMS[form][1])
    inputs = case.inputs()
    batched = torch.func.vmap(lambda *views: loss_of(form)(*(v[None] for v in views), **FORMS[form][1]))(*inputs)
    torch.testing.assert_close(batched.mean(), case.run(None)[0])
    gradient = torch.func.grad(lambda first: loss_of(form)(first, *inputs[1:], **FORMS[form][1]))(inputs[0])
    torch.testing.assert_close(gradient, case.run(None)[1][0])


@every_form
def test_autocast_does_not_reach_it(form: str) -> None:
    case = case_of(form, 9, closeness=1e-2).to(torch.float32)
    expected = case.call(case.inputs(), "reference")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(case.call(case.inputs(), "reference"), expected)


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [form for form in FORMS if form not in QK])
def test_a_backend_that_has_no_kernel_is_refused(form: str, device: str) -> None:
    case = case_of(form, 5).to(torch.float32).to(device)
    with pytest.raises(ear_ops.BackendUnavailableError, match=f"{device}.*kernels hold no"):
        case.run(device)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "backward"}, "direction: expected 'forward' or 'reverse', got 'backward'"),
        ({"support": "both"}, "support: expected 'all' or 'shared', got 'both'"),
        ({"temperature": 0.0}, "temperature: expected a positive, finite number, got 0.0"),
        ({"temperature": "2"}, "temperature: expected a positive, finite number, got '2'"),
        ({"temperature": None}, "temperature: expected a positive, finite number, got None"),
        ({"temperature": True}, "temperature: expected a positive, finite number, got True"),
        ({"reduction": "average"}, "reduction: expected one of"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ear_ops.qk_attention_kl(*qk_case(3).inputs(), **options)
    with pytest.raises(ValueError, match=message):
        ear_ops.QKAttentionKLLoss(**options)
