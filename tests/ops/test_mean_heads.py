"""What holds where the averages over the heads of two views are compared, whose numbers of heads may differ."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import LOSSES, Case, in_form, lengths_mask, qk_case
from support.cases import MEAN_FORMS as FORMS
from support.cases import mean_case as case_of
from support.changes import fill_padding, same_results
from support.mean_heads import FEATURES, check_close, drawn, run, written_out
from support.rules import check_case, l2_error
from support.strategies import MASK_KINDS, cases
from torch import Tensor

import ear_ops
from ear_ops.capture import AttentionInputs
from ear_ops.ops import blocks, extension

every_form = pytest.mark.parametrize("form", FORMS)
every_divergence = pytest.mark.parametrize("form", [form for form in FORMS if form != "mse"])


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and not extension.CPU.loaded:
        pytest.skip(f"no CPU kernels: {extension.CPU.reason}")
    return str(request.param)


# --- equal to what one writes without the package -------------------------------------------------------------------


@every_form
@given(data=st.data())
def test_equal_to_plain_pytorch(form: str, data: st.DataObject) -> None:
    case = drawn(data, form, dtypes=(torch.float64,))
    options = {"softcap": data.draw(st.sampled_from([None, 2.0]))}
    if form != "mse":
        options["temperature"] = data.draw(st.sampled_from([1.0, 2.5]))
    case = replace(case, options={**case.options, **options})
    upstream = case.upstream()
    check_close(run(case, upstream=upstream), written_out(case, upstream))


@every_divergence
@given(data=st.data())
def test_over_shared_keys_equal_to_plain_pytorch(form: str, data: st.DataObject) -> None:
    """The views have masks and biases of their own, so KL without this would be infinite."""
    case = drawn(data, form, same_keys=False, dtypes=(torch.float64,))
    case = replace(case, options={**case.options, "support": "shared"})
    check_close(run(case), written_out(case))


@every_form
@pytest.mark.parametrize("heads_aug", [2, 3])
def test_of_given_maps_as_of_queries_and_keys(form: str, heads_aug: int) -> None:
    """Also where the views have different keys, over those that they share."""
    lengths = ([9, 6], [7, 6]) if form != "mse" else ([9, 6], [9, 6])
    case = case_of(form, 9, lengths=lengths, heads_aug=heads_aug)
    options = {} if form == "mse" else {"support": "shared"}
    case = replace(case, options={**case.options, **options})
    maps = [
        AttentionInputs(*view, case.masks[name].bool(), None, None).probabilities()
        for view, name in ((case.x, "attention_mask"), (case.x_aug, "attention_mask_aug"))
    ]
    weights = torch.tensor([1.0, 3.0]) if heads_aug == 2 else None
    expected, _ = run(case, head_weights=weights)
    of_maps = LOSSES[case.op.removeprefix("qk_")]
    found = of_maps(*maps, **case.arguments(), head_weights=weights)
    torch.testing.assert_close(found, expected)
    each = of_maps(*maps, **{**case.arguments(), "reduction": "none"}, head_weights=weights)
    assert each.shape == (2,)
    if heads_aug == 2:
        both = {name: torch.cat([case.masks[name], case.masks[f"{name}_aug"]]) for name in ("attention_mask",)}
        arguments = {n: a for n, a in case.arguments().items() if not n.startswith("attention_mask")}
        assert torch.equal(of_maps(torch.cat(maps), **both, **arguments, head_weights=weights), found)


@every_form
def test_one_head_is_its_own_average(form: str) -> None:
    case = case_of(form, 9, heads=1, lengths=([9, 6], [9, 6]), heads_aug=None)
    alone = replace(case, options={**case.options, "heads": "each"})
    check_close(run(case), run(alone))


@every_form
def test_heads_twice_have_the_same_average(form: str) -> None:
    """Also with queries that share keys, and another scale, whose ratio the user's tensors take up."""
    case = case_of(form, 7, heads=4, key_heads=2, heads_aug=None)
    query, key = case.x_aug
    twice = replace(case, x_aug=tuple(torch.cat([view, torch.zeros_like(view)], 3) for view in (query, key)))
    twice = replace(twice, x_aug=(twice.x_aug[0] * 2**0.5, twice.x_aug[1]))
    twice = replace(twice, x_aug=(twice.x_aug[0].repeat_interleave(2, 1), twice.x_aug[1].repeat(1, 1, 1, 1)))
    torch.testing.assert_close(run(twice)[0], run(case)[0])


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
@every_form
def test_the_error_rule(form: str, feature: str, dtype: torch.dtype) -> None:
    check_case(case_of(form, 33, reduction="sum", **FEATURES[feature]), dtype, "reference")


