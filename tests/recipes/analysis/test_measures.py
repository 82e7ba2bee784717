from __future__ import annotations

import itertools

import pytest
import torch

from ear_ops.recipes.analysis.measures import centred_kernel_alignment, language_separation, retrieval_accuracy


def vectors(seed: int, n: int = 40, c: int = 8) -> torch.Tensor:
    return torch.randn(n, c, generator=torch.Generator().manual_seed(seed))


def test_retrieval_counts_the_translations_that_are_nearest() -> None:
    english = vectors(0)
    assert retrieval_accuracy(3 * english + 1e-3 * vectors(1), english) == 1.0, "by angle: length does not matter"
    moved = english.clone()
    moved[:10] = english[torch.arange(10).roll(1)]  # ten sentences lie where another one's translation does
    assert retrieval_accuracy(moved, english) == pytest.approx(30 / 40)
    with pytest.raises(ValueError, match=r"\(40, 8\) and \(39, 8\)"):
        retrieval_accuracy(english, english[:39])


def test_alignment_is_the_normalised_unbiased_hsic_of_linear_kernels() -> None:
    x = vectors(0, n=7, c=3)
    y = vectors(1, n=7, c=2) + x[:, :2]
    k, l = (rows.double() @ rows.double().T for rows in (x, y))  # noqa: E741

    def hsic(a: torch.Tensor, b: torch.Tensor) -> float:
        """Its definition as a U-statistic: the mean over every ordered choice of four different rows."""
        values = [
            (a[i, j] * (b[i, j] + b[q, r] - 2 * b[i, q])).item() for i, j, q, r in itertools.permutations(range(7), 4)
        ]
        return sum(values) / len(values)

    expected = hsic(k, l) / (hsic(k, k) * hsic(l, l)) ** 0.5
    assert 0.1 < expected < 0.9
    assert centred_kernel_alignment(x, y) == pytest.approx(expected)


def test_alignment_of_unrelated_vectors_is_zero_also_in_many_dimensions() -> None:
    values = [centred_kernel_alignment(vectors(2 * i, c=60), vectors(2 * i + 1, c=60)) for i in range(50)]
    assert abs(sum(values) / len(values)) < 0.01
    with pytest.raises(ValueError, match="at least 4 rows"):
        centred_kernel_alignment(vectors(0, n=3), vectors(1, n=3))


def test_alignment_ignores_rotation_scale_and_position_but_not_order() -> None:
    x = vectors(0)
    rotation = torch.linalg.qr(vectors(2, 8, 8))[0]
    assert centred_kernel_alignment(x, 5 * x @ rotation + 7) == pytest.approx(1)
    assert centred_kernel_alignment(x, x.flip(0)) < 0.5


def test_separation_tells_clouds_from_a_mixture() -> None:
    pytest.importorskip("sklearn", reason="needs the extra `analysis`")
    apart = torch.cat([vectors(0), vectors(1) + 50])
    languages = ["en"] * 40 + ["de"] * 40
    assert language_separation(apart, languages) > 0.9
    assert abs(language_separation(torch.cat([vectors(0), vectors(1)]), languages)) < 0.05
