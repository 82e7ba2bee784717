"""Measures of how far two languages agree in their sentence vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def retrieval_accuracy(queries: Tensor, candidates: Tensor) -> float:
    """The share of queries whose translation is the nearest candidate by cosine.

    This is XTREME's score on Tatoeba (Hu et al., 2020).

    Args:
        queries: [N, C].
        candidates: row i is the translation of query i, [N, C].
    """
    _check_pairs(queries, candidates)
    similarity = functional.normalize(queries.double(), dim=-1) @ functional.normalize(candidates.double(), dim=-1).T
    nearest = similarity.argmax(dim=1)
    return (nearest == torch.arange(len(queries), device=nearest.device)).double().mean().item()


def centred_kernel_alignment(first: Tensor, second: Tensor) -> float:
    """The debiased linear centred kernel alignment of two sets of vectors (Kornblith et al., ICML 2019).

    It is 1 for sets that are equal up to rotation, scale and position, and 0 in expectation for unrelated sets. It is
    NaN where all vectors of a set are equal.

    Each HSIC is the unbiased estimate of Song et al. (JMLR 2012), equation 5. The biased estimate gives unrelated sets
    far more than 0 unless there are many more rows than dimensions: 0.56 at N = 300, C = 384.

    Args:
        first: at least 4 rows, [N, C].
        second: row i belongs to row i of `first`, [N, C'].
    """
    _check_pairs(first, second)
    n = len(first)
    if n < 4:
        raise ValueError(f"expected at least 4 rows, which the unbiased estimate needs, got {n}")
    kernels = []
    for vectors in (first, second):
        centred = vectors.double() - vectors.double().mean(dim=0)  # the value stays the same, with less rounding
        kernels.append((centred @ centred.T).fill_diagonal_(0))

    def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        off_diagonal = k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * k.sum(dim=0) @ l.sum(dim=0) / (n - 2)
        return (k * l).sum() + off_diagonal  # the factor 1 / (n (n - 3)) cancels below

    x, y = kernels
    return (hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()).item()


def language_separation(vectors: Tensor, languages: Sequence[str]) -> float:
    """The mean silhouette (Rousseeuw, 1987) of vectors with their languages as clusters, from -1 to 1.

    Near 1, each language is a separate cloud. At 0 and below, the languages lie within each other. Distances are
    Euclidean.

    Args:
        vectors: [N, C].
        languages: of the vectors, at least two and fewer than N different ones, [N].
    """
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(vectors.double().numpy(), list(languages)))


def _check_pairs(first: Tensor, second: Tensor) -> None:
    if first.dim() != 2 or second.dim() != 2 or len(first) != len(second) or not len(first):
        raise ValueError(f"expected two matrices with as many rows, got {tuple(first.shape)} and {tuple(second.shape)}")
