"""Attention between words, straight from queries and keys: against matrices of tokens that are summed and averaged."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support import plain
from support.memory import peak_memory
from support.rules import check_gradient, check_value
from support.words import ids_of, loss_of, plain_loss, results, views
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ear_ops.capture import AttentionInputs
from ear_ops.data import PairCollator, PairViews, SynonymAugmenter, get_task, load_split, load_synonyms
from ear_ops.data.mini import mini_data_dir
from ear_ops.functional import qk_word_attention
from ear_ops.ops import blocks, qk_words
from ear_ops.regularizers.word_alignment import compare_words

DIVERGENCES = list(qk_words.QK_WORD_ATTENTION)
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)

# The same words in other pieces in each view. In the second pair, x lacks word 4 and x^a lacks word 1, and the special
# token of word 7 stands in front, so that ids do not ascend.
SPLIT = torch.tensor(
    [
        ids_of([1, 2, 1, 3, 1, 1], 11),
        [7, *ids_of([1, 1, 2, 1, 2, 1], 10, leave_out=(4,))],
        ids_of([1, 1, 4, 1, 1, 2], 11),
        [7, *ids_of([2, 3, 1, 1, 3, 1], 10, leave_out=(1,))],
    ]
)
SAME = torch.cat([SPLIT[:2], SPLIT[:2]])
ALIKE = torch.cat([SPLIT[::2], SPLIT[:1].flip(1), SPLIT[:1]])  # both views have the same words, in other pieces


def assert_equal(actual: list[Tensor], expected: list[Tensor], **tolerances: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **{"rtol": 1e-9, "atol": 1e-12, **tolerances})


@pytest.fixture(params=["reference", "small blocks", "cpu"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend; the reference also with blocks of one word, and of few tokens of it."""
    if request.param == "small blocks":
        monkeypatch.setattr(blocks, "BLOCK_ENTRIES", 100)
        return "reference"
    if request.param == "cpu" and not qk_words.QK_WORD_ATTENTION["mse"].kernels:
        pytest.skip("no kernel compares words: the CPU extension was not built")
    return request.param


MASK = (SPLIT >= 0).long()
BIAS = torch.linspace(-1.0, 1.0, 2 * 11 * 11, dtype=torch.float64).view(1, 2, 11, 11)
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask": {"attention_mask": MASK},
    "causal": {"attention_mask": MASK, "is_causal": True},
    "window": {"attention_mask": MASK, "window": 3},
    "bias": {"attention_mask": MASK, "attn_bias": BIAS.masked_fill(BIAS > 0.9, -torch.inf)},
    "bias of each pair": {"attn_bias": torch.cat([BIAS, -BIAS, 2 * BIAS, BIAS / 2]), "window": 5},
    "bool bias": {"attn_bias": BIAS < 0.8},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": 0.9},
    "none": {"attention_mask": MASK, "reduction": "none"},
    "sum": {"attention_mask": MASK, "reduction": "sum"},
    "equations": {"attention_mask": MASK, "reduction": "equations"},
}


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("two_tensors", [False, True])
def test_equal_to_plain_pytorch(features: str, two_tensors: bool, backend: str) -> None:
    options = dict(FEATURES[features])
    if "bias" in features:
        options["attn_bias"] = options["attn_bias"].repeat(1, 2, 1, 1)
    inputs = views(SPLIT, heads=4, key_heads=2)
    expected = results(plain_loss, inputs, SPLIT, **options)
    chosen = "reference" if "softcap" in options else backend
    if not two_tensors:
        assert_equal(results(loss_of, inputs, SPLIT, **options, backend=chosen), expected)
        return
    for name in ("attention_mask", "attn_bias"):
        if name in options and len(options[name]) == 4:
            options[name], options[f"{name}_aug"] = options[name].chunk(2)

    def call(query: Tensor, key: Tensor) -> Tensor:
        (query, query_aug), (key, key_aug) = query.chunk(2), key.chunk(2)
        words = int(SPLIT.max()) + 1
        return qk_word_attention(query, key, query_aug, key_aug, word_ids=SPLIT, words=words, **options, backend=chosen)

    assert_equal(results(call, inputs), expected)


