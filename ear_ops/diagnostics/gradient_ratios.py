"""How strongly each term of the loss pulls beside the cross-entropy: ratios of gradient norms at the places it reaches.

Weights that balance one model and reduction say nothing about another; these ratios do.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ear_ops.capture import AttentionInputs, Layout, MultiheadSite, Recorder, unwrap
from ear_ops.capture.teacher import LayerMap, TeacherLayout, as_constant, check_teacher
from ear_ops.functional import robust_cross_entropy

Batch = Mapping[str, Tensor]  # as `PairCollator` makes it: inputs [2B, L], labels [B]


def gradient_ratios(
    model: Any,
    regularizers: Sequence[Any],
    layer: int,
    batches: Iterable[Batch],
    *,
    teacher: Any = None,
    layer_map: LayerMap | None = None,
) -> dict[str, float]:
    """How strong terms are: the norm of each unweighted term's gradient over that of CE(x) + CE(x^a).

    The norms are taken at the embedding layer's output, and at the queries and keys of block `layer`, over all batches
    together. Dropout is off, and neither the model nor the random state changes.

    Args:
        model: a classifier, logits [2B, K]; attached or not.
        regularizers: their terms, without weights; one of several layers, or of `"middle"`, is as many terms.
        layer: block whose queries and keys are looked at, counted from 1.
        batches: of two views, with the B labels, on the model's device; with a teacher, of one view.
        teacher, layer_map: as for `attach`; the cross-entropy is that of the batch alone then.

    Returns:
        Ratios by `TERM at embeddings`, `TERM at query`, `TERM at key` and, of both in one norm, `TERM at query and
        key`; a place that the term or the cross-entropy does not reach is left out. A ratio that is asked for by
        `push_ratio` is that of the push at the embeddings, by `pull_ratio` that of the pull at query and key.

    Raises:
        TypeError: ``batches`` holds something other than batches.
        ValueError: the layer gives no queries and keys, or a batch has no labels.
    """
    squares = gradient_squares(model, regularizers, layer, batches, teacher=teacher, layer_map=layer_map)
    return {
        f"{name} at {place}": math.sqrt(value / at["cross_entropy"])
        for place, at in {**squares, "query and key": at_query_and_key(squares)}.items()
        for name, value in at.items()
        if name != "cross_entropy" and at.get("cross_entropy")
    }


def at_query_and_key(squares: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Squared norms at queries and keys together, by name, of what `gradient_squares` gives."""
    total: dict[str, float] = {}
    for place in ("query", "key"):
        for name, value in squares.get(place, {}).items():
            total[name] = total.get(name, 0.0) + value
    return total


def gradient_squares(
    model: Any,
    regularizers: Sequence[Any],
    layer: int | None,
    batches: Iterable[Batch],
    *,
    teacher: Any = None,
    layer_map: LayerMap | None = None,
) -> dict[str, dict[str, float]]:
    """Squared norms of the gradients of CE(x) + CE(x^a) and of each unweighted term, summed over the batches.

    The model is measured as it is, without dropout, and neither it nor the random state changes.

    Args:
        model: a classifier, logits [2B, K].
        regularizers: their terms, without weights; one of several layers, or of `"middle"`, is as many terms.
        layer: block whose queries and keys are looked at, counted from 1; None for the embeddings alone.
        batches: of two views; on the model's device; with a teacher, of one view.
        teacher, layer_map: as for `attach`.

    Returns:
        By place (`embeddings`, `query`, `key`) and there by name, `cross_entropy` or a term's; a place that a term does
        not reach lacks it.

    Raises:
        TypeError: ``batches`` holds something other than batches.
        ValueError: the layer gives no queries and keys, or a batch has no labels.
    """
    root = unwrap(model)
    layout = Layout(root)
    embeddings = layout.embeddings()
    attention = [] if layer is None else [layout.attention(layer)]
    terms = [single for regularizer in regularizers for single in regularizer.expand(layout)]
    sites = [term.site(layout) for term in terms]
    teacher_root = None if teacher is None else check_teacher(teacher, root, layer_map)
    with torch.random.fork_rng(devices={parameter.device for parameter in root.parameters() if parameter.is_cuda}):
        for term in terms:  # of a regulariser that was not attached yet: a projection is drawn at random
            term.prepare(root, teacher_root)
    recorder = Recorder(root, [embeddings, *attention, *sites])
    squares: dict[str, dict[str, float]] = {}
    with contextlib.ExitStack() as undo:
        undo.enter_context(_recorded(root, recorder))
        if teacher_root is not None:
            teacher_layout = TeacherLayout(teacher_root, layout, layer_map)
            teacher_sites = [term.site(teacher_layout) for term in terms]
            teacher_recorder = Recorder(teacher_root, teacher_sites, without_grad=True)
            undo.enter_context(_recorded(teacher_root, teacher_recorder))
        for batch in batches:
            _check_batch(batch)
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            with torch.enable_grad():
                logits = root(**inputs).logits
                (record,) = recorder.take()
                places = {"embeddings": embeddings.read(record, "embeddings")[0]}
                for site in attention:
                    queries = site.read(record, "attention")
                    # Those of an nn.MultiheadAttention are projected anew, and the cross-entropy passes them by.
                    if isinstance(site, MultiheadSite) or not isinstance(queries, AttentionInputs):
                        raise ValueError(
                            f"layer: layer {layer} computes its attention itself and gives no queries and keys"
                        )
                    places |= {"query": queries.query, "key": queries.key}
                readings = [[site.read(record, term.name)] for term, site in zip(terms, sites, strict=True)]
                if teacher_root is None:
                    losses = {"cross_entropy": robust_cross_entropy(logits, batch["labels"])}
                else:
                    losses = {"cross_entropy": robust_cross_entropy(torch.cat([logits, logits]), batch["labels"]) / 2}
                    with torch.no_grad():
                        teacher_root(**inputs)
                    (record,) = teacher_recorder.take()
                    for term, site, views in zip(terms, teacher_sites, readings, strict=True):
                        views.append(as_constant(site.read(record, term.name), logits.device))
                for term, views in zip(terms, readings, strict=True):
                    losses[term.name] = term.term(views[0], views[1] if teacher_root is not None else None)
            places = {name: place for name, place in places.items() if place.requires_grad}  # not: frozen embeddings
            for name, loss in losses.items():
                if not loss.requires_grad:
                    continue
                gradients = torch.autograd.grad(loss, list(places.values()), retain_graph=True, allow_unused=True)
                for place, gradient in zip(places, gradients, strict=True):
                    if gradient is not None:
                        at = squares.setdefault(place, {})
                        at[name] = at.get(name, 0.0) + gradient.double().square().sum().item()
    return squares


@contextlib.contextmanager
def _recorded(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Inside, the model is in eval mode and its forwards are recorded."""
    training = model.training
    model.eval()
    try:
        recorder.install()
        yield
    finally:
        recorder.remove()
        model.train(training)


def _check_batch(batch: Any) -> None:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batches: expected several batches, each a mapping of names to tensors, got {type(batch).__name__} in "
            f"place of one; pass [batch] where there is one alone"
        )
    if "labels" not in batch:
        raise ValueError(f"batches: expected 'labels' in every batch, got {', '.join(map(repr, batch))}")