@every_form
@pytest.mark.parametrize("closeness", [1e-4, 1e-2, 0.3], ids=str)
def test_nearly_equal_views_keep_their_digits(form: str, closeness: float) -> None:
    case = case_of(form, 65, reduction="none", closeness=closeness, heads_aug=None).to(torch.float32)
    value, gradients = run(case)
    exact_value, exact_gradients = run(case.to(torch.float64))
    rounding = 8e-7 / closeness  # an average has the rounding of several heads
    assert l2_error(value, exact_value) < rounding
    for gradient, exact in zip(gradients, exact_gradients, strict=True):
        assert l2_error(gradient, exact) < 10 * rounding


def test_where_the_average_underflows(backend: str) -> None:
    """P underflows in both heads, at a key that has half of the target: KL is finite and its gradient not clipped."""
    key = torch.tensor([[0.0, -500.0], [0.0, -490.0]]).reshape(1, 2, 2, 1).requires_grad_()
    query, query_aug = torch.ones(1, 2, 1, 1), torch.ones(1, 3, 1, 1)
    loss = ear_ops.qk_attention_kl(
        query, key, query_aug, torch.zeros(1, 3, 2, 1), scale=1.0, heads="mean", backend=backend
    )
    assert loss.item() == pytest.approx((490.0 + math.log(2.0)) / 2 - math.log(2.0), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, key)
    share = 1 / (1 + math.exp(-10.0))  # the second head has nearly all of the average at the second key
    expected = [0.5 * (1 - share), -0.5 * (1 - share), 0.5 * share, -0.5 * share]
    assert gradient.flatten().tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("form", ["forward", "reverse"])
def test_where_the_target_underflows(form: str, backend: str) -> None:
    """T is 0 at most keys, and each entry of the sum still has the P of its key."""
    case = case_of(form, 9, 70, gain=60.0)
    case = replace(case, x_aug=tuple(view / 5 for view in case.x_aug))
    check_case(case, torch.float32, backend)


@every_form
@given(data=st.data())
def test_exactly_zero_for_equal_views(form: str, data: st.DataObject) -> None:
    case = in_form(data.draw(cases("qk_attention_mse", dtypes=(torch.float32, torch.bfloat16))), form)
    masks = {name: case.masks[name.removesuffix("_aug")] for name in case.masks}
    biases = {name: case.biases["attn_bias"] for name in case.biases}
    value, gradients = run(replace(case, x_aug=case.x, masks=masks, biases=biases))
    assert torch.equal(value, torch.zeros_like(value))
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


@every_form
@given(data=st.data(), closeness=st.sampled_from([1e-6, 1e-4, 1e-2, 1.0, 30.0]))
def test_never_negative(form: str, data: st.DataObject, closeness: float) -> None:
    case = drawn(data, form, reductions=("none",), dtypes=(torch.float32, torch.float64, torch.bfloat16))
    if case.x[0].shape == case.x_aug[0].shape and case.x[1].shape == case.x_aug[1].shape:
        noise = [t - u for t, u in zip(case.x_aug, case.x, strict=True)]
        case = replace(case, x_aug=tuple(t + closeness * n for t, n in zip(case.x, noise, strict=True)))
    assert (run(case)[0] >= 0).all()


# --- masks ----------------------------------------------------------------------------------------------------------


@every_form
@given(data=st.data())
def test_padding_is_never_looked_at(form: str, data: st.DataObject) -> None:
    case = drawn(data, form, dtypes=(torch.float32, torch.bfloat16), mask_kinds=MASK_KINDS, layouts=("contiguous",))
    value = data.draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e4]))
    expected, found = run(fill_padding(case, 0.0)), run(fill_padding(case, value))
    assert torch.isfinite(found[0]).all() and all(torch.isfinite(g).all() for g in found[1])
    assert same_results(expected, found)


@every_form
@pytest.mark.parametrize("side", ["right", "left"])
@given(data=st.data(), extra=st.integers(1, 20))
def test_more_padding_changes_nothing(form: str, side: str, data: st.DataObject, extra: int) -> None:
    reductions = ("mean", "equations", "sum", "none")
    limits = {"reductions": reductions, "mask_kinds": MASK_KINDS, "same_length": True, "dtypes": (torch.float64,)}
    case = replace(drawn(data, form, biased=False, **limits), layout="contiguous")
    padding = (0, extra) if side == "right" else (extra, 0)
    masks = {name: F.pad(mask, padding) for name, mask in case.masks.items()}
    x, x_aug = (tuple(F.pad(t, (0, 0, *padding), value=math.nan) for t in view) for view in (case.x, case.x_aug))
    value, gradients = run(case)
    longer_value, longer_gradients = run(replace(case, x=x, x_aug=x_aug, masks=masks))
    padded = [F.pad(gradient, (0, 0, *padding)) for gradient in gradients]
    check_close((value, padded), (longer_value, longer_gradients), rtol=1e-11)


