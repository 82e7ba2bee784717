"""The definitions themselves: worked by hand, in loops over Python floats, and against plain PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support import plain
from support.cases import Case, attention_case, pooled_case, qk_case
from support.changes import check_blocks_change_nothing
from support.memory import peak_memory
from support.strategies import OPS, cases

import ear_ops
from ear_ops.ops import blocks, probabilities

LOG3 = math.log(3.0)


def worked_example() -> Case:
    """One head, two queries, two keys, D = 1, scale 1. P = [[1/2, 1/2], [1/4, 3/4]], T = [[1/4, 3/4], [1/2, 1/2]]."""

    def column(*values: float) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64).reshape(1, 1, 2, 1)

    x = (column(0.0, LOG3), column(0.0, 1.0))
    x_aug = (column(LOG3, 0.0), column(0.0, 1.0))
    return Case("qk_attention_mse", x, x_aug, options={"scale": 1.0})


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [("mean", 1 / 16), ("padded_mean", 1 / 16), ("equations", 1 / 4), ("sum", 1 / 4), ("none", 1 / 4)],
)
def test_worked_example_values(reduction: str, expected: float) -> None:
    # every P - T is +-1/4, so the four squares sum up to 1/4
    case = worked_example()
    value = ear_ops.qk_attention_mse(*case.inputs(), scale=1.0, reduction=reduction, backend="reference")
    assert value.flatten().tolist() == pytest.approx([expected], abs=1e-15)


def test_worked_example_gradients() -> None:
    # row 0: d = 0, dS = 2 P (P - T) = (1/4, -1/4); row 1: d = 1/8, dS = (-3/16, 3/16); dQ = dS K, dK = dS^T Q
    _, (grad_query, grad_key, _, _) = _as_sum(worked_example()).run("reference")
    assert grad_query.flatten().tolist() == pytest.approx([-1 / 4, 3 / 16], abs=1e-15)
    assert grad_key.flatten().tolist() == pytest.approx([-3 / 16 * LOG3, 3 / 16 * LOG3], abs=1e-15)


def _as_sum(case: Case) -> Case:
    return Case(case.op, case.x, case.x_aug, case.masks, case.biases, case.options, reduction="sum")


def test_worked_example_with_masks() -> None:
    # x^a lacks key 1: T = [[1, 0], ...]; query 1 is then real in x alone and does not count; both keys still count
    masks = {"attention_mask": torch.tensor([[1, 1]]), "attention_mask_aug": torch.tensor([[1, 0]])}
    inputs = worked_example().inputs()
    values = {
        name: ear_ops.qk_attention_mse(*inputs, **masks, scale=1.0, reduction=name, backend="reference").item()
        for name in ("mean", "padded_mean", "equations", "sum")
    }
    # row 0: (1/2 - 1)^2 + (1/2)^2 = 1/2; row 1 (padded_mean only): (1/4 - 1)^2 + (3/4)^2 = 9/8
    assert values == pytest.approx({"mean": 1 / 4, "padded_mean": 13 / 32, "equations": 1 / 2, "sum": 1 / 2})


def test_what_counts() -> None:
    # queries real in both views: {0, 3}; keys real in at least one: {0, 1, 2, 3}; two heads
    masks = {
        "attention_mask": torch.tensor([[1, 1, 0, 1, 0]]),
        "attention_mask_aug": torch.tensor([[1, 0, 1, 1, 0]]),
    }
    attn, attn_aug = torch.rand(1, 2, 5, 5), torch.rand(1, 2, 5, 5)
    a, b = attn * masks["attention_mask"][:, None, None], attn_aug * masks["attention_mask_aug"][:, None, None]
    counted = ((a - b) ** 2)[:, :, [0, 3], :4].sum()
    found = ear_ops.attention_mse(attn, attn_aug, **masks, backend="reference")
    assert found.item() == pytest.approx(counted.item() / (2 * 2 * 4))
    every_row = ((a - b) ** 2).sum().item() / (1 * 2 * 5 * 5)
    assert ear_ops.attention_mse(attn, attn_aug, **masks, reduction="padded_mean", backend="reference").item() == (
        pytest.approx(every_row)
    )


def test_queries_have_no_mask_of_their_own_where_lengths_differ() -> None:
    masks = {"attention_mask": torch.tensor([[1, 1, 0]]), "attention_mask_aug": torch.tensor([[1, 0, 0]])}
    attn, attn_aug = torch.rand(1, 1, 4, 3), torch.rand(1, 1, 4, 3)
    a, b = attn * masks["attention_mask"][:, None, None], attn_aug * masks["attention_mask_aug"][:, None, None]
    found = ear_ops.attention_mse(attn, attn_aug, **masks, backend="reference")
    assert found.item() == pytest.approx(((a - b) ** 2).sum().item() / (4 * 2))


@pytest.mark.parametrize("reduction", ["mean", "padded_mean", "equations", "sum", "none"])
def test_pooled_by_hand(reduction: str) -> None:
    # pair 0: means (2, 3) and (0, 1); pair 1: nothing real, a zero vector, and (3, 4)
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]], [[5.0, 5.0], [5.0, 5.0], [5.0, 5.0]]])
    hidden_aug = torch.tensor([[[0.0, 1.0], [7.0, 7.0], [7.0, 7.0]], [[3.0, 4.0], [3.0, 4.0], [3.0, 4.0]]])
    value = ear_ops.pooled_distance(
        hidden,
        hidden_aug,
        attention_mask=torch.tensor([[1, 1, 0], [0, 0, 0]]),
        attention_mask_aug=torch.tensor([[1, 0, 0], [1, 1, 1]]),
        reduction=reduction,
        backend="reference",
    )
    expected = {"mean": 33 / 4, "padded_mean": 33 / 4, "equations": 33 / 2, "sum": 33.0, "none": [8.0, 25.0]}
    assert value.tolist() == pytest.approx(expected[reduction])


def test_without_masks_the_mean_is_mse_loss_of_two_softmaxes() -> None:
    query, key, query_aug, key_aug = qk_case(7, 5, 6).inputs()
    attn = torch.softmax(query @ key.mT / math.sqrt(6), dim=-1)
    attn_aug = torch.softmax(query_aug @ key_aug.mT / math.sqrt(6), dim=-1)
    expected = F.mse_loss(attn, attn_aug).item()
    assert ear_ops.qk_attention_mse(query, key, query_aug, key_aug, backend="reference").item() == pytest.approx(
        expected, rel=1e-14
    )
    assert ear_ops.attention_mse(attn, attn_aug, backend="reference").item() == pytest.approx(expected, rel=1e-14)


def loop_probabilities(case: Case, view: int, b: int, h: int, i: int) -> list[float]:
    """One row of attention probabilities, key by key."""
    query, key = (case.x, case.x_aug)[view]
    heads, length, dim = query.shape[1:]
    key_heads, width = key.shape[1:3]
    suffix = "_aug" if view else ""
    bias = case.biases.get(f"attn_bias{suffix}", case.biases.get("attn_bias"))
    bias = None if bias is None else bias.expand(case.pairs, heads, length, width)
    mask = case.masks.get(f"attention_mask{suffix}")
    scale = case.options.get("scale") or 1 / math.sqrt(dim)
    window, softcap = case.options.get("window"), case.options.get("softcap")
    place = i + width - length
    scores = {}
    for j in range(width):
        if mask is not None and not mask[b, j]:
            continue
        if case.options.get("is_causal") and j > place:
            continue
        if window is not None and abs(j - place) >= window:
            continue
        score = scale * sum(float(x) * float(y) for x, y in zip(query[b, h, i], key[b, h // (heads // key_heads), j]))  # noqa: B905
        if softcap is not None:
            score = softcap * math.tanh(score / softcap)
        if bias is not None:
            added = bias[b, h, i, j].item()
            if added is False or added == -math.inf:
                continue
            score += 0.0 if added is True else added
        scores[j] = score
    total = sum(math.exp(score) for score in scores.values())
    return [math.exp(scores[j]) / total if j in scores else 0.0 for j in range(width)]


def loop_sums(case: Case) -> list[list[float]]:
    """``none`` of a case: for each pair and head the squares over counted queries and all keys."""
    _, heads, length, _ = case.x[0].shape
    own_keys = length == case.x[1].shape[2]
    name = "query_mask" if "query_mask" in case.masks else "attention_mask" if own_keys else None
    sums = [[0.0] * heads for _ in range(case.pairs)]
    for b in range(case.pairs):
        for h in range(heads):
            for i in range(length):
                masks = (case.masks.get(name), case.masks.get(f"{name}_aug"))
                if any(mask is not None and not mask[b, i] for mask in masks):
                    continue
                rows = [loop_probabilities(case, view, b, h, i) for view in (0, 1)]
                sums[b][h] += sum((p - t) ** 2 for p, t in zip(*rows, strict=True))
    return sums


_BIAS = torch.randn(1, 1, 4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
_MASKS = {"attention_mask": torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]])}
_MASKS["attention_mask_aug"] = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0]])
LOOPED = {
    "plain": qk_case(3, 4, 2),
    "one": qk_case(1, 1, 1),
    "grouped": qk_case(3, 4, 2, heads=6, key_heads=2),
    "masks": qk_case(4, 4, 3, masks=_MASKS),
    "causal": qk_case(4, 6, 3, options={"is_causal": True}),
    "causal without keys": qk_case(6, 4, 3, options={"is_causal": True}),
    "window": qk_case(6, 6, 3, options={"window": 2}),
    "causal window": qk_case(4, 6, 3, options={"window": 2, "is_causal": True}),
    "bias": qk_case(4, 6, 3, biases={"attn_bias": _BIAS}),
    "two biases": qk_case(4, 6, 3, biases={"attn_bias": _BIAS, "attn_bias_aug": -_BIAS}),
    "bias of -inf": qk_case(4, 6, 3, biases={"attn_bias": _BIAS.masked_fill(_BIAS < 0.3, -math.inf)}),
    "bool bias": qk_case(4, 6, 3, biases={"attn_bias": _BIAS > 0, "attn_bias_aug": _BIAS[:, :, 0] < 0}),
    "scale": qk_case(4, 6, 3, options={"scale": -0.7}),
    "softcap": qk_case(4, 6, 3, options={"softcap": 0.5, "scale": 2.0}),
    "query mask": qk_case(
        4,
        6,
        3,
        masks={
            "query_mask": torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]]),
            "query_mask_aug": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]),
        },
    ),
}


@pytest.mark.parametrize("name", LOOPED)
def test_reference_is_the_loop_over_pairs_heads_queries_and_keys(name: str) -> None:
    case = Case(**{**vars(LOOPED[name]), "reduction": "none"})
    value, _ = case.run("reference")
    torch.testing.assert_close(value, torch.tensor(loop_sums(case), dtype=torch.float64), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
def test_reference_is_plain_pytorch(op: str, data: st.DataObject) -> None:
    case = data.draw(cases(op, dtypes=(torch.float64,)))
    upstream = case.upstream()
    value, gradients = case.run("reference", upstream=upstream)
    expected, plain_gradients = case.run_plain(upstream)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    for gradient, plain_gradient in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(gradient, plain_gradient, rtol=1e-11, atol=1e-13)


@given(data=st.data())
def test_blocks_of_queries_change_nothing(data: st.DataObject) -> None:
    check_blocks_change_nothing(data.draw(cases("qk_attention_mse", dtypes=(torch.float64,))))


def test_memory_of_the_reference_grows_with_the_length_beyond_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ENTRIES", 8192)
    peaks = []
    for length in (512, 1024):
        case = qk_case(length, None, 8, pairs=1, heads=2).to(torch.float32)
        peaks.append(peak_memory(lambda case=case: case.run("reference")))
    assert peaks[1] < 2.5 * peaks[0]


def test_probabilities_of_a_row_without_keys_are_zero_and_have_no_gradient() -> None:
    query, key, _, _ = qk_case(3, 4, 2).inputs()
    key_mask = torch.zeros(2, 4, dtype=torch.bool)
    key_mask[1, 0] = True
    attn = probabilities.attention_probabilities(query.requires_grad_(), key.requires_grad_(), key_mask)
    assert not attn[0].any()
    assert attn[1, :, :, 0].tolist() == [[1.0] * 3] * 2
    grad_query, grad_key = torch.autograd.grad(attn.square().sum(), (query, key))
    assert torch.isfinite(grad_query).all() and not grad_query[0].any()
    assert torch.isfinite(grad_key).all() and not grad_key[0].any()


def test_structure_is_aligned_to_the_bottom_right() -> None:
    causal = probabilities.structure_mask(2, 4, True, None)
    assert causal is not None and causal.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    windowed = probabilities.structure_mask(2, 4, False, 2)
    assert windowed is not None and windowed.int().tolist() == [[0, 1, 1, 1], [0, 0, 1, 1]]
    tall = probabilities.structure_mask(3, 1, True, None)
    assert tall is not None and tall.int().tolist() == [[0], [0], [1]]
    assert probabilities.structure_mask(2, 4, False, None) is None


@pytest.mark.parametrize(("dtype", "accumulator"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_reference_computes_half_in_float32(dtype: torch.dtype, accumulator: torch.dtype) -> None:
    for case in (qk_case(5), attention_case(5), pooled_case(5)):
        case = case.to(dtype)
        value, gradients = case.run("reference")
        wide, _ = case.to(accumulator).run("reference")
        assert value.dtype == accumulator and torch.equal(value, wide)
        assert all(gradient.dtype == dtype for gradient in gradients)


def test_reference_can_be_differentiated_twice() -> None:
    query, key, query_aug, key_aug = (t.requires_grad_() for t in qk_case(3, 4, 2, pairs=1, heads=1).inputs())
    mask = torch.tensor([[1, 1, 0, 1]]), torch.tensor([[1, 1, 1, 0]])

    def loss(*inputs: torch.Tensor) -> torch.Tensor:
        return ear_ops.qk_attention_mse(
            *inputs, attention_mask=mask[0], attention_mask_aug=mask[1], backend="reference", softcap=2.0
        )

    assert torch.autograd.gradgradcheck(loss, (query, key, query_aug, key_aug))


# --- robust_cross_entropy -----------------------------------------------------------------------------------------


def test_robust_cross_entropy_is_the_sum_of_both_views() -> None:
    logits = torch.tensor([[0.0, LOG3], [0.0, 0.0], [LOG3, 0.0], [0.0, 0.0]])
    labels = torch.tensor([1, 0])
    # probabilities of the labels: 3/4 and 1/2 for x, 1/4 and 1/2 for x^a
    expected = -(math.log(3 / 4) + math.log(1 / 2)) / 2 - (math.log(1 / 4) + math.log(1 / 2)) / 2
    assert ear_ops.robust_cross_entropy(logits, labels).item() == pytest.approx(expected)


def test_robust_cross_entropy_takes_class_probabilities() -> None:
    logits, labels = torch.randn(6, 4), torch.tensor([2, 0, 3])
    by_index = ear_ops.robust_cross_entropy(logits, labels)
    by_probability = ear_ops.robust_cross_entropy(logits, F.one_hot(labels, 4).float())
    torch.testing.assert_close(by_index, by_probability)


def test_robust_cross_entropy_gradient() -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ear_ops.robust_cross_entropy, (logits, torch.tensor([2, 0])))
    torch.testing.assert_close(
        ear_ops.robust_cross_entropy(logits, torch.tensor([2, 0])),
        F.cross_entropy(logits[:2], torch.tensor([2, 0])) + F.cross_entropy(logits[2:], torch.tensor([2, 0])),
    )


def test_the_yardstick_of_the_kernels_is_right_too() -> None:
    case = LOOPED["masks"]
    sums = plain.qk_attention_mse(*case.inputs(), **case.masks, reduction="none")
    torch.testing.assert_close(sums, torch.tensor(loop_sums(case), dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_reach_the_reference(dtype: torch.dtype) -> None:
    """Nearly equal views lose their difference in half precision."""
    query = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    near = (query + 0.01).detach()
    calls = (
        lambda: ear_ops.qk_attention_mse(query, query, near, query.detach(), backend="reference"),
        lambda: ear_ops.attention_mse(query, near, backend="reference"),
        lambda: ear_ops.pooled_distance(query[:, 0], near[:, 0], backend="reference"),
    )
    for call in calls:
        expected = call()
        with torch.autocast("cpu", torch.bfloat16):
            loss = call()
        assert loss.dtype == torch.float32 and torch.equal(loss, expected)
        for got, wanted in zip(*(torch.autograd.grad(each, query) for each in (loss, expected)), strict=True):
            assert torch.equal(got, wanted)