@every_divergence
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_divergence_equal_to_plain_pytorch(divergence: str, reduction: str, backend: str) -> None:
    ids = ALIKE
    options = {"attention_mask": (ids >= 0).long(), "divergence": divergence, "reduction": reduction}
    expected = results(plain_loss, views(ids), ids, **options)
    assert_equal(results(loss_of, views(ids), ids, **options, backend=backend), expected)


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "js"])
def test_over_the_words_that_both_views_have(divergence: str) -> None:
    """Each row is renormalised over these words."""
    query, key = views(SPLIT)
    found = loss_of(query, key, SPLIT, divergence=divergence, support="shared", attention_mask=MASK, reduction="none")
    assert found.isfinite().all()
    member = (SPLIT[:, None] == torch.arange(8)[:, None]).double()[:, None]
    attn = plain.probabilities(query, key, MASK)
    maps = (member / member.sum(-1, keepdim=True).clamp(min=1) @ attn @ member.mT).chunk(2)
    shared = member.any(-1).view(2, 2, 1, 8).all(0)  # [B, 1, W]
    maps = [m * (shared[:, :, None] & shared[..., None]) for m in maps]
    p, t = (m / m.sum(-1, keepdim=True).clamp(min=1e-9) for m in maps)
    if divergence == "reverse_kl":
        p, t = t, p
    mean = (p + t) / 2 if divergence == "js" else p
    expected = torch.special.xlogy(t, t) - torch.special.xlogy(t, mean)
    if divergence == "js":
        expected = (expected + torch.special.xlogy(p, p) - torch.special.xlogy(p, mean)) / 2
    torch.testing.assert_close(found, expected.sum((-2, -1)))