def masks_of(first: Tensor, second: Tensor) -> dict[str, Tensor]:
    every_query = torch.ones(2, 4, dtype=torch.bool)
    views = {"attention_mask": first, "attention_mask_aug": second}
    return {**views, "query_mask": every_query, "query_mask_aug": every_query}


SAME, FEWER, NOTHING = lengths_mask([3, 2], 4), lengths_mask([2, 2], 4), lengths_mask([0, 0], 4)


@pytest.mark.parametrize("form", ["forward", "reverse"])
def test_a_key_that_only_the_target_has_makes_kl_infinite(form: str, backend: str) -> None:
    case = replace(case_of(form, 4), reduction="none")
    views = (FEWER, SAME) if form == "forward" else (SAME, FEWER)
    infinite, finite = (replace(case, masks=masks_of(*masks)) for masks in (views, views[::-1]))
    with pytest.raises(ValueError, match=r"attention_mask: .*same keys.*KL is infinite.*_js.*support='shared'"):
        run(infinite, backend)
    check_close(run(finite, backend), written_out(finite))
    compiled = torch.compile(LOSSES[case.op], fullgraph=True, backend="eager")
    value = compiled(*case.inputs(), **infinite.arguments())
    assert value[0] == math.inf and torch.isfinite(value[1])
    shared = replace(infinite, options={**case.options, "support": "shared"})
    assert same_results(run(shared, backend), run(replace(case, masks=masks_of(FEWER, FEWER)), backend))


def test_a_key_that_one_head_has_is_in_the_average() -> None:
    """A bias leaves it to the second head alone: KL is finite, and the first head has no gradient there."""
    bias = torch.zeros(2, 1, 5, dtype=torch.float64)
    bias[0, :, 3] = -math.inf
    biases = {"attn_bias": bias, "attn_bias_aug": torch.zeros(1, 1, 5, dtype=torch.float64)}
    case = replace(case_of("forward", 5), biases=biases)
    found = run(case)
    check_close(found, written_out(case))
    assert not found[1][1][:, 0, 3].any() and found[1][1][:, 1, 3].all()
    without = {"head_weights": torch.tensor([1.0, 0.0]), "support": "shared"}
    case = replace(case_of("forward", 5, heads_aug=None), biases=biases)
    assert not run(case, **without)[1][3][:, :, 3].any()  # no head that counts has the key


@every_form
def test_rows_without_keys(form: str, backend: str) -> None:
    case = replace(case_of(form, 4), reduction="none")
    masks = (NOTHING, SAME) if form == "reverse" else (SAME, NOTHING)
    value, gradients = run(replace(case, masks=masks_of(*masks)), backend)
    if form == "js":
        torch.testing.assert_close(value, torch.full_like(value, 4 * math.log(2) / 2))
    elif form != "mse":
        assert not value.any()
    assert form == "mse" or all(not gradient.abs().gt(1e-15).any() for gradient in gradients)
    value, gradients = run(replace(case, masks=masks_of(NOTHING, NOTHING)), backend)
    assert not value.any() and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@every_form
def test_bad_numbers_show(form: str, bad: float, backend: str) -> None:
    case = case_of(form, 9, pairs=2, lengths=([9, 6], [9, 6]), reduction="none")
    query = case.x[0].clone()
    query[0, 1, 3, 5] = bad
    expected, _ = run(case, backend)
    value, gradients = run(replace(case, x=(query, case.x[1])), backend)
    assert value[0].isnan() and torch.equal(value[1], expected[1])
    assert gradients[0][0, 1].isnan().any() and not gradients[0][1].isnan().any()


# --- reductions and weights -----------------------------------------------------------------------------------------


