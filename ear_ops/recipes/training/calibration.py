"""The scale of push and pull beside the cross-entropy, on the first training pairs: measured, or chosen.

A weight that balances one model and reduction says nothing about another. A ratio of gradient norms does: with
`push_ratio` 0.1 the weighted push pulls a tenth as hard at the embeddings as the cross-entropy does before training.
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
from ear_ops.recipes.training.config import RATIOS, TrainConfig
from ear_ops.recipes.training.errors import ConfigError
from ear_ops.recipes.training.folder import read_json
from ear_ops.recipes.training.methods import METHODS
from ear_ops.regularizers import AttentionPull, EmbeddingPush

WEIGHING_BATCHES = 8
WEIGHTS_FILE = "weights.json"

Collate = Callable[[list[Any]], Batch]


def measured_ratios(config: TrainConfig, model: Any, collate: Collate, views: PairViews) -> dict[str, float] | None:
    """`gradient_ratios` of push and pull on `measure_gradients` batches; None where there is nothing to measure. A term
    that the method does not have is measured as `ear` has it."""
    if not (config.measure_gradients and METHODS[config.method].two_views):
        return None
    own = terms_of(config)
    pushes = [term for term in own if isinstance(term, EmbeddingPush)]
    pulls = [term for term in own if not isinstance(term, EmbeddingPush)]
    terms = [
        *(pushes or [EmbeddingPush(reduction=config.reduction)]),
        *(pulls or [AttentionPull(config.layer, reduction=config.reduction)]),
    ]
    batches = first_batches(config.measure_gradients, config.batch_size, model, collate, views)
    return gradient_ratios(model, terms, config.layer, batches)


def chosen_weights(
    config: TrainConfig, folder: Path, model: Any, collate: Collate, views: PairViews
) -> dict[str, float]:
    """The weights for which the configuration gives ratios. They are measured once and kept in the run's folder, so
    that a resumed run has the same whatever it reads by then.

    The push is measured at the embedding layer's output, a pull at queries and keys together, over
    `WEIGHING_BATCHES` batches: weight = ratio * |gradient of the cross-entropy| / |gradient of the term|.

    Returns:
        `alpha`, `beta`, both or none.

    Raises:
        ConfigError: a term has no gradient, so that no weight gives it the ratio.
        ValueError: the layer gives no queries and keys.
    """
    wanted = _wanted(config)
    if not wanted:
        return {}
    if (folder / WEIGHTS_FILE).exists():
        return read_json(folder / WEIGHTS_FILE)
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # where the Trainer will put it
    terms = terms_of(config)
    batches = first_batches(WEIGHING_BATCHES, config.batch_size, model, collate, views)
    squares = gradient_squares(model, terms, config.layer if "beta" in wanted else None, batches)
    weights = {}
    for term in terms:
        weight = "alpha" if isinstance(term, EmbeddingPush) else "beta"
        if weight not in wanted:
            continue
        own, reference = squares_where_it_acts(squares, term)
        if not own > 0:
            raise ConfigError(
                f"{RATIOS[weight]}: {term.name} has no gradient on the first {WEIGHING_BATCHES} batches (is any word "
                f"replaced there?), so no weight gives it a ratio: pass {weight} instead"
            )
        weights[weight] = wanted[weight] * math.sqrt(reference / own)
    write_json(folder / WEIGHTS_FILE, weights)
    return weights


def squares_where_it_acts(squares: dict[str, dict[str, float]], term: Any) -> tuple[float, float]:
    """Squared gradient norms of a term and of the cross-entropy, of what `gradient_squares` gives: for the push at the
    embeddings, for a pull at queries and keys together."""
    at = squares["embeddings"] if isinstance(term, EmbeddingPush) else at_query_and_key(squares)
    return at.get(term.name, 0.0), at["cross_entropy"]


def terms_of(config: TrainConfig) -> list[Any]:
    """The regularisers of the configuration, with a weight of 1 where it is not known yet."""
    return METHODS[config.method](weighted(config, dict.fromkeys(_wanted(config), 1.0))).regularizers()


def weighted(config: TrainConfig, weights: dict[str, float]) -> TrainConfig:
    """The configuration with these weights in place of their ratios."""
    changes: dict[str, Any] = {**weights, **{RATIOS[weight]: None for weight in weights}}
    return replace(config, **changes)


def _wanted(config: TrainConfig) -> dict[str, float]:
    """Ratio by weight, of the weights that the method has and the configuration leaves to be measured."""
    ratios = {
        weight: getattr(config, ratio) for weight, ratio in RATIOS.items() if weight in METHODS[config.method].uses
    }
    return {weight: ratio for weight, ratio in ratios.items() if ratio is not None}


def first_batches(count: int, size: int, model: Any, collate: Collate, views: PairViews) -> Iterator[Batch]:
    """At most `count` batches of `size` pairs, on the model's device: in the order of the file, with the variants of
    the first epoch."""
    views.set_epoch(0)
    for start in range(0, min(count * size, len(views)), size):
        batch = collate([views[i] for i in range(start, min(start + size, len(views)))])
        yield {name: tensor.to(model.device) for name, tensor in batch.items()}