def test_words_of_many_pieces(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A word of 70 pieces and one of 150 fill more than a block of queries; x lacks a word of 80 pieces."""
    monkeypatch.setattr(blocks, "BLOCK_ENTRIES", 50_000)
    first, second = ids_of([3, 70, 2, 0, 5, 150], 240), ids_of([1, 40, 90, 80, 5, 10], 240)
    ids = torch.tensor([first, second])
    options = {"attention_mask": (ids >= 0).long()}
    inputs = views(ids, dim=8)
    expected = results(plain_loss, inputs, ids, **options)
    assert_equal(results(loss_of, inputs, ids, **options, backend=backend), expected)


def test_texts_longer_than_a_tile_of_keys(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ENTRIES", 100_000)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 5, (130,), generator=generator).tolist() for _ in range(2)]
    ids = torch.tensor([ids_of(rows[0], 300)[:300], ids_of(rows[1], 300)[:300]])
    inputs = views(ids, dim=8)
    options = {"attention_mask": (ids >= 0).long(), "is_causal": True, "window": 120}
    expected = results(plain_loss, inputs, ids, **options)
    assert_equal(results(loss_of, inputs, ids, **options, backend=backend), expected)


def real_word_ids(examples: list[Any], synonyms: dict[str, list[str]], pieces: int) -> Tensor:
    """Word ids ``[2B, L]`` of pairs and their augmentation, by a tokenizer trained on them."""
    trained = Tokenizer(models.BPE(unk_token="[UNK]"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    texts = [text for example in examples for text in example[:2]]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=pieces, special_tokens=special))
    trained.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained, model_max_length=128, pad_token="[PAD]", unk_token="[UNK]", sep_token="[SEP]"
    )
    collate = PairCollator(tokenizer, max_length=128, word_ids=True)
    pairs = PairViews(examples, SynonymAugmenter(synonyms), seed=1)
    return collate([pairs[number] for number in range(len(examples))])["word_ids"]


@pytest.mark.parametrize("source", ["mini", "XNLI"])
def test_words_of_real_pairs(source: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ENTRIES", 100_000)
    if source == "XNLI" and "XTREME_DATA" not in os.environ:
        pytest.skip("XTREME_DATA names no folder with XNLI")
    folder = mini_data_dir() if source == "mini" else Path(os.environ["XTREME_DATA"])
    dictionary = "synonyms.json" if source == "mini" else "synonyms/counterfitted_neighbors.json"
    examples = load_split(folder, get_task("xnli"), "train", "en")[:6]
    ids = real_word_ids(examples, load_synonyms(folder / dictionary), 300)
    assert any((first != second).any() for first, second in zip(*ids.chunk(2), strict=True))
    options = {"attention_mask": (ids >= 0).long(), "reduction": "none"}
    expected = results(plain_loss, views(ids), ids, **options)
    assert_equal(results(loss_of, views(ids), ids, **options, backend=backend), expected)


@pytest.mark.parametrize("case", ["one view is padding", "no shared word", "no words", "a real token without a word"])
def test_empty_rows(case: str, backend: str) -> None:
    ids, mask = SPLIT.clone(), MASK.clone()
    if case == "one view is padding":
        mask[1] = 0
    elif case == "no shared word":
        ids[2:] = torch.where(ids[2:] >= 0, ids[2:] + 8, -1)
    elif case == "no words":
        ids[:] = -1
    else:
        ids[:, 3] = -1
    found = results(loss_of, views(ids), ids, attention_mask=mask, backend=backend)
    assert all(tensor.isfinite().all() for tensor in found)
    if case in ("no shared word", "no words"):
        assert not any(tensor.any() for tensor in found)
    else:
        assert_equal(found, results(plain_loss, views(ids), ids, attention_mask=mask))


@every_divergence
def test_equal_views_give_exactly_zero(divergence: str, backend: str) -> None:
    query, key = (torch.cat([view.chunk(2)[0]] * 2) for view in views(SAME))
    found = results(loss_of, [query, key], SAME, divergence=divergence, backend=backend)
    assert not any(tensor.any() for tensor in found)


@every_divergence
def test_gradients_by_differences(divergence: str, backend: str) -> None:
    ids = SPLIT[::2, :6]
    inputs = [view[:, :, :6].requires_grad_() for view in views(SPLIT[::2], heads=1, key_heads=1, dim=2)]
    options = {"attention_mask": (ids >= 0).long(), "divergence": divergence, "reduction": "none"}
    options["backend"] = backend
    if "kl" in divergence:
        options["support"], options["backend"] = "shared", "reference"
    assert torch.autograd.gradcheck(lambda query, key: loss_of(query, key, ids, **options), inputs)


def test_what_padding_holds_does_not_matter(backend: str) -> None:
    mask = MASK.clone()
    mask[0, 4] = 0  # also within a word
    found = []
    for value in (0.0, float("nan")):
        inputs = [view.masked_fill((mask == 0)[:, None, :, None], value) for view in views(SPLIT)]
        found.append(results(loss_of, inputs, SPLIT, attention_mask=mask, backend=backend))
    for zero, nan in zip(*found, strict=True):
        assert torch.equal(zero, nan) and zero.isfinite().all()


def test_more_padding_changes_nothing(backend: str) -> None:
    found = []
    for extra in (0, 9):
        ids = torch.nn.functional.pad(SPLIT, (0, extra), value=-1)
        inputs = [torch.nn.functional.pad(view, (0, 0, 0, extra)) for view in views(SPLIT)]
        value, *gradients = results(loss_of, inputs, ids, attention_mask=(ids >= 0).long(), backend=backend)
        found.append([value, *(gradient[:, :, :11] for gradient in gradients)])
    assert_equal(*found)


def test_nan_in_a_real_token_reaches_the_loss(backend: str) -> None:
    query, key = views(SPLIT)
    key[0, 0, 2, 1] = float("nan")
    sums = loss_of(query, key, SPLIT, attention_mask=MASK, reduction="none", backend=backend)
    assert sums.isnan().tolist() == [[True, False], [False, False]]


def test_head_weights(backend: str) -> None:
    query, key = views(SPLIT)
    weights = torch.tensor([0.0, 3.0])
    sums = loss_of(query, key, SPLIT, reduction="none", backend=backend)
    found = loss_of(query, key, SPLIT, reduction="none", head_weights=weights, backend=backend)
    assert torch.equal(found, sums * weights)


def test_kl_of_words_that_only_the_target_has_is_infinite() -> None:
    with pytest.raises(ValueError, match=r"expected the views to have the same keys.*support='shared'"):
        loss_of(*views(SPLIT), SPLIT, attention_mask=MASK, divergence="kl")


def test_where_kl_is_infinite_a_head_weight_of_zero_leaves_it_out(backend: str) -> None:
    query, key = views(SPLIT)
    query, key = (torch.cat([view, view], 1) for view in (query, key))
    bias = torch.zeros(4, 4, 11, 11, dtype=torch.float64)
    ids = ALIKE
    bias[:2, 1].masked_fill_((ids[:2] == 2)[:, None], -torch.inf)  # head 1 of x does not see word 2
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0])
    options = {"attention_mask": (ids >= 0).long(), "attn_bias": bias, "divergence": "kl", "backend": backend}
    found = results(loss_of, [query, key], ids, head_weights=weights, **options)
    assert all(tensor.isfinite().all() for tensor in found) and not found[1][:, 1].any()
    with pytest.raises(ValueError, match="where KL is infinite"):
        loss_of(query, key, ids, **options)


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "js"])
@pytest.mark.parametrize("view", [0, 1])
def test_a_query_that_sees_no_key_in_one_view(divergence: str, view: int, backend: str) -> None:
    """Its word has a row of zeros there. Of KL it counts nothing if that is the target's, else it is infinite."""
    ids = ALIKE
    bias = torch.zeros(4, 2, 11, 11, dtype=torch.float64)
    bias[2 * view, :, ids[2 * view] == 0] = -torch.inf
    options = {"attention_mask": (ids >= 0).long(), "attn_bias": bias, "divergence": divergence}
    if {("kl", 0), ("reverse_kl", 1)} & {(divergence, view)}:
        with pytest.raises(ValueError, match="where KL is infinite"):
            loss_of(*views(ids), ids, **options, backend=backend)
        return
    found = results(loss_of, views(ids), ids, **options, backend=backend)
    expected = results(loss_of, views(ids), ids, **options, backend="reference")
    assert all(tensor.isfinite().all() for tensor in found)
    assert_equal(found, expected)


def test_mistakes() -> None:
    query, key = views(SPLIT)
    for mistake, message in (
        ({"word_ids": SPLIT[:2]}, r"word_ids: expected \[4, 11\] to go with 11 queries and 11 keys .* got \[2, 11\]"),
        ({"word_ids": SPLIT.int()}, "word_ids: expected int64, got torch.int32"),
        ({"word_ids": SPLIT.tolist()}, r"word_ids: expected a tensor, got list; .* -1 where a token has no word"),
        ({"words": 2}, r"words: expected more than the largest word id, \d+, got 2"),
        ({"divergence": "l1"}, "divergence: expected one of 'mse', 'kl', 'reverse_kl', 'js', got 'l1'"),
        ({"support": "both", "divergence": "js"}, "support: expected 'all' or 'shared', got 'both'"),
        ({"reduction": "padded_mean"}, "reduction: 'padded_mean' counts padded tokens"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            qk_word_attention(query, key, **{"word_ids": SPLIT, "words": 8, **mistake})


@every_divergence
def test_what_is_kept_for_the_backward_grows_with_the_length(divergence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ENTRIES", 500)
    kept = []
    for length in (64, 128):
        sizes: dict[int, int] = {}

        def note(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        ids = (torch.arange(length) // 2).repeat(2, 1)
        inputs = [view.requires_grad_() for view in views(ids)]
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss_of(*inputs, ids, divergence=divergence, backend="reference")
        kept.append(sum(sizes.values()))
    assert kept[1] < 2.5 * kept[0]


def test_memory_grows_linearly(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (256, 512, 1024, 2048) if backend == "cpu" else (128, 256, 512)
    monkeypatch.setattr(blocks, "BLOCK_ENTRIES", 40_000)

    def peak(length: int) -> int:
        ids = (torch.arange(length) // 2).repeat(2, 1)
        inputs = [view.float() for view in views(ids, dim=8)]
        return peak_memory(lambda: results(loss_of, inputs, ids, backend=backend), "cpu")

    peaks = [peak(length) for length in lengths]
    assert all(later < 2.4 * before for before, later in itertools.pairwise(peaks)), f"{peaks} bytes at {lengths}"


# --- through readings -----------------------------------------------------------------------------------------------


def reading(number: int, length: int, ids: Tensor, **rest: Any) -> AttentionInputs:
    """A view of pairs whose tokens beyond ``length`` are cut off."""
    query, key = (view.chunk(2)[number][:, :, :length] for view in views(ids))
    mask = ids.chunk(2)[number][:, :length] >= 0
    return AttentionInputs(query, key, mask, mask, rest.pop("attn_bias", None), **rest)


def refuse_maps(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("matrices were made")


@pytest.mark.parametrize("bias", [None, "of both", "of keys", "bool"])
def test_views_of_different_lengths(bias: str | None) -> None:
    """The first view lacks the last tokens, which are padding there."""
    ids = SPLIT.clone()
    ids[:2, 9:] = -1
    full = {None: None, "of both": BIAS[0], "of keys": BIAS[0, :1, :1], "bool": BIAS[0] < 0.5}[bias]
    biases = [full if full is None else full[:, :length, :length] for length in (9, 11)]
    options: dict[str, Any] = {"is_causal": True, "window": 6}
    both = [reading(v, n, ids, attn_bias=biases[v], **options) for v, n in ((0, 9), (1, 11))]
    found = compare_words(*both, (ids[:2, :9], ids[2:]), "mse", refuse_maps, what="x", reduction="mean")
    query, key = views(ids)
    mask = (ids >= 0).long()
    if full is not None:
        options["attn_bias"] = full
    torch.testing.assert_close(found, plain_loss(query, key, ids, attention_mask=mask, **options))


def test_a_teacher_of_another_structure_or_size() -> None:
    """What Q and K of both views cannot share is compared by the matrices; another head size and scale can be."""
    from ear_ops import attention_mse

    student = reading(0, 11, SPLIT)
    causal = reading(1, 11, SPLIT, is_causal=True)
    pair = (SPLIT[:2], SPLIT[2:])
    with pytest.raises(AssertionError, match="matrices were made"):
        compare_words(student, causal, pair, "mse", refuse_maps, what="x", reduction="mean")
    assert compare_words(student, causal, pair, "mse", attention_mse, what="x", reduction="mean") > 0
    averages = compare_words(student, student, pair, "mse", attention_mse, what="x", reduction="mean", heads="mean")
    assert averages > 0  # of matrices, too: the second view has other words
    wide = causal._replace(is_causal=False, scale=0.3)
    wide = wide._replace(query=wide.query.repeat(1, 1, 1, 2), key=wide.key.repeat(1, 1, 1, 2))
    found = compare_words(student, wide, pair, "mse", refuse_maps, what="x", reduction="mean")
    query, key = views(SPLIT)
    scaled = torch.cat([query[:2], query[2:] * (2 * 0.3 * 2)])  # the default scale is 1 / 2
    torch.testing.assert_close(found, plain_loss(scaled, key, SPLIT, attention_mask=MASK))


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closeness", [None, 1e-2])
@pytest.mark.parametrize(
    ("divergence", "dtype"),
    [*itertools.product(DIVERGENCES, (torch.float32, torch.bfloat16)), ("mse", torch.float16)],
)
def test_error_rule(
    divergence: str, dtype: torch.dtype, closeness: float | None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ENTRIES", 20_000)
    pieces = [1, 2, 1, 1, 3], [1, 1, 2, 1, 2] if closeness is None else [1, 2, 1, 1, 3]
    ids = torch.tensor([ids_of(of_view * 8, 70) for of_view in pieces])
    mask = (ids >= 0).long()
    inputs = [view.to(dtype) for view in views(ids, dim=16, closeness=closeness)]
    options = {"attention_mask": mask, "divergence": divergence}
    oracle = results(loss_of, [view.double() for view in inputs], ids, **options, backend="reference")
    eager = results(plain_loss, inputs, ids, **options)
    value, *gradients = results(loss_of, inputs, ids, **options, backend=backend)
    check_value(value, eager[0], oracle[0])
    for name, actual, eager_gradient, expected in zip(("query", "key"), gradients, eager[1:], oracle[1:], strict=True):
        check_gradient(name, actual, eager_gradient, expected)


# --- the operator and its kernel ------------------------------------------------------------------------------------


@pytest.fixture
def kernel() -> None:
    if "cpu" not in qk_words.QK_WORD_ATTENTION["mse"].kernels:
        pytest.skip("no kernel compares words: the CPU extension was not built")


def operator_arguments(stacked: bool, optional: bool, divergence: str = "mse") -> tuple[list[Any], list[Any]]:
    """Forward and backward arguments, with and without everything that is optional."""
    query, key = (view.float() for view in views(ALIKE, heads=4))
    tensors = [query, key, None, None] if stacked else [query[:2], key[:2], query[2:], key[2:]]
    bias = BIAS.float().repeat(1, 2, 1, 1).expand(2, 4, 11, 11)
    biases = [bias, -bias] if optional else [None, None]
    mask = ALIKE >= 0 if optional else None
    structure = optional and "kl" not in divergence  # with it the views would not see the same words
    forward = [*tensors, mask, ALIKE, *biases, 0.5, structure, 4 if structure else 0, None, 8]
    _, saved = getattr(torch.ops.ear_ops, f"qk_word_attention_{divergence}")(*forward)
    return forward, [torch.randn(2, 4), *forward, saved, [True, True, False, not stacked]]


@pytest.mark.parametrize("stacked", [False, True], ids=["two tensors", "one tensor"])
@pytest.mark.parametrize("optional", [False, True], ids=["plain", "all options"])
@every_divergence
def test_opcheck(divergence: str, stacked: bool, optional: bool, kernel: None) -> None:
    forward, backward = operator_arguments(stacked, optional, divergence)
    torch.library.opcheck(getattr(torch.ops.ear_ops, f"qk_word_attention_{divergence}").default, tuple(forward))
    torch.library.opcheck(
        getattr(torch.ops.ear_ops, f"qk_word_attention_{divergence}_backward").default, tuple(backward)
    )


@pytest.mark.parametrize("stacked", [False, True], ids=["two tensors", "one tensor"])
def test_the_backward_returns_what_is_needed_and_nothing_else(stacked: bool, kernel: None) -> None:
    _, backward = operator_arguments(stacked, True)
    run = torch.ops.ear_ops.qk_word_attention_mse_backward
    count = 2 if stacked else 4
    every = run(*backward[:-1], [True] * count + [False] * (4 - count))
    for number in range(2**count):
        needs = [bool(number >> i & 1) for i in range(count)] + [False] * (4 - count)
        gradients = run(*backward[:-1], needs)
        expected = [gradient for gradient, needed in zip(every, needs, strict=False) if needed]
        assert all(torch.equal(*both) for both in zip(gradients, expected, strict=True))


def test_the_operator_refuses_what_would_touch_foreign_memory(kernel: None) -> None:
    forward, _ = operator_arguments(True, True)
    for place, wrong, message in (
        (5, ALIKE[:2], r"word_ids: expected shape \[4, 11\], got \[2, 11\]"),
        (5, ALIKE.int(), "word_ids: expected dtype Long, got Int"),
        (12, 5, "word_ids: expected numbers of less than words, 5, got 5"),
        (12, 0, "words: expected a positive number .* got 0"),
        (1, forward[1][:, :, :10], "key"),
    ):
        arguments = [*forward[:place], wrong, *forward[place + 1 :]]
        with pytest.raises((ValueError, TypeError), match=message):
            torch.ops.ear_ops.qk_word_attention_mse(*arguments)


@pytest.mark.parametrize(("divergence", "dtype"), [("mse", torch.float32), ("js", torch.bfloat16)])
def test_the_number_of_threads_changes_no_bit(divergence: str, dtype: torch.dtype, kernel: None) -> None:
    ids = torch.tensor([ids_of([1, 2, 1, 1, 3] * 20, 160), ids_of([1, 1, 2, 1, 2] * 20, 160)]).repeat_interleave(3, 0)
    inputs = [view.to(dtype) for view in views(ids, heads=4, key_heads=2, dim=32)]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(results(loss_of, inputs, ids, attention_mask=(ids >= 0).long(), divergence=divergence))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(*both) for both in zip(found[0], others, strict=True))


@pytest.mark.parametrize("stacked", [False, True], ids=["two tensors", "one tensor"])
def test_full_graph(stacked: bool, kernel: None) -> None:
    torch.compiler.reset()
    inputs = [view.float() for view in views(SPLIT)]

    def call(query: Tensor, key: Tensor) -> Tensor:
        tensors = (query, key) if stacked else (query[:2], key[:2], query[2:], key[2:])
        return qk_word_attention(*tensors, word_ids=SPLIT, words=8, is_causal=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager_decomp_partition")
    assert_equal(results(compiled, inputs), results(call, inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", ["mse", "js"])
def test_the_reference_in_a_full_graph(divergence: str) -> None:
    torch.compiler.reset()
    inputs = [view.float() for view in views(SPLIT)]
    options = {"divergence": divergence, "backend": "reference", "words": 8, "word_ids": SPLIT}
    compiled = torch.compile(qk_word_attention, fullgraph=True, backend="aot_eager_decomp_partition")
    found = results(compiled, inputs, **options)
    assert_equal(found, results(qk_word_attention, inputs, **options), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["length first", "every second", "expanded"])
def test_strides_change_no_bit(layout: str, kernel: None) -> None:
    ids = SPLIT
    inputs = [view.float() for view in views(ids, dim=16)]
    if layout == "expanded":
        inputs = [view[:, :1].expand(view.shape).contiguous() for view in inputs]
    laid = {
        "length first": [view.transpose(1, 2).contiguous().transpose(1, 2) for view in inputs],
        "every second": [torch.stack([view, view * torch.nan], -1)[..., 0] for view in inputs],
        "expanded": [view[:, :1].expand(view.shape) for view in inputs],
    }[layout]
    found = results(loss_of, laid, ids, attention_mask=MASK)
    expected = results(loss_of, inputs, ids, attention_mask=MASK)
    assert all(torch.equal(*both) for both in zip(found, expected, strict=True))