@every_form
def test_the_average_counts_as_one_head(form: str) -> None:
    case = case_of(form, 9, lengths=([9, 6], [9, 6]))
    values = {r: run(replace(case, reduction=r))[0] for r in ("none", "sum", "mean", "equations")}
    counted = 9 + 6 if form != "mse" else 9 * 9 + 6 * 6
    assert values["none"].shape == (2,)
    torch.testing.assert_close(values["none"].sum(), values["sum"])
    torch.testing.assert_close(values["mean"], values["sum"] / counted)
    torch.testing.assert_close(values["equations"], values["sum"] / 2)
    whole = {**case.masks, **{f"query_mask{s}": torch.ones(2, 9, dtype=torch.bool) for s in ("", "_aug")}}
    everything, _ = run(replace(case, masks=whole, reduction="sum"))
    padded, _ = run(replace(case, reduction="padded_mean"))
    torch.testing.assert_close(padded, everything / (2 * 9 * (9 if form == "mse" else 1)))


@every_form
def test_head_weights_weight_the_average(form: str) -> None:
    case = case_of(form, 9, lengths=([9, 6], [9, 6]), heads=3, heads_aug=None)
    for weights in ([1.0, 3.0, 0.5], [0.0, 2.0, 1.0]):
        of_heads = torch.tensor(weights)
        check_close(run(case, head_weights=of_heads), written_out(case, weights=of_heads))
    check_close(run(case, head_weights=torch.full((3,), 7)), run(case))
    first = [tuple(tensor[:, 1:2] for tensor in view) for view in (case.x, case.x_aug)]
    value, gradients = run(case, head_weights=torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(value, run(replace(case, x=first[0], x_aug=first[1]))[0])
    assert all(gradient[:, 1].any() and not gradient[:, [0, 2]].any() for gradient in gradients)


# --- gradients and graphs -------------------------------------------------------------------------------------------


def small(form: str) -> Case:
    mask = torch.tensor([[1, 1, 0, 1, 1]])
    return case_of(form, 4, 5, 3, pairs=1, masks={"attention_mask": mask, "attention_mask_aug": mask})


@every_form
def test_gradcheck(form: str) -> None:
    case = replace(small(form), reduction="none")
    inputs = [t.requires_grad_() for t in case.inputs()]
    assert torch.autograd.gradcheck(lambda *tensors: case.call(tensors, None), inputs)


@every_form
def test_second_derivatives(form: str) -> None:
    case = small(form)
    inputs = [t.requires_grad_() for t in case.inputs()]
    call = {"backend": "reference"}
    assert torch.autograd.gradgradcheck(
        lambda *t: LOSSES[case.op](*t, **case.arguments(), **call), inputs, fast_mode=True
    )


@every_form
@settings(max_examples=5)
@given(data=st.data())
def test_blocks_change_nothing(form: str, data: st.DataObject) -> None:
    case = drawn(data, form, dtypes=(torch.float64,))
    expected = run(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_ENTRIES", 500)
        check_close(run(case), expected)


@every_form
def test_memory_grows_with_the_length_alone(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors that autograd keeps between forward and backward."""
    monkeypatch.setattr(blocks, "BLOCK_ENTRIES", 4000)
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
            case.call(inputs, "reference")
        kept.append(sum(sizes.values()))
    assert kept[1] < 2.5 * kept[0]


@pytest.mark.parametrize(("form", "stacked"), [("mse", False), ("reverse", False), ("js", True)])
def test_full_graph(form: str, stacked: bool) -> None:
    torch.compiler.reset()
    case = case_of(form, 7, lengths=([7, 3], [7, 3]), heads_aug=None if stacked else 3)
    case = replace(case, stacked=stacked, options={**case.options, "is_causal": True, "window": 4}).to(torch.float32)
    arguments = {**case.arguments(), "head_weights": torch.tensor([1.0, 2.0]) if stacked else None}
    compiled = torch.compile(LOSSES[case.op], fullgraph=True, backend="aot_eager_decomp_partition")
    inputs = [t.requires_grad_() for t in case.inputs()]
    value = compiled(*inputs, **arguments)
    expected, gradients = run(case, head_weights=arguments["head_weights"])
    torch.testing.assert_close(value.detach(), expected)
    for found, gradient in zip(torch.autograd.grad(value, inputs), gradients, strict=True):
        torch.testing.assert_close(found, gradient)


@every_form
def test_transforms_of_torch_func(form: str) -> None:
    case = case_of(form, 5, pairs=3)
    inputs, loss, options = case.inputs(), LOSSES[case.op], case.options
    batched = torch.func.vmap(lambda *views: loss(*(v[None] for v in views), **options))(*inputs)
    torch.testing.assert_close(batched.mean(), run(case)[0])
    gradient = torch.func.grad(lambda first: loss(first, *inputs[1:], **options))(inputs[0])
    torch.testing.assert_close(gradient, run(case)[1][0])


@every_form
def test_the_target_needs_no_gradient(form: str) -> None:
    case = case_of(form, 9)
    query, key, *target = case.inputs()
    value = case.call([query.requires_grad_(), key.requires_grad_(), *target], None)
    for found, expected in zip(torch.autograd.grad(value, [query, key]), run(case, None)[1][:2], strict=True):
        assert torch.equal(found, expected)


# --- arguments ------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"heads": "both"}, "heads: expected 'each' or 'mean', got 'both'"),
    ({"heads": "each"}, r"query_aug: expected the shape of query, \[2, 2, 4, 16\], got \[2, 3, 4, 32\]"),
    ({"head_weights": torch.ones(2)}, r"head_weights: expected None, because the views have 2 and 3 heads"),
    ({"attn_bias": torch.zeros(2, 4, 4)}, r"attn_bias: expected a shape broadcastable to \[2, 3, 4, 4\]"),
    (
        {"attn_bias": torch.zeros(4, 4), "attn_bias_aug": torch.zeros(2, 4, 4)},
        r"attn_bias_aug: expected a shape broadcastable to \[2, 3, 4, 4\], got \[2, 4, 4\]",
    ),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
@every_form
def test_wrong_arguments(form: str, options: dict[str, Any], message: str) -> None:
    case = case_of(form, 4)
    with pytest.raises(ValueError, match=message):
        LOSSES[case.op](*case.inputs(), **{**case.options, **options})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(3), r"expected one number for each of the 2 heads, got shape \[3\]"),
        (torch.tensor([1.0, -1.0]), r"expected finite numbers of at least 0, not all of them 0.*got \[1.0, -1.0\]"),
        (torch.zeros(2), "expected.*not all of them 0"),
        (torch.tensor([1.0, math.inf]), "expected finite numbers"),
        (torch.ones(2, requires_grad=True), "expected a constant.*head_weights.detach"),
    ],
)
@pytest.mark.parametrize("op", ["qk_attention_mse", "qk_attention_js", "attention_mse", "attention_kl"])
def test_wrong_weights(op: str, weights: Tensor, message: str) -> None:
    views = qk_case(4).inputs() if op.startswith("qk") else torch.full((2, 2, 2, 4, 4), 0.25)
    with pytest.raises(ValueError, match=f"head_weights: {message}"):
        LOSSES[op](*views, heads="mean", head_weights=weights)


def test_shapes_that_do_not_go_together() -> None:
    query, key, query_aug, key_aug = case_of("mse", 4).inputs()
    for views, message in (
        ((query, key, query_aug[:, :, :3], key_aug), "query_aug: expected the shape of query, .* but for dimensions 1"),
        ((query, key, query_aug, key_aug[..., :5]), r"key_aug: expected \[2, H_kv, S, 32\] to go with query_aug"),
        ((query, key, query_aug[:, :0], key_aug), "query_aug: expected at least one head to average"),
        ((query, key, query_aug, key_aug.repeat(1, 2, 1, 1)), "key_aug: expected a number of heads that divides the 3"),
    ):
        with pytest.raises(ValueError, match=message):
            ear_ops.qk_attention_mse(*views, heads="mean")
    maps = torch.full((2, 2, 4, 4), 0.25)
    for second, message in (
        (maps[:, :0], "attn_aug: expected at least one head"),
        (maps[:1], "attn_aug: expected the"),
    ):
        with pytest.raises(ValueError, match=message):
            ear_ops.attention_js(maps, second, heads="mean")


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (ear_ops.QKAttentionMSELoss, ear_ops.qk_attention_mse),
        (ear_ops.QKAttentionKLLoss, ear_ops.qk_attention_kl),
        (ear_ops.QKAttentionJSLoss, ear_ops.qk_attention_js),
        (ear_ops.AttentionMSELoss, ear_ops.attention_mse),
        (ear_ops.AttentionKLLoss, ear_ops.attention_kl),
        (ear_ops.AttentionJSLoss, ear_ops.attention_js),
    ],
)
def test_modules_are_the_functions(module: Any, function: Any) -> None:
    views = case_of("mse", 5).inputs()
    if "QK" not in module.__name__:
        views = [torch.softmax(q @ k.mT, -1) for q, k in (views[:2], views[2:])]
    loss = module(heads="mean")
    assert torch.equal(loss(*views), function(*views, heads="mean")) and "heads='mean'" in repr(loss)
    with pytest.raises(ValueError, match="heads: expected 'each' or 'mean', got 'all'"):
        module(heads="all")
