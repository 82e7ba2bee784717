"""The scale of push and pull beside the cross-entropy: measured on the first training pairs, or chosen from a ratio.

A weight that balances the terms of one model and reduction says nothing about another model. A ratio of gradient norms
does. With `push_ratio` 0.1, the weighted push has a tenth of the cross-entropy's gradient norm at the embeddings before
training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ear_ops.data import PairViews
from ear_ops.diagnostics.gradient_ratios import Batch, at_query_and_key, gradient_ratios, gradient_squares
from ear_ops.recipes.training.checkpoints import write_json
from ear_ops.recipes.training.config import RATIOS
from ear_ops.recipes.training.errors import ConfigError, refused_settings
from ear_ops.recipes.training.folder import read_json
from ear_ops.recipes.training.methods import METHODS
from ear_ops.recipes.training.shapes import NUMBER
from ear_ops.recipes.training.stage_settings import ObjectiveSettings
from ear_ops.regularizers import AttentionPull, EmbeddingPush

WEIGHING_BATCHES = 8
WEIGHTS_FILE = "weights.json"

Collate = Callable[[list[Any]], Batch]


def measured_ratios(
    settings: ObjectiveSettings, model: Any, collate: Collate, views: PairViews
) -> dict[str, float] | None:
    """The `gradient_ratios` of push and pull on `measure_gradients` batches.

    A term that the method lacks is measured as `ear` has it. The result is None where the method has one view, or where
    no measurement was asked for.
    """
    if not (settings.measure_gradients and METHODS[settings.method].two_views):
        return None
    model.to(_training_device())
    method_terms = terms_of(settings)
    pushes = [term for term in method_terms if isinstance(term, EmbeddingPush)]
    pulls = [term for term in method_terms if not isinstance(term, EmbeddingPush)]
    terms = [
        *(pushes or [EmbeddingPush(reduction=settings.reduction)]),
        *(pulls or [AttentionPull(settings.layer, reduction=settings.reduction)]),
    ]
    batches = first_batches(settings.measure_gradients, settings.batch_size, model, collate, views)
    with refused_settings():
        return gradient_ratios(model, terms, settings.layer, batches)


def chosen_weights(
    settings: ObjectiveSettings, folder: Path, model: Any, collate: Collate, views: PairViews
) -> dict[str, float]:
    """The weights for which the settings give ratios.

    They are measured once and kept in the folder of the run. So a resumed run has the same weights, even if its data
    have changed. The push is measured at the output of the embedding layer, a pull at queries and keys together, over
    `WEIGHING_BATCHES` batches: weight = ratio * |gradient of the cross-entropy| / |gradient of the term|.

    Returns:
        `alpha`, `beta`, both or none.

    Raises:
        ConfigError: a term has no gradient, so no weight gives it the ratio; or the layer has no queries and keys.
    """
    ratios = _ratios_by_weight(settings)
    if not ratios:
        return {}
    if (folder / WEIGHTS_FILE).exists():
        return read_json(folder / WEIGHTS_FILE, {weight: NUMBER for weight in ratios})
    model.to(_training_device())
    terms = terms_of(settings)
    batches = first_batches(WEIGHING_BATCHES, settings.batch_size, model, collate, views)
    with refused_settings():
        squares = gradient_squares(model, terms, settings.layer if "beta" in ratios else None, batches)
    weights = {}
    for term in terms:
        weight = "alpha" if isinstance(term, EmbeddingPush) else "beta"
        if weight not in ratios:
            continue
        term_square, cross_entropy_square = squares_where_it_acts(squares, term)
        if not term_square > 0:
            raise ConfigError(
                f"{RATIOS[weight]}: {term.name} has no gradient on the first {WEIGHING_BATCHES} batches (is any word "
                f"replaced there?), so no weight gives it a ratio: pass {weight} instead"
            )
        weights[weight] = ratios[weight] * math.sqrt(cross_entropy_square / term_square)
    write_json(folder / WEIGHTS_FILE, weights)
    return weights


def squares_where_it_acts(squares: dict[str, dict[str, float]], term: Any) -> tuple[float, float]:
    """The squared gradient norms of a term and of the cross-entropy, at the place where the term acts.

    The push acts at the embeddings, a pull at queries and keys together.

    Args:
        squares: what `gradient_squares` returned.
        term: a regulariser.
    """
    place = squares["embeddings"] if isinstance(term, EmbeddingPush) else at_query_and_key(squares)
    return place.get(term.name, 0.0), place["cross_entropy"]


def terms_of(settings: ObjectiveSettings) -> list[Any]:
    """The regularisers of the settings, with a weight of 1 where the weight is still to be measured."""
    known = with_weights(settings, dict.fromkeys(_ratios_by_weight(settings), 1.0))
    return METHODS[settings.method](known).regularizers()


def with_weights(settings: ObjectiveSettings, weights: dict[str, float]) -> ObjectiveSettings:
    """The settings with these weights in place of their ratios."""
    changes: dict[str, Any] = {**weights, **{RATIOS[weight]: None for weight in weights}}
    return replace(settings, **changes)


def _ratios_by_weight(settings: ObjectiveSettings) -> dict[str, float]:
    """The ratio of each weight that the method has and that the settings leave to be measured."""
    ratios = {
        weight: getattr(settings, ratio) for weight, ratio in RATIOS.items() if weight in METHODS[settings.method].uses
    }
    return {weight: ratio for weight, ratio in ratios.items() if ratio is not None}


def _training_device() -> str:
    """The device to which the Trainer will move the model."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def first_batches(count: int, size: int, model: Any, collate: Collate, views: PairViews) -> Iterator[Batch]:
    """The first `count` batches of `size` pairs, or fewer where the data end, on the model's device.

    The pairs come in the order of the file, with the variants of the first epoch.
    """
    views.set_epoch(0)
    for start in range(0, min(count * size, len(views)), size):
        batch = collate([views[i] for i in range(start, min(start + size, len(views)))])
        yield {name: tensor.to(model.device) for name, tensor in batch.items()}
