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
    """Linear centred kernel alignment of two sets of vectors (Kornblith et al., ICML 2019), 0 to 1.

    Rotation, scale and position of either set do not matter. NaN where a set is a single point.

    Args:
        first, second: [N, C] and [N, C'], row i of one belongs to row i of the other.
    """
    _check_pairs(first, second)
    x, y = (each.double() - each.double().mean(dim=0) for each in (first, second))
    cross = (x.T @ y).square().sum()
    return (cross / ((x.T @ x).square().sum() * (y.T @ y).square().sum()).sqrt()).item()


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
