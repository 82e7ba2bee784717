"""The CUDA kernels that compare attention between words, compiled for the host, against the float64 reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support import cuda_on_host
from support.host_cases import DTYPES
from support.rules import l2_error
from support.words import CASES, FEW, LARGE, MANY, check_words, loss_of, results, views
from torch import Tensor

from ear_ops.ops.qk_words import QK_WORD_ATTENTION, WordsProblem

DIVERGENCES = ("mse", "kl", "reverse_kl", "js")

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.mark.parametrize(
    ("divergence", "case"),
    [
        *(("mse", case) for case in CASES),
        *itertools.product(("kl", "reverse_kl", "js"), ("padding, groups",)),
        ("kl", "bias"),
        ("js", "strips"),
        ("js", "tokens without a word"),
    ],
)
def test_words(divergence: str, case: str) -> None:
    ids, sizes, options = CASES[case]
    check_words(ids, sizes, {**options, "divergence": divergence}, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("divergence", "case"), [("mse", "chunks"), ("js", "padding, groups"), ("mse", "strips")])
def test_words_of_16_bits(divergence: str, case: str, dtype: torch.dtype) -> None:
    ids, sizes, options = CASES[case]
    check_words(ids, sizes, {**options, "divergence": divergence}, dtype)


@pytest.mark.parametrize("divergence", ["mse", "js"])
def test_words_that_one_view_lacks(divergence: str) -> None:
    """And words of more pieces than a block of threads owns, under a causal mask and a window."""
    mask = (LARGE >= 0).long()
    mask[1, 40] = 0  # within a word
    options = {"attention_mask": mask, "is_causal": True, "window": 120, "divergence": divergence}
    check_words(LARGE, {"heads": 1, "key_heads": 1, "dim": 8}, options, torch.float32)


@pytest.mark.parametrize(
    ("divergence", "dtype"), [*((name, torch.float32) for name in DIVERGENCES), ("mse", DTYPES[1]), ("js", DTYPES[2])]
)
def test_equal_views_give_exactly_zero(divergence: str, dtype: torch.dtype) -> None:
    ids = MANY[:1].repeat(2, 1)
    inputs = [view[:1].repeat(2, 1, 1, 1).to(dtype) for view in views(ids, heads=1, key_heads=1, dim=16)]
    found = results(loss_of, inputs, ids, divergence=divergence, backend="cpu")
    assert not any(tensor.any() for tensor in found)


@every_divergence
def test_nearly_equal_views_keep_their_digits(divergence: str) -> None:
    ids = MANY[:1].repeat(2, 1)
    inputs = [view.float() for view in views(ids, heads=1, key_heads=1, dim=16, closeness=1e-2)]
    exact = results(loss_of, [view.double() for view in inputs], ids, divergence=divergence, backend="reference")
    found = results(loss_of, inputs, ids, divergence=divergence, backend="cpu")
    assert l2_error(found[0], exact[0]) < 1e-4
    assert all(l2_error(*both) < 1e-3 for both in zip(found[1:], exact[1:], strict=True))


@every_dtype
def test_padding_is_never_touched(dtype: torch.dtype) -> None:
    mask = (FEW >= 0).long()
    mask[0, 4] = 0  # also within a word
    found = []
    for value in (0.0, torch.nan):
        inputs = [view.masked_fill((mask == 0)[:, None, :, None], value).to(dtype) for view in views(FEW)]
        found.append(results(loss_of, inputs, FEW, attention_mask=mask, backend="cpu"))
    assert all(zero.isfinite().all() and torch.equal(zero, nan) for zero, nan in zip(*found, strict=True))


def call(ids: Tensor, divergence: str = "mse", **changed: Any) -> tuple[WordsProblem, Tensor]:
    """A problem of two tensors for each input, and its sums."""
    query, key = (view.float() for view in views(ids, heads=2, key_heads=1, dim=24))
    half = len(ids) // 2
    tensors = [view.contiguous().requires_grad_() for view in (query[:half], key[:half], query[half:], key[half:])]
    options = {"mask": ids >= 0, "bias": None, **changed}
    bias = options["bias"]
    problem = WordsProblem(*tensors, options["mask"], ids, bias, None, 0.3, False, 0, None, int(ids.max()) + 1)
    return problem, QK_WORD_ATTENTION[divergence].sums(problem, "cpu")


def test_only_the_gradients_asked_for() -> None:
    problem, sums = call(FEW[::2])
    expected = torch.autograd.grad(sums.sum(), problem[:4])
    for needs in ((True, False, False, False), (False, True, False, True), (False, False, True, True)):
        inputs = [tensor.detach().requires_grad_(need) for tensor, need in zip(problem[:4], needs, strict=True)]
        sums = QK_WORD_ATTENTION["mse"].sums(WordsProblem(*inputs, *problem[4:]), "cpu").sum()
        sums.backward()
        for tensor, need, gradient in zip(inputs, needs, expected, strict=True):
            assert (tensor.grad is not None) == need
            assert not need or torch.equal(tensor.grad, gradient)


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl"])
def test_a_word_that_only_the_target_sees_makes_kl_infinite(divergence: str) -> None:
    """Gradients are those of the other heads, where the infinite one has no upstream."""
    ids, compared = FEW[::2], 1 if divergence == "reverse_kl" else 0  # the view that is not the target
    bias = torch.zeros(1, 2, 41, 41)
    bias[:, 1, :, ids[compared] == 3] = -torch.inf
    problem, sums = call(ids, divergence)
    masked = problem._replace(attn_bias=torch.zeros_like(bias), attn_bias_aug=bias)
    masked = masked if compared == 1 else masked._replace(attn_bias=bias, attn_bias_aug=torch.zeros_like(bias))
    infinite = QK_WORD_ATTENTION[divergence].sums(masked, "cpu")
    assert infinite[0, 1] == torch.inf
    torch.testing.assert_close(infinite[0, 0], sums[0, 0])
    for gradient in torch.autograd.grad(infinite[0, 0], problem[:4]):
        assert gradient.isfinite().all()
        assert not gradient[:, 1:].any() or gradient.shape[1] == 1


@every_divergence
def test_a_row_without_keys(divergence: str) -> None:
    """A word of the target attends to nothing. To KL its row counts nothing."""
    ids = FEW[::2]
    target = 0 if divergence == "reverse_kl" else 1
    biases = [torch.zeros(1, 2, 41, 41), torch.zeros(1, 2, 41, 41)]
    biases[target][:, :, ids[target] == 0] = -torch.inf
    problem, _ = call(ids, divergence)
    problem = problem._replace(attn_bias=biases[0], attn_bias_aug=biases[1])
    sums = QK_WORD_ATTENTION[divergence].sums(problem, "cpu")
    exact = [tensor.detach().double().requires_grad_() for tensor in problem[:4]]
    wide = WordsProblem(*exact, *problem[4:6], *(bias.double() for bias in biases), *problem[8:])
    expected = QK_WORD_ATTENTION[divergence].sums(wide, "reference")
    assert torch.allclose(sums.double(), expected, rtol=1e-5)
    found, right = (torch.autograd.grad(of.sum(), inputs) for of, inputs in ((sums, problem[:4]), (expected, exact)))
    assert all(torch.allclose(a.double(), b, rtol=1e-4, atol=1e-6) for a, b in zip(found, right, strict=True))


def test_a_row_without_a_target_has_no_gradient_where_scores_are_large() -> None:
    """Their exponentials are infinite where no maximum is taken off."""
    ids = FEW[::2]
    masked = torch.zeros(1, 2, 41, 41)
    masked[:, :, ids[1] >= 0] = -torch.inf
    problem, _ = call(ids, "kl")
    problem = problem._replace(attn_bias=torch.zeros(1, 2, 41, 41), attn_bias_aug=masked, scale=1000.0)
    sums = QK_WORD_ATTENTION["kl"].sums(problem, "cpu")
    assert not sums.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(sums.sum(), problem[:4]))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_the_order_in_which_threads_run_changes_no_bit(dtype: torch.dtype) -> None:
    inputs = [view.to(dtype) for view in views(MANY, heads=2, key_heads=1, dim=16)]
    options = {"attention_mask": (MANY >= 0).long(), "divergence": "js", "reduction": "none", "backend": "cpu"}
    expected = results(loss_of, inputs, MANY, **options)
    cuda_on_host.configure(seed=1)
    assert all(map(torch.equal, results(loss_of, inputs, MANY, **options), expected))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86"])
def test_shared_memory_holds_every_head_dimension(architecture: str) -> None:
    cuda_on_host.configure(architecture=architecture)
    check_words(*CASES["chunks"], torch.float32)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=["plain", "causal"])
def test_strips_are_shorter_where_shared_memory_is_small(options: dict[str, Any]) -> None:
    """Also beside words of more tokens than such a strip has."""
    cuda_on_host.configure(architecture="sm_86")
    for ids in (MANY, LARGE):
        sizes = {"heads": 1, "key_heads": 1, "dim": 8}
        check_words(ids, sizes, {"attention_mask": (ids >= 0).long(), **options}, torch.float32)


def scattered_words(length: int, words: int, without: int, seed: int) -> Tensor:
    """Words of random pieces in any order, of which each view lacks some; ``without`` tokens of each view have none."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(words, (4, length), generator=generator)
    ids[:, torch.randperm(length, generator=generator)[:without]] = -1
    return ids


@pytest.mark.parametrize("divergence", ["mse", "kl"])
@pytest.mark.parametrize(("length", "words", "without"), [(190, 150, 20), (150, 40, 80), (70, 3, 0), (140, 400, 30)])
def test_strips_of_every_kind(length: int, words: int, without: int, divergence: str) -> None:
    """More keys without a word than a tile holds, words of many pieces, and long gaps between numbers."""
    ids = scattered_words(length, words, without, seed=length)
    if divergence == "kl":  # finite where both views have the same words
        ids[2:] = ids[:2].roll(1, 1)
    sizes = {"heads": 2, "key_heads": 1, "dim": 16}
    check_words(ids, sizes, {"divergence": divergence}, torch.float32)


def test_strides_change_no_bit() -> None:
    inputs = [view.to(torch.bfloat16) for view in views(FEW, dim=16)]
    laid = [torch.stack([view, view * torch.nan], -1)[..., 0] for view in inputs]
    found, expected = (results(loss_of, each, FEW, backend="cpu") for each in (laid, inputs))
    assert all(map(torch.equal, found, expected))
