"""How far two languages agree in their sentence vectors, in numbers: what a picture cannot tell."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def retrieval_accuracy(queries: Tensor, candidates: Tensor) -> float:
    """Share of queries whose own translation is the nearest candidate by cosine: XTREME's score on Tatoeba (Hu et al.,
    2020).

    Args:
        queries, candidates: [N, C], row i of one translates row i of the other.
    """
    _check_pairs(queries, candidates)
    similarity = functional.normalize(queries.double(), dim=-1) @ functional.normalize(candidates.double(), dim=-1).T
    nearest = similarity.argmax(dim=1)
    return (nearest == torch.arange(len(queries), device=nearest.device)).double().mean().item()


def centred_kernel_alignment(first: Tensor, second: Tensor) -> float:
    """Linear centred kernel alignment of two sets of vectors (Kornblith et al., ICML 2019), debiased: 1 for sets that
    are the same up to rotation, scale and position, 0 in expectation for unrelated ones.

    Each HSIC is the unbiased estimate of Song et al. (JMLR 2012), equation 5. With the biased one two unrelated sets
    score far above 0 where there are not many more rows than dimensions: 0.56 at N = 300, C = 384. NaN where a set is a
    single point.

    Args:
        first, second: [N, C] and [N, C'], row i of one belongs to row i of the other, at least 4 rows.
    """
    _check_pairs(first, second)
    n = len(first)
    if n < 4:
        raise ValueError(f"expected at least 4 rows, which the unbiased estimate needs, got {n}")
    kernels = []
    for each in (first, second):
        centred = each.double() - each.double().mean(dim=0)  # no matter to the value; it keeps digits
        kernels.append((centred @ centred.T).fill_diagonal_(0))

    def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        apart = k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * k.sum(dim=0) @ l.sum(dim=0) / (n - 2)
        return (k * l).sum() + apart  # the factor 1 / (n (n - 3)) cancels below

    x, y = kernels
    return (hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()).item()


def language_separation(vectors: Tensor, languages: Sequence[str]) -> float:
    """Mean silhouette (Rousseeuw, 1987) of vectors with their languages as clusters, -1 to 1.

    Near 1 each language is a cloud of its own; at 0 and below the languages lie within each other. Euclidean distances.

    Args:
        vectors: [N, C].
        languages: [N], at least two different ones, fewer than N.
    """
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(vectors.double().numpy(), list(languages)))


def _check_pairs(first: Tensor, second: Tensor) -> None:
    if first.dim() != 2 or second.dim() != 2 or len(first) != len(second) or not len(first):
        raise ValueError(f"expected two matrices with as many rows, got {tuple(first.shape)} and {tuple(second.shape)}")
