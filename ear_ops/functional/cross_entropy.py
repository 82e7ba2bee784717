"""Cross-entropy on both views."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ear_ops.arguments import check_tensor
from ear_ops.functional.values import has_no_values


def robust_cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """``CE(x) + CE(x^a)``, each the mean over its view (Ding et al. 2022, eq. 4).

    Args:
        logits: ``[2B, K]``, or ``[2B, L, K]`` for labels of tokens; rows 0..B-1 of x, the rest of x^a. The logits of a
            causal language model belong to the next token: pass ``logits[:, :-1]`` and ``labels[:, 1:]``.
        labels: int64 class indices ``[B]`` (``[B, L]``) that both views share, or ``[2B]`` (``[2B, L]``) with those of
            each view, x first; or class probabilities ``[B, K]``, ``[2B, K]`` (``[B, L, K]``, ``[2B, L, K]``). Class
            indices ``[2B]`` are the same in both views, but for rows that do not count.
        ignore_index: rows and tokens with this label do not count; a view in which none counts gives 0.

    Returns:
        A scalar in the dtype of ``logits``.

    Raises:
        TypeError: ``logits`` or ``labels`` is no tensor.
        ValueError: shapes do not fit. Or class indices ``[2B]`` say that x and x^a are of different classes, so the
            batch does not hold two views. Only indices on the CPU are checked, since looking at a GPU would wait for
            it; under ``torch.compile``, transforms of ``torch.func`` and with fake tensors none are.
    """
    check_tensor("logits", logits, "pass output.logits of a model of transformers")
    check_tensor("labels", labels, "pass torch.tensor(labels)")
    if logits.dim() not in (2, 3) or logits.shape[0] % 2:
        raise ValueError(f"logits: expected [2B, K] or [2B, L, K] with both views, x first, got {list(logits.shape)}")
    shapes = [[rows, *logits.shape[1:-1]] for rows in (logits.shape[0] // 2, logits.shape[0])]
    if labels.is_floating_point():
        shapes = [[*shape, logits.shape[-1]] for shape in shapes]
    if list(labels.shape) not in shapes:
        kind = "class probabilities" if labels.is_floating_point() else "class indices"
        raise ValueError(
            f"labels: expected {kind} {shapes[0]} that both views share, or {shapes[1]}, to go with logits "
            f"{list(logits.shape)}, got {list(labels.shape)}"
        )
    if list(labels.shape) == shapes[0]:
        labels = repeat_labels(labels)
    elif not labels.is_floating_point():
        if logits.dim() == 2:
            check_labels_of_views("labels", labels, ignore_index)
        return sum(
            (_cross_entropy(*view, ignore_index) for view in zip(logits.chunk(2), labels.chunk(2), strict=True)),
            start=logits.new_zeros(()),
        )
    return 2.0 * _cross_entropy(logits, labels, ignore_index)


def repeat_labels(labels: Tensor) -> Tensor:
    """Labels ``[B, ...]`` for a batch ``[2B, ...]`` that holds both views, x first; each view gets all of them."""
    return torch.cat([labels, labels])


def check_labels_of_views(name: str, labels: Tensor, ignore_index: int) -> None:
    """Raises ValueError where class indices ``[2B]`` on the CPU are not those of pairs, x first."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or has_no_values(labels):
        return
    first, second = labels.chunk(2)
    wrong = (first != second) & (first != ignore_index) & (second != ignore_index)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: expected one class for both views of a pair, got {int(first[row])} in row {row} and "
            f"{int(second[row])} in row {row + len(first)} of {len(labels)}: does the batch hold both views, rows "
            "0..B-1 of x and rows B..2B-1 of its augmentation? Classes that are meant to differ go in as probabilities"
        )


def _cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Mean over the counted rows of ``logits`` ``[N, K]`` or ``[N, L, K]``; 0 where none counts."""
    logits = logits.flatten(0, -2)
    if labels.is_floating_point():
        return F.cross_entropy(logits, labels.flatten(0, -2))
    labels = labels.flatten()
    total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)
