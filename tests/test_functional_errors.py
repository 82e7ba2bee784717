"""Bad input raises, and the message names the argument, what was expected and what came."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ear_ops
from ear_ops.ops import pooled_distance

QUERY, KEY, MASK = torch.zeros(2, 4, 5, 3), torch.zeros(2, 2, 6, 3), torch.ones(2, 6, dtype=torch.int64)
ATTN, HIDDEN, TOKENS = torch.zeros(2, 4, 5, 6), torch.zeros(2, 5, 3), torch.ones(2, 5, dtype=torch.int64)
MASKS = {"attention_mask": MASK, "attention_mask_aug": MASK}


def qk(query: Any = QUERY, key: Any = KEY, query_aug: Any = QUERY, key_aug: Any = KEY, **rest: Any) -> Tensor:
    return ear_ops.qk_attention_mse(query, key, query_aug, key_aug, **rest)


def attention(attn: Any = ATTN, attn_aug: Any = ATTN, **rest: Any) -> Tensor:
    return ear_ops.attention_mse(attn, attn_aug, **rest)


def pooled(hidden: Any = HIDDEN, hidden_aug: Any = HIDDEN, **rest: Any) -> Tensor:
    return ear_ops.pooled_distance(hidden, hidden_aug, **rest)


# (call, error, what the message must hold in this order: the argument first, then expected, then got)
BAD: dict[str, tuple[Callable[[], object], type[Exception], list[str]]] = {
    # shapes of one tensor
    "query of 3 dimensions": (
        lambda: qk(query=QUERY[0], query_aug=None, key_aug=None),
        ValueError,
        ["query:", "4 dimensions [B, H, L, D]", "got", "[4, 5, 3]"],
    ),
    "key of 5 dimensions": (
        lambda: qk(key=KEY[None], key_aug=KEY[None]),
        ValueError,
        ["key:", "4 dimensions [B, H_kv, S, D]", "got", "[1, 2, 2, 6, 3]"],
    ),
    "attn of 2 dimensions": (lambda: attention(ATTN[0, 0]), ValueError, ["attn:", "[B, H, L, S]", "got", "[5, 6]"]),
    "hidden of 2 dimensions": (lambda: pooled(HIDDEN[0]), ValueError, ["hidden:", "[B, L, C]", "got", "[5, 3]"]),
    "no head dimension": (
        lambda: qk(*[t[..., :0] for t in (QUERY, KEY, QUERY, KEY)]),
        ValueError,
        ["query:", "at least 1", "got", "[2, 4, 5, 0]"],
    ),
    # what is no tensor
    "a list of queries": (
        lambda: qk(query=[[0.0]]),
        TypeError,
        ["query:", "a tensor [B, H, L, D]", "got list"],
    ),
    "a list of maps of the second view": (
        lambda: attention(attn_aug=[[0.0]]),
        TypeError,
        ["attn_aug:", "a tensor [B, H, L, S]", "got list"],
    ),
    "a list of head weights": (
        lambda: qk(head_weights=[1.0] * 4),
        TypeError,
        ["head_weights:", "a tensor", "got list", "torch.tensor(head_weights)"],
    ),
    "a list of weights of averages": (
        lambda: qk(head_weights=[1.0] * 4, heads="mean"),
        TypeError,
        ["head_weights:", "a tensor", "got list", "torch.tensor(head_weights)"],
    ),
    "the output of a model": (
        lambda: ear_ops.robust_cross_entropy({"logits": torch.zeros(4, 3)}, torch.zeros(2, dtype=torch.int64)),
        TypeError,
        ["logits:", "a tensor", "got dict", "output.logits"],
    ),
    "a list of labels": (
        lambda: ear_ops.robust_cross_entropy(torch.zeros(4, 3), [0, 1]),
        TypeError,
        ["labels:", "a tensor", "got list", "torch.tensor(labels)"],
    ),
    # the two views differ
    "more heads in the second view": (
        lambda: qk(query_aug=QUERY[:, :2]),
        ValueError,
        ["query_aug:", "[2, 4, 5, 3]", "got [2, 2, 5, 3]", "heads='mean'"],
    ),
    "larger heads in the second view": (
        lambda: qk(key_aug=torch.zeros(2, 2, 6, 4)),
        ValueError,
        ["key_aug:", "[2, 2, 6, 3]", "got [2, 2, 6, 4]", "heads='mean'"],
    ),
    "larger hidden states in the second view": (
        lambda: pooled(hidden_aug=torch.zeros(2, 5, 4)),
        ValueError,
        ["hidden_aug:", "[2, 5, 3]", "got [2, 5, 4]", "project"],
    ),
    "scores in place of probabilities": (
        lambda: ear_ops.attention_kl(ATTN - 1, ATTN + 1),
        ValueError,
        ["attn:", "probabilities", "got -1", "softmax"],
    ),
    "scores of the second view": (
        lambda: ear_ops.attention_js(ATTN + 0.1, ATTN - 1),
        ValueError,
        ["attn_aug:", "probabilities", "got -1", "softmax"],
    ),
    # dtypes and devices
    "integer query": (lambda: qk(query=QUERY.int()), TypeError, ["query:", "floating-point", "got", "torch.int32"]),
    "integer attn": (lambda: attention(ATTN.long()), TypeError, ["attn:", "floating-point", "got", "torch.int64"]),
    "complex hidden": (
        lambda: pooled(HIDDEN.to(torch.complex64)),
        TypeError,
        ["hidden:", "floating-point", "got", "torch.complex64"],
    ),
    "key of another dtype": (
        lambda: qk(key=KEY.double(), key_aug=KEY.double()),
        TypeError,
        ["key:", "torch.float32", "like query", "got", "torch.float64"],
    ),
    "query_aug of another dtype": (
        lambda: qk(query_aug=QUERY.half()),
        TypeError,
        ["query_aug:", "torch.float32", "got", "torch.float16"],
    ),
    "hidden_aug on another device": (
        lambda: pooled(hidden_aug=HIDDEN.to("meta")),
        TypeError,
        ["hidden_aug:", "device cpu", "got", "meta"],
    ),
    # the two views
    "lengths differ": (
        lambda: qk(query_aug=QUERY[:, :, :4]),
        ValueError,
        ["query_aug:", "[2, 4, 5, 3]", "got", "[2, 4, 4, 3]", "pad both views"],
    ),
    "key_aug shorter": (
        lambda: qk(key_aug=KEY[:, :, :4]),
        ValueError,
        ["key_aug:", "[2, 2, 6, 3]", "got", "[2, 2, 4, 3]"],
    ),
    "attn_aug of fewer heads": (
        lambda: attention(attn_aug=ATTN[:, :2]),
        ValueError,
        ["attn_aug:", "[2, 4, 5, 6]", "got", "[2, 2, 5, 6]"],
    ),
    "query_aug without key_aug": (
        lambda: qk(key_aug=None),
        ValueError,
        ["key_aug:", "expected a tensor because query_aug was given", "got None"],
    ),
    "key_aug without query_aug": (
        lambda: qk(query_aug=None),
        ValueError,
        ["query_aug:", "expected a tensor because key_aug was given", "got None"],
    ),
    "odd batch of both views": (
        lambda: pooled(HIDDEN[:1], None),
        ValueError,
        ["hidden:", "even batch", "got", "[1, 5, 3]"],
    ),
    "odd batch of queries": (
        lambda: qk(QUERY[:1], KEY[:1], None, None),
        ValueError,
        ["query:", "even batch", "got", "[1, 4, 5, 3]"],
    ),
    # query and key
    "key batch": (lambda: qk(key=KEY[:1], key_aug=KEY[:1]), ValueError, ["key:", "[2, H_kv, S, 3]", "[1, 2, 6, 3]"]),
    "key head dimension": (
        lambda: qk(key=KEY[..., :2], key_aug=KEY[..., :2]),
        ValueError,
        ["key:", "[2, H_kv, S, 3]", "got", "[2, 2, 6, 2]"],
    ),
    "heads do not divide": (
        lambda: qk(query=QUERY[:, :3], query_aug=QUERY[:, :3]),
        ValueError,
        ["key:", "divides the 3 heads", "got", "[2, 2, 6, 3]"],
    ),
    "no key heads": (
        lambda: qk(key=KEY[:, :0], key_aug=KEY[:, :0]),
        ValueError,
        ["key:", "divides the 4 heads", "got", "[2, 0, 6, 3]"],
    ),
    # masks
    "mask for one view only": (
        lambda: qk(attention_mask=MASK),
        ValueError,
        ["attention_mask_aug:", "because attention_mask was given", "got None", "pass both"],
    ),
    "mask for the other view only": (
        lambda: pooled(attention_mask_aug=TOKENS),
        ValueError,
        ["attention_mask:", "because attention_mask_aug was given", "got None"],
    ),
    "query mask for one view only": (
        lambda: attention(**MASKS, query_mask_aug=TOKENS),
        ValueError,
        ["query_mask:", "because query_mask_aug was given", "got None"],
    ),
    "mask of queries' length": (
        lambda: qk(attention_mask=TOKENS, attention_mask_aug=MASK),
        ValueError,
        ["attention_mask:", "[2, 6]", "got", "[2, 5]"],
    ),
    "augmented mask of another length": (
        lambda: qk(attention_mask=MASK, attention_mask_aug=TOKENS),
        ValueError,
        ["attention_mask_aug:", "[2, 6]", "got", "[2, 5]"],
    ),
    "query mask of keys' length": (
        lambda: qk(query_mask=MASK, query_mask_aug=MASK),
        ValueError,
        ["query_mask:", "[2, 5]", "got", "[2, 6]"],
    ),
    "mask of one view for both in one tensor": (
        lambda: qk(query_aug=None, key_aug=None, attention_mask=MASK[:1]),
        ValueError,
        ["attention_mask:", "[2, 6]", "got", "[1, 6]"],
    ),
    "mask_aug with both views in one tensor": (
        lambda: qk(query_aug=None, key_aug=None, **MASKS),
        ValueError,
        ["attention_mask_aug:", "expected None", "got another one", "all 2 rows in attention_mask"],
    ),
    "a list for a mask": (
        lambda: qk(attention_mask=[[1] * 6] * 2, attention_mask_aug=MASK),
        TypeError,
        ["attention_mask:", "a tensor", "got list", "[2, 6]"],
    ),
    "a number for a mask of queries": (
        lambda: qk(query_mask=5, query_mask_aug=5),
        TypeError,
        ["query_mask:", "a tensor", "got int", "[2, 5]"],
    ),
    "a list for a mask of tokens": (
        lambda: pooled(attention_mask=[[1] * 5] * 2, attention_mask_aug=TOKENS),
        TypeError,
        ["attention_mask:", "a tensor", "got list", "[2, 5]"],
    ),
    "a mask on another device": (
        lambda: qk(attention_mask=MASK.to("meta"), attention_mask_aug=MASK),
        ValueError,
        ["attention_mask:", "on cpu", "got one on meta"],
    ),
    "a list for a bias at another temperature": (
        lambda: ear_ops.qk_attention_kl(QUERY, KEY, QUERY, KEY, attn_bias=[[0.0]], temperature=2.0),
        TypeError,
        ["attn_bias:", "a tensor", "got list"],
    ),
    "a list of queries at another temperature": (
        lambda: ear_ops.qk_attention_js([0.0], KEY, QUERY, KEY, temperature=2.0),
        TypeError,
        ["query:", "a tensor [B, H, L, D]", "got list"],
    ),
    "no head dimension at another temperature": (
        lambda: ear_ops.qk_attention_kl(*[t[..., :0] for t in (QUERY, KEY, QUERY, KEY)], temperature=2.0),
        ValueError,
        ["query:", "at least 1", "got", "[2, 4, 5, 0]"],
    ),
    "a list for a bias": (lambda: qk(attn_bias=[[0.0]]), TypeError, ["attn_bias:", "a tensor", "got list"]),
    "a causality that is no bool": (lambda: qk(is_causal="no"), TypeError, ["is_causal:", "True or False", "got 'no'"]),
    "a scale that is learnt": (
        lambda: qk(scale=torch.ones((), requires_grad=True)),
        ValueError,
        ["scale:", "constant", "requires grad", "multiply the queries"],
    ),
    "a scale that is not finite": (lambda: qk(scale=math.inf), ValueError, ["scale:", "finite", "got inf"]),
    "a scale that is a text": (lambda: qk(scale="one"), TypeError, ["scale:", "a number", "got 'one'"]),
    "a softcap that is a text": (lambda: qk(softcap="a"), TypeError, ["softcap:", "a number", "got 'a'"]),
    "words that are no integer": (
        lambda: ear_ops.qk_word_attention(QUERY, KEY[:, :, :5], word_ids=TOKENS, words=5.0),
        TypeError,
        ["words:", "an integer", "got 5.0"],
    ),
    "word_ids on another device": (
        lambda: ear_ops.qk_word_attention(QUERY, KEY[:, :, :5], word_ids=TOKENS.to("meta"), words=5),
        ValueError,
        ["word_ids:", "on cpu", "got one on meta"],
    ),
    "four-dimensional mask": (
        lambda: qk(attention_mask=MASK[:, None, None], attention_mask_aug=MASK[:, None, None]),
        ValueError,
        ["attention_mask:", "[2, 6]", "got", "[2, 1, 1, 6]"],
    ),
    "float mask": (
        lambda: qk(attention_mask=MASK.float(), attention_mask_aug=MASK.float()),
        TypeError,
        ["attention_mask:", "bool or integer", "got torch.float32", "attn_bias"],
    ),
    # biases
    "bias that requires grad": (
        lambda: qk(attn_bias=torch.zeros(5, 6, requires_grad=True)),
        ValueError,
        ["attn_bias:", "constant", "requires grad", "attn_bias.detach()"],
    ),
    "bias_aug that requires grad": (
        lambda: qk(attn_bias=torch.zeros(5, 6), attn_bias_aug=torch.zeros(5, 6, requires_grad=True)),
        ValueError,
        ["attn_bias_aug:", "constant", "requires grad", "attn_bias_aug.detach()"],
    ),
    "bias of another shape": (
        lambda: qk(attn_bias=torch.zeros(6, 5)),
        ValueError,
        ["attn_bias:", "broadcastable to [2, 4, 5, 6]", "got", "[6, 5]"],
    ),
    "integer bias": (
        lambda: qk(attn_bias=torch.zeros(5, 6, dtype=torch.int64)),
        TypeError,
        ["attn_bias:", "float (additive) or bool", "got torch.int64"],
    ),
    "bias_aug alone": (
        lambda: qk(attn_bias_aug=torch.zeros(5, 6)),
        ValueError,
        ["attn_bias:", "because attn_bias_aug was given", "got None"],
    ),
    "bias_aug with both views in one tensor": (
        lambda: qk(query_aug=None, key_aug=None, attn_bias=torch.zeros(5, 6), attn_bias_aug=torch.zeros(5, 6)),
        ValueError,
        ["attn_bias_aug:", "expected None", "got a tensor"],
    ),
    # numbers and names
    "window of 0": (lambda: qk(window=0), ValueError, ["window:", "at least 1", "got 0"]),
    "half a position of window": (
        lambda: qk(window=2.5, backend="reference"),
        TypeError,
        ["window:", "integer", "2.5"],
    ),
    "negative window": (lambda: qk(window=-3), ValueError, ["window:", "at least 1", "got -3"]),
    "softcap of 0": (lambda: qk(softcap=0.0), ValueError, ["softcap:", "positive", "got 0.0"]),
    "softcap NaN": (lambda: qk(softcap=math.nan), ValueError, ["softcap:", "finite", "got nan"]),
    "unknown reduction": (
        lambda: qk(reduction="avg"),
        ValueError,
        ["reduction:", "'mean', 'padded_mean', 'equations', 'sum', 'none'", "got 'avg'"],
    ),
    "unknown reduction, attention": (lambda: attention(reduction=None), ValueError, ["reduction:", "got None"]),
    "unknown reduction, pooled": (lambda: pooled(reduction="batchmean"), ValueError, ["reduction:", "'batchmean'"]),
    "unknown reduction of a module": (
        lambda: ear_ops.QKAttentionMSELoss(reduction="avg"),
        ValueError,
        ["reduction:", "'mean'", "got 'avg'"],
    ),
    "unknown backend": (
        lambda: pooled(backend="triton"),
        ValueError,
        ["backend:", "'auto', 'reference', 'cpu', 'cuda'", "got 'triton'"],
    ),
    # robust cross-entropy
    "logits of one view": (
        lambda: ear_ops.robust_cross_entropy(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)),
        ValueError,
        ["logits:", "[2B, K] or [2B, L, K]", "got [3, 4]"],
    ),
    "logits of 4 dimensions": (
        lambda: ear_ops.robust_cross_entropy(torch.zeros(2, 4, 5, 6), torch.zeros(1, dtype=torch.int64)),
        ValueError,
        ["logits:", "[2B, K] or [2B, L, K]", "got [2, 4, 5, 6]"],
    ),
    "labels of other rows": (
        lambda: ear_ops.robust_cross_entropy(torch.zeros(4, 5), torch.zeros(3, dtype=torch.int64)),
        ValueError,
        ["labels:", "class indices [2] that both views share, or [4]", "logits [4, 5]", "got [3]"],
    ),
    "labels of sentences with logits of tokens": (
        lambda: ear_ops.robust_cross_entropy(torch.zeros(4, 6, 5), torch.zeros(2, dtype=torch.int64)),
        ValueError,
        ["labels:", "[2, 6]", "[4, 6]", "got [2]"],
    ),
    "targets of a regression": (
        lambda: ear_ops.robust_cross_entropy(torch.zeros(4, 5), torch.zeros(4)),
        ValueError,
        ["labels:", "class probabilities [2, 5]", "[4, 5]", "got [4]"],
    ),
    "class probabilities of tokens without classes": (
        lambda: ear_ops.robust_cross_entropy(torch.zeros(4, 6, 5), torch.zeros(2, 6)),
        ValueError,
        ["labels:", "class probabilities [2, 6, 5]", "[4, 6, 5]", "got [2, 6]"],
    ),
    # head weights
    "head weights of other heads": (
        lambda: qk(head_weights=torch.ones(3)),
        ValueError,
        ["head_weights:", "each of the 4 heads", "got shape [3]"],
    ),
    "head weights per example": (
        lambda: attention(head_weights=torch.ones(2, 4)),
        ValueError,
        ["head_weights:", "each of the 4 heads", "got shape [2, 4]"],
    ),
}


def test_labels_without_a_batch() -> None:
    with pytest.raises(ValueError, match=r"labels:.*\[1\].*\[2\].*got \[\]"):
        ear_ops.robust_cross_entropy(torch.zeros(2, 3), torch.tensor(1))


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, error, parts = BAD[name]
    with pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, parts))) as raised:
        call()
    assert raised.type is error


@pytest.mark.parametrize("call", [qk, attention, pooled])
def test_the_same_calls_pass_without_the_mistake(call: Callable[..., Tensor]) -> None:
    masks = {"attention_mask": TOKENS, "attention_mask_aug": TOKENS} if call is pooled else MASKS
    assert call(**masks).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
def test_masks_of_any_integer(dtype: torch.dtype) -> None:
    key, key_aug = torch.rand(2, 2, 6, 3), torch.rand(2, 2, 6, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    masks = {"attention_mask": mask.to(dtype), "attention_mask_aug": mask.to(dtype)}
    found = qk(QUERY + 1, key, QUERY + 1, key_aug, **masks)
    expected = qk(QUERY + 1, key, QUERY + 1, key_aug, attention_mask=mask.bool(), attention_mask_aug=mask.bool())
    assert torch.equal(found, expected) and found > 0


# The operators check for themselves: they are public as torch.ops.ear_ops, and memory is at stake.
OP_INPUTS = [QUERY, KEY, QUERY, KEY, None, None, None, None, 1.0, False, 0, None]


def replaced(index: int, value: object) -> list[object]:
    return [value if i == index else given for i, given in enumerate(OP_INPUTS)]


OPS_BAD: dict[str, tuple[str, list[object], list[str]]] = {
    "key": ("qk_attention_mse", replaced(1, KEY[:, :, :, :2]), ["key", "[2, 2, 6, 3]", "[2, 2, 6, 2]"]),
    "key dtype": ("qk_attention_mse", replaced(1, KEY.double()), ["key", "float", "double"]),
    "key heads": ("qk_attention_mse", replaced(1, torch.zeros(2, 3, 6, 3)), ["key", "divides", "[2, 3, 6, 3]"]),
    "query_aug": ("qk_attention_mse", replaced(2, QUERY[:1]), ["query_aug", "[2, 4, 5, 3]", "[1, 4, 5, 3]"]),
    "key_aug missing": ("qk_attention_mse", replaced(3, None), ["query_aug, key_aug", "both or neither"]),
    "key_mask": ("qk_attention_mse", replaced(4, MASK.bool()), ["key_mask", "[4, 6]", "[2, 6]"]),
    "key_mask dtype": ("qk_attention_mse", replaced(4, torch.ones(4, 6)), ["key_mask", "bool", "float"]),
    "counted_queries": ("qk_attention_mse", replaced(5, MASK.bool()), ["counted_queries", "[2, 5]", "[2, 6]"]),
    "attn_bias": ("qk_attention_mse", replaced(6, torch.zeros(5, 6)), ["attn_bias", "[2, 4, 5, 6]", "[5, 6]"]),
    "softcap": ("qk_attention_mse", replaced(11, 2.0), ["softcap", "reference only"]),
    "query dimensions": ("qk_attention_mse", replaced(0, QUERY[0]), ["query", "4 dimensions", "[4, 5, 3]"]),
    "attn_aug": ("attention_mse", [ATTN, ATTN[:, :2], None, None], ["attn_aug", "[2, 4, 5, 6]", "[2, 2, 5, 6]"]),
    "attn odd": ("attention_mse", [ATTN[:1], None, None, None], ["attn", "even batch", "[1, 4, 5, 6]"]),
    "attn mask": ("attention_mse", [ATTN, ATTN, MASK.bool(), None], ["key_mask", "[4, 6]", "[2, 6]"]),
    "hidden": ("pooled_distance", [HIDDEN[0], None, None], ["hidden", "3 dimensions", "[5, 3]"]),
    "hidden mask": ("pooled_distance", [HIDDEN, HIDDEN, TOKENS.bool()], ["mask", "[4, 5]", "[2, 5]"]),
    "needs": (
        "attention_mse_backward",
        [torch.zeros(2, 4), ATTN, ATTN, None, None, [True]],
        ["needs", "2 entries", "1"],
    ),
    "grad_sums": (
        "attention_mse_backward",
        [torch.zeros(4, 2), ATTN, ATTN, None, None, [True, True]],
        ["grad_sums", "[2, 4]", "[4, 2]"],
    ),
}


@pytest.mark.parametrize("name", OPS_BAD)
def test_bad_input_of_operators(name: str, device: str) -> None:
    op, inputs, parts = OPS_BAD[name]
    moved = [t.to(device) if isinstance(t, Tensor) else t for t in inputs]
    with pytest.raises((ValueError, TypeError)) as raised:
        getattr(torch.ops.ear_ops, op)(*moved)
    message = str(raised.value).lower()  # torch writes Float and Bool
    assert re.search("(?s)" + ".*".join(map(re.escape, [op.removesuffix("_backward"), *parts])), message), message


def test_float8_runs_on_the_reference() -> None:
    """No kernel takes it, the definition does."""
    hidden = torch.randn(2, 3, 4).to(torch.float8_e4m3fn)
    found = ear_ops.pooled_distance(hidden, hidden.flip(1)[:, :, [1, 0, 3, 2]])
    problem = pooled_distance.PooledProblem(hidden, hidden.flip(1)[:, :, [1, 0, 3, 2]], None)
    expected = pooled_distance.reference(problem).mean() / 4
    torch.testing.assert_close(found, expected)
