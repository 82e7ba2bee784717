"""How strongly each term of the loss pulls beside the cross-entropy: ratios of gradient norms at the places it reaches.

Weights that balance one model and reduction say nothing about another; these ratios do.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ear_ops.attachment import attach
from ear_ops.capture import AttentionInputs, Layout, MultiheadSite, Recorder, unwrap
from ear_ops.capture.teacher import LayerMap
from ear_ops.functional import robust_cross_entropy

Batch = Mapping[str, Tensor]  # as `PairCollator` makes it: inputs [2B, L], labels [B], perhaps word_ids [2B, L]
_NOT_INPUTS = ("labels", "word_ids")


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
        batches: of two views, with the B labels, on the model's device; with a teacher, of one view. For terms of words
            also with `word_ids`, which the model does not get.
        teacher, layer_map: as for `attach`; the cross-entropy is that of the batch alone then.

    Returns:
        Ratios by `TERM at embeddings`, `TERM at query`, `TERM at key` and, of both in one norm, `TERM at query and
        key`; a place that the term or the cross-entropy does not reach is left out.

    Raises:
        TypeError: ``batches`` holds something other than batches, or a batch lacks the `word_ids` that a term needs.
        ValueError: the layer gives no queries and keys, a batch has no labels, or two terms have one name.
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

    Args:
        layer: as for :func:`gradient_ratios`; None for the embeddings alone.
        model, regularizers, batches, teacher, layer_map: as for :func:`gradient_ratios`.

    Returns:
        By place (`embeddings`, `query`, `key`) and there by name, `cross_entropy` or a term's; a place that a term does
        not reach lacks it.

    Raises:
        TypeError, ValueError: as :func:`gradient_ratios` does.
    """
    root = unwrap(model)
    layout = Layout(root)
    embeddings = layout.embeddings()
    attention = None if layer is None else layout.attention(layer)
    squares: dict[str, dict[str, float]] = {}
    with contextlib.ExitStack() as undo:
        with torch.random.fork_rng(devices={parameter.device for parameter in root.parameters() if parameter.is_cuda}):
            # A projection that was not attached yet is drawn at random.
            ear = undo.enter_context(attach(root, regularizers, teacher=teacher, layer_map=layer_map))
        recorder = Recorder(root, [embeddings] if attention is None else [embeddings, attention])
        recorder.install()
        undo.callback(recorder.remove)
        for network in (root,) if teacher is None else (root, unwrap(teacher)):
            undo.enter_context(_in_eval_mode(network))
        for batch in batches:
            _check_batch(batch)
            inputs = {name: tensor for name, tensor in batch.items() if name not in _NOT_INPUTS}
            if teacher is not None:
                with torch.no_grad():
                    unwrap(teacher)(**inputs)
            with torch.enable_grad():
                logits = root(**inputs).logits
                if teacher is None:
                    losses = {"cross_entropy": robust_cross_entropy(logits, batch["labels"])}
                else:
                    losses = {"cross_entropy": robust_cross_entropy(torch.cat([logits, logits]), batch["labels"]) / 2}
                (record,) = recorder.take()
                places = {"embeddings": embeddings.read(record, "embeddings")[0]}
                if attention is not None:
                    reading = attention.read(record, "attention")
                    # Those of an nn.MultiheadAttention are projected anew, and the cross-entropy passes them by.
                    if isinstance(attention, MultiheadSite) or not isinstance(reading, AttentionInputs):
                        raise ValueError(
                            f"layer: layer {layer} computes its attention itself and gives no queries and keys"
                        )
                    places |= {"query": reading.query, "key": reading.key}
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message=".* has no gradient")  # such a term is left out
                    losses |= ear.terms(word_ids=batch.get("word_ids"))
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
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, every module of the model is in eval mode; afterwards each is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check_batch(batch: Any) -> None:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batches: expected several batches, each a mapping of names to tensors, got {type(batch).__name__} in "
            f"place of one; pass [batch] where there is one alone"
        )
    if "labels" not in batch:
        raise ValueError(f"batches: expected 'labels' in every batch, got {', '.join(map(repr, batch))}")
